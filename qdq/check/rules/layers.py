"""Layers that are better left in float: QDQ117 and QDQ124."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, COPY_OPS, GraphView, is_op, name_of

_MIN_MATMUL = 16
_MIN_CHANNELS = 16
_BEFORE_OUTPUT = COPY_OPS | {"Add", "Cast", "Concat", "LogSoftmax", "Sigmoid", "Softmax"}


@register_rule(
    "QDQ117",
    "warning",
    "A quantized layer without an efficient int8 kernel: GEMV, tiny product, few channels, grouped, 3-D or transposed "
    "convolution (R-MM-3, R-CONV-3, R-CONV-4, R-CONV-7, R-CT-3).",
    "It is slower than in float, or the build stops with 'could not find any implementation'.",
    "[src] ModelOpt graph_utils; [iss] 4529, 1409, 2125, 1694, 2280; [probe] TensorRT-RTX runs no int8 deconvolution",
)
def _layer_has_no_kernel(view: GraphView) -> Iterator[Flaw]:
    convolutions = view.select("Conv")
    for node in view.weighted:
        weight = view.dequantizer(node.inputs[1])
        if weight is None or not view.is_quantized(node.inputs[0]):
            continue
        shape = view.shape(node.inputs[1]) or view.shape(weight.inputs[0])
        if node.op_type == "ConvTranspose":
            reason = "a transposed convolution (R-CT-3)"
        elif shape is None or None in shape:
            continue
        elif node.op_type == "Conv":
            reason = _weakness_of_conv(
                node, [int(size or 0) for size in shape], node is convolutions[0]
            )
        else:
            reason = _weakness_of_product(view, node, [int(size or 0) for size in shape])
        if reason:
            message = f"{reason} is quantized; int8 is slow there or does not build"
            yield Flaw(name_of(node), message, "leave this layer in float, or measure both.")


def _weakness_of_conv(node: ir.Node, shape: list[int], is_first: bool) -> str:
    """Why a convolution has no good int8 kernel; "" if it has."""
    if len(shape) < 3:  # no convolution (QDQ203)
        return ""
    outputs, inputs, kernel = shape[0], shape[1], shape[2:]
    group = node.attributes.get_int("group", 1)
    channels = f"{inputs * group} -> {outputs} channels"
    if len(kernel) > 2:
        return "a 3-D convolution (R-CONV-7)"
    if group > 1 and inputs > 1:
        return f"a convolution in {group} groups (R-CONV-4)"
    if group > 1:
        sound = outputs % 8 == 0 and min(kernel) >= 3
        return (
            "" if sound else f"a depthwise convolution of {channels} and kernel {kernel} (R-CONV-3)"
        )
    if outputs >= _MIN_CHANNELS and inputs >= _MIN_CHANNELS:
        return ""
    divisible = outputs % 8 == 0 or inputs % 8 == 0
    wide = is_first or outputs >= _MIN_CHANNELS or inputs >= _MIN_CHANNELS
    sound = divisible and wide and len(set(kernel)) == 1
    return "" if sound else f"a convolution of {channels} and kernel {kernel} (R-CONV-3)"


def _weakness_of_product(view: GraphView, node: ir.Node, shape: list[int]) -> str:
    """Why a matrix product has no good int8 kernel; "" if it has, or if sizes are not known."""
    if len(shape) < 2 or view.is_computed(node.inputs[1]):
        return ""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
    k, n = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    if n == 1:
        return "a matrix-vector product (R-MM-3)"
    if min(k, n) < _MIN_MATMUL:
        return f"a product of K={k}, N={n} (R-MM-3)"
    rows = (view.shape(node.outputs[0]) or (None,))[:-1]
    return "a product with one row (R-MM-3)" if rows and all(size == 1 for size in rows) else ""


@register_rule(
    "QDQ124",
    "info",
    "A layer that makes an output of the model is quantized, or the output itself (R-OUT).",
    "Last layers, above all of detection heads, are the most sensitive ones. Look at the accuracy with this layer in "
    "float.",
    "[src] Ultralytics, cuDLA and yolov9 keep head outputs in float; ModelOpt quantizes only their inputs",
)
def _output_is_quantized(view: GraphView) -> Iterator[Flaw]:
    fix = "analyze the layer, or leave it in float if accuracy is missing."
    for output in view.model.graph.outputs:
        producer = view.source(output, COMMUTING_OPS)
        if (
            producer is not None
            and is_op(producer, "DequantizeLinear")
            and view.is_computed(producer.inputs[0])
        ):
            message = f"the output {output.name} is rounded to int8 (R-OUT)"
            yield Flaw(name_of(producer), message, "take the pair in front of the output away.")
    for node in view.weighted:
        if all(view.is_quantized(value) for value in node.inputs[:2]) and _makes_output(view, node):
            yield Flaw(
                name_of(node), "it makes an output of the model, and is quantized (R-OUT)", fix
            )


def _makes_output(view: GraphView, node: ir.Node) -> bool:
    """Whether a model's output is this node's, but for operators that move or squash values."""
    seen, nodes = {node}, [node]
    while nodes:
        for value in nodes.pop().outputs:
            if value.is_graph_output():
                return True
            for reader in view.readers(value):
                if (
                    is_op(reader, *_BEFORE_OUTPUT)
                    and reader not in seen
                    and not _joins(view, reader)
                ):
                    seen.add(reader)
                    nodes.append(reader)
    return False


def _joins(view: GraphView, node: ir.Node) -> bool:
    """Whether an Add joins two branches, not a product and its bias."""
    return is_op(node, "Add") and all(view.is_computed(value) for value in node.inputs)
