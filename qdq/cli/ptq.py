"""`qdq ptq`: the recipe itself; there is no second pipeline."""

from qdq.cli.recipes import load_recipe

ptq = load_recipe("ptq_classifier").ptq_classifier
