"""Attention, normalisation and the erf GELU stay float: QDQ118."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import (
    MOVING_OPS,
    GraphView,
    is_op,
    name_of,
    producer_of,
    producers_of,
)

_NORMALISATIONS = (
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "RMSNormalization",
)
_BEFORE_SOFTMAX = MOVING_OPS | {"Add", "Div", "Mul", "Where", "QuantizeLinear", "DequantizeLinear"}
_AFTER_SOFTMAX = MOVING_OPS | {"QuantizeLinear", "DequantizeLinear", "Where"}
# Scale, mask, casts and a pair between the scores and the softmax: attention is not longer than that.
_MOST_NODES_BEFORE_SOFTMAX = 8
_FIX = "leave it in float, and quantize the linear layers around it."


@register_rule(
    "QDQ118",
    "warning",
    "Q/DQ inside attention, before a normalisation or a softmax, or in the erf GELU (R-MHA-2, R-LN, R-GELU).",
    "TensorRT runs attention as one fused kernel. With Q/DQ inside it becomes separate kernels that write the whole "
    "matrix to memory. Normalisation has no int8 kernel. After a convolution the input of a LayerNorm may be "
    "quantized (R-LN).",
    "[probe] one _gemm_mha_v2 becomes three quantizers, two products and a softmax; [src] ModelOpt find_mha_partitions",
)
def _attention_is_quantized(view: GraphView) -> Iterator[Flaw]:
    """Name the Softmax, the Attention, the normalisation or the Erf.

    Attention that is written in other operators is not recognised.
    """
    yield from _check_softmaxes(view)
    for node in view.select("Attention"):
        query_key_value = node.inputs[:3]
        if _comes_from_pair(view, query_key_value):
            yield Flaw(
                node=name_of(node),
                message="its inputs are quantized (R-MHA-2)",
                fix=_FIX,
            )
    yield from _check_normalisations(view)
    for node in view.select("Erf"):
        if _comes_from_pair(view, _gelu_values(node)):
            yield Flaw(
                node=name_of(node),
                message="the GELU around it contains Q/DQ (R-GELU)",
                fix=_FIX,
            )


def _check_softmaxes(view: GraphView) -> Iterator[Flaw]:
    """For a softmax of an attention, name the quantized parts of it; for another one, only its input."""
    for node in view.select("Softmax"):
        parts = _quantized_attention(view, node)
        if parts:
            yield Flaw(
                node=name_of(node),
                message=f"the attention around it is quantized: {', '.join(parts)} (R-MHA-2)",
                fix=_FIX,
            )
        elif _comes_from_pair(view, node.inputs[:1]):
            yield Flaw(
                node=name_of(node),
                message="its input is quantized (R-SM)",
                fix=_FIX,
            )


def _check_normalisations(view: GraphView) -> Iterator[Flaw]:
    """A normalisation of quantized values, except after a convolution."""
    for node in view.select(*_NORMALISATIONS):
        dequantizer = view.dequantizer(node.inputs[0], MOVING_OPS)
        if dequantizer is None:
            continue
        if _comes_from_convolution(view, dequantizer):
            continue

        yield Flaw(
            node=name_of(node),
            message="its input is quantized (R-LN)",
            fix=_FIX,
        )


def _comes_from_pair(view: GraphView, values: Iterable[ir.Value | None]) -> bool:
    """Whether one of the values comes from a DQ, directly or through copy operators."""
    return any(view.dequantizer(value, MOVING_OPS) for value in values)


def _quantized_attention(view: GraphView, softmax: ir.Node) -> list[str]:
    """The parts of an attention that are quantized.

    Args:
        view: The graph.
        softmax: A Softmax.

    Returns:
        Names of the parts; empty if there are none, or if the softmax does not belong to an attention.
    """
    scores = _score_product(view, softmax)
    weighted_sum = _value_product(view, softmax)
    if scores is None or weighted_sum is None:
        return []

    values = {
        "query": scores.inputs[0],
        "key": scores.inputs[1],
        "scores": softmax.inputs[0],
        "softmax": weighted_sum.inputs[0],
        "value": weighted_sum.inputs[1],
    }
    return [part for part, value in values.items() if _comes_from_pair(view, [value])]


def _score_product(view: GraphView, softmax: ir.Node) -> ir.Node | None:
    """The product of query and key before a softmax: both of its operands are computed.

    Returns:
        The MatMul; None if there is none within `_MOST_NODES_BEFORE_SOFTMAX` steps.
    """
    nodes = [softmax]
    for _ in range(_MOST_NODES_BEFORE_SOFTMAX):
        producers: list[ir.Node | None] = []
        for node in nodes:
            producers += map(producer_of, view.computed_inputs(node))

        nodes = []
        for producer in producers:
            if is_op(producer, "MatMul") and not view.has_constant_input(producer):
                return producer
            if is_op(producer, *_BEFORE_SOFTMAX):
                nodes.append(producer)
    return None


def _value_product(view: GraphView, softmax: ir.Node) -> ir.Node | None:
    """The product of the softmax and the value.

    Returns:
        The first MatMul after the softmax; None if there is none.
    """
    for node in view.reached(softmax.outputs[0], _AFTER_SOFTMAX):
        if is_op(node, "MatMul"):
            return node
    return None


def _comes_from_convolution(view: GraphView, dequantizer: ir.Node) -> bool:
    """Whether a pair quantizes the output of a convolution."""
    quantizer = view.source(dequantizer.inputs[0], MOVING_OPS)
    if not is_op(quantizer, "QuantizeLinear"):
        return False
    source = view.source(quantizer.inputs[0], MOVING_OPS | {"BatchNormalization"})
    return is_op(source, "Conv", "ConvTranspose")


def _gelu_values(erf: ir.Node) -> Iterator[ir.Value | None]:
    """The inputs of the operators of x * (1 + erf(x / sqrt 2)) / 2."""
    yield from erf.inputs
    for producer in producers_of(erf):
        if is_op(producer, "Div", "Mul"):
            yield from producer.inputs
    for reader, _ in erf.outputs[0].uses():
        if is_op(reader, "Erf", "Div", "Mul", "Add"):
            yield from reader.inputs
