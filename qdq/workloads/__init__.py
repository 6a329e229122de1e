"""Tasks with their models, data and metrics: one package for each task."""
