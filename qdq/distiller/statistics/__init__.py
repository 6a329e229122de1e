"""Statistics of the layers of a model, and their file."""
