"""Runs onnx-ir passes and refuses any that loses Q/DQ (L25)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qdq.errors import ExportError
from qdq.graph.coverage import count_qdq


def run_passes(model: ir.Model, passes: Sequence[ir.passes.InPlacePass]) -> ir.Model:
    """Run the passes in order, in place, and count Q/DQ before and after each.

    A pass that takes Q or DQ nodes away on purpose says how many in `removed_q` or `removed_dq`.

    Raises:
        ExportError: A pass changed the number of Q or DQ nodes by more or less than it says.
    """
    for graph_pass in passes:
        before = count_qdq(model)
        graph_pass(model)
        removed = (getattr(graph_pass, "removed_q", 0), getattr(graph_pass, "removed_dq", 0))
        expected = (before[0] - removed[0], before[1] - removed[1])
        if (found := count_qdq(model)) != expected:
            raise ExportError(
                f"pass {type(graph_pass).__name__} left {found[0]} Q and {found[1]} DQ nodes, "
                f"expected {expected[0]} and {expected[1]}.",
                "this is a fault of qdq: please report it with the model.",
            )
    return model
