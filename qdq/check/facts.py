"""Facts about a file besides its graph: the verdicts of onnx and ONNX Runtime, and damaged constants."""

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
        is_sorted: Whether every node comes after the nodes whose outputs it reads.
        has_cycle: Whether a node reads a value that is computed from its own output.
        unknown: Domain and type of the operators that onnx does not know and no function of the file defines.
        tensor_faults: Constants whose data cannot be read.
        checker: The verdict of onnx.
        runtime: The verdict of ONNX Runtime, None if it was not asked.
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
        """Keyword arguments of `measure_coverage`: whether onnx may infer shapes, and how."""
        return {
            "may_infer": self.checker.may_ask_again,
            "data_prop": self.checker.can_propagate,
        }
