"""What is known of a file beside its graph: what onnx and ONNX Runtime say of it, and which constants are damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from qdq.check.tensors import TensorFault
from qdq.graph.validate import CheckerVerdict, RuntimeVerdict


@dataclass(frozen=True)
class FileFacts:
    """Facts that rules read.

    Args:
        path: The file.
        proto: Its content.
        is_utf8: Whether all its texts are UTF-8.
        is_sorted: Whether every node stands behind those that it reads.
        has_cycle: Whether a node reads what is computed from its own output.
        unknown: Domain and type of the operators that onnx does not know and no function of the file defines.
        tensor_faults: Constants whose data cannot be read.
        checker: What onnx says.
        runtime: What ONNX Runtime says, None if it was not asked.
    """

    path: Path
    proto: onnx.ModelProto
    is_utf8: bool
    is_sorted: bool
    has_cycle: bool
    unknown: frozenset[tuple[str, str]]
    tensor_faults: tuple[TensorFault, ...]
    checker: CheckerVerdict
    runtime: RuntimeVerdict | None

    @property
    def inference(self) -> dict[str, bool]:
        """What `measure_coverage` may ask of onnx."""
        return {"may_infer": self.checker.may_ask_again, "data_prop": self.checker.can_propagate}
