"""Attention, normalisation and the erf GELU stay float: QDQ118."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import MOVING_OPS, GraphView, is_op, name_of

_NORMALISATIONS = (
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "RMSNormalization",
)
_BEFORE_SOFTMAX = MOVING_OPS | {"Add", "Div", "Mul", "Where", "QuantizeLinear", "DequantizeLinear"}
_BEHIND_SOFTMAX = MOVING_OPS | {"QuantizeLinear", "DequantizeLinear", "Where"}
_FIX = "leave it in float, and quantize the linear layers around it."


@register_rule(
    "QDQ118",
    "warning",
    "Q/DQ inside attention, in front of a normalisation or a softmax, or in the erf GELU (R-MHA-2, R-LN, R-GELU).",
    "TensorRT runs attention as one fused kernel, and with Q/DQ in it as separate ones that write the whole matrix to "
    "memory. Normalisation has no int8 kernel. Behind a convolution a LayerNorm's input may be quantized (R-LN).",
    "[probe] one _gemm_mha_v2 becomes three quantizers, two products and a softmax; [src] ModelOpt find_mha_partitions",
)
def _attention_is_quantized(view: GraphView) -> Iterator[Flaw]:
    for node in view.select("Softmax"):
        if parts := _quantized_attention(view, node):
            yield Flaw(
                name_of(node),
                f"the attention around it is quantized: {', '.join(parts)} (R-MHA-2)",
                _FIX,
            )
        elif view.dequantizer(node.inputs[0], MOVING_OPS) is not None:
            yield Flaw(name_of(node), "its input is quantized (R-SM)", _FIX)
    for node in view.select("Attention"):
        if any(view.dequantizer(value, MOVING_OPS) for value in node.inputs[:3]):
            yield Flaw(name_of(node), "its inputs are quantized (R-MHA-2)", _FIX)
    for node in view.select(*_NORMALISATIONS):
        before = view.dequantizer(node.inputs[0], MOVING_OPS)
        if before is not None and not _comes_from_conv(view, before):
            yield Flaw(name_of(node), "its input is quantized (R-LN)", _FIX)
    for node in view.select("Erf"):
        if any(view.dequantizer(value, MOVING_OPS) for value in _gelu_values(node)):
            yield Flaw(name_of(node), "Q/DQ stand in the GELU around it (R-GELU)", _FIX)


def _quantized_attention(view: GraphView, softmax: ir.Node) -> list[str]:
    """The parts of an attention that are quantized; none if the softmax is no attention's."""
    first = _score_product(view, softmax)
    second = next(
        (n for n in view.reached(softmax.outputs[0], _BEHIND_SOFTMAX) if is_op(n, "MatMul")), None
    )
    if first is None or second is None:
        return []
    path = [
        ("query", first.inputs[0]),
        ("key", first.inputs[1]),
        ("scores", softmax.inputs[0]),
        ("softmax", second.inputs[0]),
        ("value", second.inputs[1]),
    ]
    return [name for name, value in path if view.dequantizer(value, MOVING_OPS) is not None]


def _score_product(view: GraphView, softmax: ir.Node) -> ir.Node | None:
    """The product of query and key in front of a softmax: both its operands are computed."""
    nodes = [softmax]
    for _ in range(8):  # scale, mask, casts and a pair; attention is no longer than that
        values = [v for n in nodes for v in n.inputs if v is not None and view.is_computed(v)]
        nodes = [node for v in values if (node := v.producer()) is not None]
        for node in nodes:
            if is_op(node, "MatMul") and all(view.is_computed(value) for value in node.inputs):
                return node
        nodes = [node for node in nodes if is_op(node, *_BEFORE_SOFTMAX)]
    return None


def _comes_from_conv(view: GraphView, dequantizer: ir.Node) -> bool:
    quantizer = view.source(dequantizer.inputs[0], MOVING_OPS)
    if quantizer is None or not is_op(quantizer, "QuantizeLinear"):
        return False
    source = view.source(quantizer.inputs[0], MOVING_OPS | {"BatchNormalization"})
    return source is not None and is_op(source, "Conv", "ConvTranspose")


def _gelu_values(erf: ir.Node) -> Iterator[ir.Value]:
    """What the operators of x * (1 + erf(x / sqrt 2)) / 2 read."""
    nodes = [erf]
    before = erf.inputs[0].producer() if erf.inputs[0] is not None else None
    if before is not None and is_op(before, "Div", "Mul"):
        nodes.append(before)
    for node, _ in erf.outputs[0].uses():
        nodes.append(node)
    for node in nodes:
        if is_op(node, "Erf", "Div", "Mul", "Add"):
            yield from (value for value in node.inputs if value is not None)
