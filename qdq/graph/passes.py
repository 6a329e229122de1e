"""Run onnx-ir passes and refuse any that loses Q/DQ (L25)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qdq.errors import ExportError
from qdq.graph.coverage import count_qdq


def run_passes(model: ir.Model, passes: Sequence[ir.passes.InPlacePass]) -> ir.Model:
    """Run the passes in order, in place, and count Q/DQ around each of them.

    A pass that removes Q or DQ nodes on purpose gives their number in `removed_q` or `removed_dq`.

    Raises:
        ExportError: A pass changed the number of Q or DQ nodes by a number other than this.
    """
    for graph_pass in passes:
        q_before, dq_before = count_qdq(model)
        graph_pass(model)
        q_after, dq_after = count_qdq(model)

        expected_q = q_before - getattr(graph_pass, "removed_q", 0)
        expected_dq = dq_before - getattr(graph_pass, "removed_dq", 0)
        if (q_after, dq_after) != (expected_q, expected_dq):
            raise ExportError(
                f"pass {type(graph_pass).__name__} left {q_after} Q and {dq_after} DQ nodes, "
                f"expected {expected_q} and {expected_dq}.",
                "this is a bug in qdq: please report it with the model.",
            )

    return model
