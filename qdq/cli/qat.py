"""`qdq qat`: runs the recipe."""

from qdq.cli.recipes import load_recipe

qat = load_recipe("qat").qat
