"""Faults from before the export: QDQ122, QDQ123, QDQ190 and QDQ191."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView, has_only, is_op, name_of, producer_of

UNCALIBRATED = "qdq.uncalibrated"
"""Metadata key of a file that was exported before calibration: quantizers with the ranges of one example."""


@register_rule(
    "QDQ122",
    "warning",
    "BatchNormalization follows a product with int8 weights (R-BN-FOLD).",
    "TensorRT folds it into the weights after their scales were computed, so the scales no longer fit.",
    "[src] cuDLA, CenterPoint and Ultralytics fold first; folding changes the range of each channel",
)
def _batchnorm_is_not_folded(view: GraphView) -> Iterator[Flaw]:
    """Name the BatchNormalization, if it could be folded into one product."""
    weights = _list_weights(view)
    uses = Counter(weights.values())
    for node, weight in weights.items():
        # a fold would change the weight of the other products
        if uses[weight] > 1:
            continue
        readers = view.readers(node.outputs[0])
        # a fold would change the input of the other readers
        if len(readers) > 1:
            continue

        if readers and has_only(readers, "BatchNormalization"):
            yield Flaw(
                node=name_of(readers[0]),
                message=f"it follows {name_of(node)}, whose weights have scales from before it (R-BN-FOLD)",
                fix="fold BatchNorm (fold_batchnorm) before calibration.",
            )


def _list_weights(view: GraphView) -> dict[ir.Node, ir.Value]:
    """The stored weight of each product whose weight comes from a DQ.

    Returns:
        The product -> its float weight if a Q quantizes it in the graph, otherwise the stored codes.
    """
    weights = {}
    for node in view.weighted:
        dequantizer = view.dequantizer(node.inputs[1])
        if dequantizer is None:
            continue

        weight = dequantizer.inputs[0]
        quantizer = producer_of(weight)
        if is_op(quantizer, "QuantizeLinear"):
            weight = quantizer.inputs[0]
        if weight is not None:
            weights[node] = weight
    return weights


@register_rule(
    "QDQ123",
    "warning",
    "Quantizers that never observed data.",
    "Their scales are the ranges of one example, or a default. Only quantizers that qdq records in the metadata are "
    "found; calibration itself names quantizers that saw no data or only zeros.",
    "metadata that qdq.compat writes where a script exports the structure only",
)
def _quantizers_never_observed(view: GraphView) -> Iterator[Flaw]:
    """Name the graph, once for all of its quantizers."""
    names = view.model.metadata_props.get(UNCALIBRATED)
    if not names:
        return
    count = len(names.split(","))
    yield Flaw(
        node=view.model.graph.name or "",
        message=f"{count} quantizers were exported before calibration, with the ranges of one example",
        fix="calibrate and export again.",
    )


@register_rule(
    "QDQ190",
    "error",
    "ONNX Runtime and torch differ by more than rounding ties.",
    "The file does not compute what was evaluated.",
    "measured by check_onnx where outputs of both are given; a file alone does not show it",
)
def _parity_is_lost(view: GraphView) -> Iterator[Flaw]:
    """Nothing in the graph shows it: `check_onnx` reports it."""
    yield from ()


@register_rule(
    "QDQ191",
    "info",
    "ONNX Runtime's default session and the file as it is written differ by more than rounding ties.",
    "The default session fuses Q/DQ into integer operators. If that changes the numbers, users who run the file there "
    "get results that were not evaluated. TensorRT is not affected, so this is an info.",
    "measured by check_onnx where outputs of both sessions are given; a file alone does not show it",
)
def _default_session_differs(view: GraphView) -> Iterator[Flaw]:
    """Nothing in the graph shows it: `check_onnx` reports it."""
    yield from ()
