"""Rewrite Einsum equations with the letters that TensorRT reads."""

from __future__ import annotations

import string

import onnx_ir as ir

from qdq.graph.pairs import is_op


class LowerEinsum(ir.passes.InPlacePass):
    """Write the equation of every Einsum in lower case and without spaces.

    ONNX allows capital letters, and the parser of TensorRT refuses them. An equation that needs more than the 26 small
    letters does not change.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the subscripts of every Einsum of the main graph."""
        modified = False
        for node in model.graph:
            if not is_op(node, "Einsum"):
                continue

            equation = node.attributes["equation"].as_string()
            lowered = _lower_equation(equation)
            node.attributes["equation"] = ir.AttrString("equation", lowered)
            modified |= lowered != equation

        return ir.passes.PassResult(model, modified=modified)


def _lower_equation(equation: str) -> str:
    """The equation with a small letter for each capital letter; small letters keep their meaning.

    Renaming is safe if the equation names its output: without an arrow, the order of the letters decides the order
    of the output dimensions.
    """
    equation = equation.replace(" ", "")
    if "->" not in equation:
        return equation

    new_letters = _choose_letters(equation)
    if new_letters is None:
        return equation

    table = {ord(capital): letter for capital, letter in new_letters.items()}
    return equation.translate(table)


def _choose_letters(equation: str) -> dict[str, str] | None:
    """Choose a small letter for each capital letter.

    A capital letter gets its own small letter if that is free. The others then get the remaining letters in
    alphabetical order.

    Args:
        equation: The equation, without spaces.

    Returns:
        Capital letter -> small letter; None if there are not enough.
    """
    letters = list(dict.fromkeys(filter(str.isalpha, equation)))
    capitals = [letter for letter in letters if letter.isupper()]
    free_letters = [letter for letter in string.ascii_lowercase if letter not in letters]

    new_letters = {}
    for capital in capitals:
        if capital.lower() in free_letters:
            new_letters[capital] = capital.lower()
            free_letters.remove(capital.lower())

    for capital in capitals:
        if capital in new_letters:
            continue
        if not free_letters:
            return None
        new_letters[capital] = free_letters.pop(0)

    return new_letters
