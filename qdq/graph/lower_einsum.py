"""Einsum equations in the letters that TensorRT reads."""

from __future__ import annotations

import string

import onnx_ir as ir

from qdq.graph.pairs import is_op


class LowerEinsum(ir.passes.InPlacePass):
    """Equations with capital letters, which ONNX allows and TensorRT's parser refuses, get small ones; spaces go.

    An equation that needs more than the 26 small letters stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the subscripts of every Einsum of the main graph."""
        modified = False
        for node in model.graph:
            if is_op(node, "Einsum"):
                equation = node.attributes["equation"].as_string()
                lowered = _lower(equation)
                node.attributes["equation"] = ir.AttrString("equation", lowered)
                modified |= lowered != equation
        return ir.passes.PassResult(model, modified=modified)


def _lower(equation: str) -> str:
    """Small letters stay what they are where no capital one takes their place."""
    equation = equation.replace(" ", "")
    letters = dict.fromkeys(filter(str.isalpha, equation))
    capitals = [letter for letter in letters if letter.isupper()]
    free = [letter for letter in string.ascii_lowercase if letter not in letters]
    wanted = [letter.lower() if letter.lower() in free else "" for letter in capitals]
    others = iter([letter for letter in free if letter not in wanted])
    names = [name or next(others, "") for name in wanted]
    if (
        not all(names) or "->" not in equation
    ):  # without an arrow the order of the letters says what comes out
        return equation
    return equation.translate(str.maketrans("".join(capitals), "".join(names)))
