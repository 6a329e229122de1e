"""From a trained float model to one whose layers compute on codes."""
