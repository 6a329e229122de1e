"""`qdq ptq`: runs the recipe."""

from qdq.cli.recipes import load_recipe

ptq = load_recipe("ptq").ptq
