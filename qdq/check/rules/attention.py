"""Attention: float, or FP8 as a whole; normalisation and the erf GELU stay float: QDQ118 and QDQ136."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
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
_FUSED_PARTS = ("query", "key", "softmax", "value")
_SOFTMAX_SCALE = 1 / 448  # the softmax is at most 1, and the largest code is 448
_SCALE_TOLERANCE = 2**-8  # of a scale in bfloat16
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

    Attention that is written in other operators is not recognised. Attention in FP8 is left to QDQ136.
    """
    yield from _check_softmaxes(view)
    for node in view.select("Attention"):
        query_key_value = node.inputs[:3]
        if _comes_from_fp8(view, query_key_value):
            continue
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
        attention = _find_attention(view, node)
        parts = [] if attention is None else attention.list_quantized(view)
        if attention is not None and attention.is_fp8(view):
            continue
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


@register_rule(
    "QDQ136",
    "warning",
    "Attention in FP8 that TensorRT does not run as one kernel (R-MHA-3).",
    "One kernel needs FP8 on query, key, value and on the output of the softmax, in a graph of half precision. In "
    "float32, or without the pair of the softmax, it becomes two products and a softmax that write the whole matrix to "
    "memory. The softmax is at most 1, so its scale is 1/448: a larger one wastes codes, a smaller one clips. The "
    "factor of the query and the transpose of the key belong in front of their Q (an info: TensorRT-RTX moves them).",
    "[probe] _gemm_mha_v2 with three FP8 inputs, at SM 89 and 120; float32, or no pair on the softmax: two products; "
    "[iss] ModelOpt PR 1289",
)
def _fp8_attention_is_split(view: GraphView) -> Iterator[Flaw]:
    """Name the Softmax, or the Attention."""
    for node in view.select("Softmax"):
        attention = _find_attention(view, node)
        if attention is not None and attention.is_fp8(view):
            yield from _check_fp8_attention(view, node, attention)
    for node in view.select("Attention"):
        if _comes_from_fp8(view, node.inputs[:3]):
            yield Flaw(
                node=name_of(node),
                message="its inputs are FP8, but it has no place for Q/DQ on its softmax: it runs in float (R-MHA-3)",
                fix="write the attention as MatMul, Softmax and MatMul, or leave out the Q/DQ.",
            )


def _check_fp8_attention(
    view: GraphView, softmax: ir.Node, attention: _Attention
) -> Iterator[Flaw]:
    """The faults that split an attention, the scale of its softmax, and the place of its factor and transpose."""
    faults = attention.list_splits(view)
    if faults:
        yield Flaw(
            node=name_of(softmax),
            message=f"the FP8 attention around it becomes several kernels: {', '.join(faults)} (R-MHA-3)",
            fix="quantize query, key, value and the output of the softmax to FP8, and export the rest in float16.",
        )

    scale = attention.softmax_scale(view)
    if scale is not None and abs(scale / _SOFTMAX_SCALE - 1) > _SCALE_TOLERANCE:
        yield Flaw(
            node=name_of(softmax),
            message=f"the scale of its Q/DQ is {scale:.4g}, not 1/448 (R-MHA-3)",
            fix="write 1/448: the softmax is at most 1.",
        )

    for part, op_type in attention.list_late(view):
        yield Flaw(
            node=name_of(softmax),
            message=f"{op_type} is between the DQ of its {part} and the product (R-MHA-3)",
            fix=f"put the {op_type} in front of the Q, so that the product reads the DQ.",
            severity="info",
        )


def list_attention(view: GraphView) -> Iterator[tuple[ir.Node, ir.Node, ir.Node]]:
    """The attention of a graph that is written as two products around a softmax.

    Yields:
        The Softmax, the product of query and key, and the product of the softmax and the value.
    """
    for node in view.select("Softmax"):
        scores, weighted_sum = _score_product(view, node), _value_product(view, node)
        if scores is not None and weighted_sum is not None:
            yield node, scores, weighted_sum


@dataclass(frozen=True)
class _Attention:
    """The two products around a softmax, and what they read.

    Args:
        parts: "query", "key", "scores" (before the softmax), "softmax" (after it) and "value" -> the value.
    """

    parts: dict[str, ir.Value | None]

    def list_quantized(self, view: GraphView) -> list[str]:
        """The names of the parts that come from a DQ."""
        return [part for part, value in self.parts.items() if _comes_from_pair(view, [value])]

    def is_fp8(self, view: GraphView) -> bool:
        """Whether a part comes from a DQ of FP8."""
        values = [_before_factor(view, value) for value in self.parts.values()]
        return _comes_from_fp8(view, values)

    def list_splits(self, view: GraphView) -> list[str]:
        """Why TensorRT runs an attention in FP8 as several kernels."""
        missing = []
        for part in _FUSED_PARTS:
            if not _comes_from_fp8(view, [_before_factor(view, self.parts[part])]):
                missing.append(part)

        faults = []
        if missing:
            faults.append(f"no FP8 Q/DQ on {' and '.join(missing)}")
        if _comes_from_pair(view, [self.parts["scores"]]):
            faults.append("Q/DQ on the scores")
        if view.dtype(self.parts["value"]) == ir.DataType.FLOAT:
            faults.append("it is in float32")
        return faults

    def softmax_scale(self, view: GraphView) -> float | None:
        """The scale of the FP8 Q/DQ after the softmax; None if there is none, or if it is not one number."""
        value = self.parts["softmax"]
        if not _comes_from_fp8(view, [value]):
            return None
        dequantizer = view.dequantizer(value, MOVING_OPS)
        scale = None if dequantizer is None else view.scale(dequantizer)
        if scale is None or scale.size != 1 or not np.isfinite(scale).all():
            return None
        return float(scale.flat[0])

    def list_late(self, view: GraphView) -> Iterator[tuple[str, str]]:
        """The factor of the query and the transpose of the key, if they stand between the DQ and the product."""
        for part in ("query", "key"):
            node = producer_of(self.parts[part])
            if not is_op(node, "Mul", "Div", "Transpose"):
                continue
            if _comes_from_fp8(view, [_before_factor(view, self.parts[part])]):
                yield part, node.op_type


def _find_attention(view: GraphView, softmax: ir.Node) -> _Attention | None:
    """The attention that a softmax belongs to.

    Args:
        view: The graph.
        softmax: A Softmax.

    Returns:
        None if there are not two products around it.
    """
    scores = _score_product(view, softmax)
    weighted_sum = _value_product(view, softmax)
    if scores is None or weighted_sum is None:
        return None

    return _Attention(
        {
            "query": scores.inputs[0],
            "key": scores.inputs[1],
            "scores": softmax.inputs[0],
            "softmax": weighted_sum.inputs[0],
            "value": weighted_sum.inputs[1],
        }
    )


def _comes_from_fp8(view: GraphView, values: Iterable[ir.Value | None]) -> bool:
    """Whether one of the values comes from a DQ of FP8, directly or through copy operators."""
    for value in values:
        dequantizer = view.dequantizer(value, MOVING_OPS)
        if dequantizer is not None and view.code_word(dequantizer) == "FP8":
            return True
    return False


def _before_factor(view: GraphView, value: ir.Value | None) -> ir.Value | None:
    """The value that a constant factor multiplies; the value itself if there is no factor."""
    node = producer_of(value)
    if not is_op(node, "Mul", "Div"):
        return value
    computed = view.computed_inputs(node)
    return computed[0] if len(computed) == 1 else value


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
