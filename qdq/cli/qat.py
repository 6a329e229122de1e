"""`qdq qat`: the recipe itself; there is no second pipeline."""

from qdq.cli.recipes import load_recipe

qat = load_recipe("qat_classifier").qat_classifier
