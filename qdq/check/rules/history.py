"""What went wrong before the export: QDQ122, QDQ123, QDQ190 and QDQ191."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView, is_op, name_of

UNCALIBRATED = "qdq.uncalibrated"
"""Metadata key of a file that was exported before calibration: the quantizers whose ranges are those of one example."""


@register_rule(
    "QDQ122",
    "warning",
    "BatchNormalization stands behind a product with int8 weights (R-BN-FOLD).",
    "TensorRT folds it into the weights after they got their scales. The scales are then those of other numbers.",
    "[src] cuDLA, CenterPoint and Ultralytics fold first; folding changes the range of each channel",
)
def _batchnorm_is_not_folded(view: GraphView) -> Iterator[Flaw]:
    sources = {node: _source_of_weight(view, node) for node in view.weighted}
    uses = Counter(source for source in sources.values() if source is not None)
    for node, source in sources.items():
        if source is None or uses[source] > 1:  # a fold would change what the other products read
            continue
        readers = view.readers(node.outputs[0])
        for reader in readers:
            if is_op(reader, "BatchNormalization") and len(readers) == 1:  # else nobody can fold it
                message = f"it follows {name_of(node)}, whose weights have scales from before it (R-BN-FOLD)"
                yield Flaw(
                    name_of(reader), message, "fold BatchNorm (fold_batchnorm) before calibration."
                )


def _source_of_weight(view: GraphView, node: ir.Node) -> ir.Value | None:
    """The stored weight, or the codes of it, behind the DQ in front of a product; None where there is no DQ."""
    dequantize = view.dequantizer(node.inputs[1])
    codes = None if dequantize is None else dequantize.inputs[0]
    quantize = None if codes is None else codes.producer()
    return (
        quantize.inputs[0] if is_op(quantize, "QuantizeLinear") and quantize is not None else codes
    )


@register_rule(
    "QDQ123",
    "warning",
    "Quantizers that never observed data.",
    "Their scales are the ranges of one example, or a default. Only what qdq notes in its files can be seen here; "
    "calibration itself names quantizers that saw nothing, or zeros only.",
    "metadata that qdq.compat writes where a script exports the structure only",
)
def _quantizers_never_observed(view: GraphView) -> Iterator[Flaw]:
    if names := view.model.metadata_props.get(UNCALIBRATED):
        count = len(names.split(","))
        message = (
            f"{count} quantizers were exported before calibration, with the ranges of one example"
        )
        yield Flaw(view.model.graph.name or "", message, "calibrate and export again.")


@register_rule(
    "QDQ190",
    "error",
    "ONNX Runtime and torch differ by more than rounding ties.",
    "The file does not compute what was evaluated.",
    "measured by check_onnx where outputs of both are given; a file alone does not show it",
)
def _parity_is_lost(view: GraphView) -> Iterator[Flaw]:
    yield from ()  # `check_onnx` raises it


@register_rule(
    "QDQ191",
    "info",
    "ONNX Runtime's default session and the file as it is written differ by more than rounding ties.",
    "The default session fuses Q/DQ into integer operators. Where that changes the numbers, who runs the file there "
    "gets others than those that were evaluated. TensorRT is not concerned, so this is an info.",
    "measured by check_onnx where outputs of both sessions are given; a file alone does not show it",
)
def _default_session_differs(view: GraphView) -> Iterator[Flaw]:
    yield from ()  # `check_onnx` raises it
