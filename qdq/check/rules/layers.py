"""Layers that are better left in float: QDQ117 and QDQ124."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, COPY_OPS, GraphView, is_op, name_of
from qdq.graph.code_types import LARGEST_FP8_KERNEL

_MIN_MATMUL = 16
_MIN_CHANNELS = 16
_CHANNEL_MULTIPLE = 8
_MIN_DEPTHWISE_KERNEL = 3
_CONSEQUENCES = {
    "int8": "int8 is slow there or does not build",
    "FP8": "it gains nothing from FP8, in which ModelOpt leaves it in float too",
}
_OTHER_CONSEQUENCE = "it gains nothing there"
_BEFORE_OUTPUT = COPY_OPS | {"Add", "Cast", "Concat", "LogSoftmax", "Sigmoid", "Softmax"}


@register_rule(
    "QDQ117",
    "warning",
    "A quantized layer without an efficient kernel: GEMV, tiny product, few channels, grouped, 3-D or transposed "
    "convolution, or in FP8 a convolution with a large kernel (R-MM-3, R-CONV-3, R-CONV-4, R-CONV-7, R-CONV-8, "
    "R-CT-3).",
    "It is slower than in float, or the build stops with 'could not find any implementation'. TensorRT-RTX runs an FP8 "
    "convolution of more than 32 kernel positions, such as 7 x 7, in float.",
    "[src] ModelOpt graph_utils, for int8 and FP8; [iss] 4529, 1409, 2125, 1694, 2280; [probe] TensorRT-RTX runs a "
    "deconvolution in float, whatever the type of its Q/DQ",
)
def _layer_has_no_kernel(view: GraphView) -> Iterator[Flaw]:
    """Name each such layer with int8 operands; layers of unknown sizes are skipped."""
    for node in view.weighted:
        dequantizer = view.dequantizer(node.inputs[1])
        if dequantizer is None:
            continue
        if not view.is_quantized(node.inputs[0]):
            continue

        weakness = _describe_weakness(view, node, dequantizer)
        if weakness:
            consequence = _CONSEQUENCES.get(view.code_word(dequantizer), _OTHER_CONSEQUENCE)
            yield Flaw(
                node=name_of(node),
                message=f"{weakness} is quantized; {consequence}",
                fix="leave this layer in float, or measure both.",
            )


def _describe_weakness(view: GraphView, node: ir.Node, dequantizer: ir.Node) -> str:
    """Why a layer has no good int8 kernel.

    Args:
        view: The graph.
        node: A weighted node with quantized operands.
        dequantizer: The DQ of its weight.

    Returns:
        A noun phrase; empty if there is a good kernel, or if the sizes are not known.
    """
    if node.op_type == "ConvTranspose":
        return "a transposed convolution (R-CT-3)"

    shape = view.shape(node.inputs[1])
    if not shape:
        shape = view.shape(dequantizer.inputs[0])
    sizes = _known_sizes(shape)
    if not sizes:
        return ""
    if node.op_type == "Conv":
        is_fp8 = view.code_word(dequantizer) == "FP8"
        if is_fp8 and math.prod(sizes[2:]) > LARGEST_FP8_KERNEL:
            return f"a convolution of kernel {sizes[2:]} (R-CONV-8)"
        return _describe_conv(view, node, sizes)
    return _describe_product(view, node, sizes)


def _known_sizes(shape: tuple[int | None, ...] | None) -> list[int]:
    """The sizes of a shape; empty if one of them is not known."""
    sizes: list[int] = []
    if shape is None:
        return sizes
    for size in shape:
        if size is None:
            return []
        sizes.append(size)
    return sizes


def _describe_conv(view: GraphView, conv: ir.Node, shape: list[int]) -> str:
    """Why a Conv has no good kernel.

    Args:
        view: The graph.
        conv: A Conv.
        shape: Of its weight.
    """
    if len(shape) < 3:  # not a convolution (QDQ203)
        return ""
    if len(shape) > 4:
        return "a 3-D convolution (R-CONV-7)"

    group = conv.attributes.get_int("group", 1)
    if group > 1:
        return _describe_groups(group, shape)
    is_first = conv is view.select("Conv")[0]
    return _describe_channels(shape, is_first)


def _describe_groups(group: int, shape: list[int]) -> str:
    """Why a grouped convolution has no good kernel: only depthwise ones of regular sizes have one.

    Args:
        group: Number of groups, 2 or more.
        shape: Of the weight: output channels, input channels of a group, kernel.
    """
    outputs, inputs_of_group, kernel = shape[0], shape[1], shape[2:]
    if inputs_of_group > 1:
        return f"a convolution in {group} groups (R-CONV-4)"
    if outputs % _CHANNEL_MULTIPLE == 0 and min(kernel) >= _MIN_DEPTHWISE_KERNEL:
        return ""
    channels = f"{group * inputs_of_group} -> {outputs}"
    return f"a depthwise convolution of {channels} channels and kernel {kernel} (R-CONV-3)"


def _describe_channels(shape: list[int], is_first: bool) -> str:
    """Why a convolution without groups has no good kernel: few channels need a regular size and a square kernel.

    Args:
        shape: Of the weight: output channels, input channels, kernel.
        is_first: Whether it is the first convolution, which may have few channels on both sides.
    """
    outputs, inputs, kernel = shape[0], shape[1], shape[2:]
    if min(outputs, inputs) >= _MIN_CHANNELS:
        return ""

    is_wide = is_first or max(outputs, inputs) >= _MIN_CHANNELS
    remainders = (outputs % _CHANNEL_MULTIPLE, inputs % _CHANNEL_MULTIPLE)
    is_square = len(set(kernel)) == 1
    if is_wide and is_square and 0 in remainders:
        return ""
    return f"a convolution of {inputs} -> {outputs} channels and kernel {kernel} (R-CONV-3)"


def _describe_product(view: GraphView, product: ir.Node, shape: list[int]) -> str:
    """Why a matrix product has no good kernel: vectors and tiny matrices have none.

    Args:
        view: The graph.
        product: A Gemm or MatMul.
        shape: Of its weight.
    """
    if len(shape) < 2:
        return ""
    if view.is_computed(product.inputs[1]):
        return ""

    inputs, outputs = shape[-2:]
    if _is_transposed(product):
        inputs, outputs = outputs, inputs
    if outputs == 1:
        return "a matrix-vector product (R-MM-3)"
    if min(inputs, outputs) < _MIN_MATMUL:
        return f"a product of K={inputs}, N={outputs} (R-MM-3)"

    result = view.shape(product.outputs[0])
    if result is not None and set(result[:-1]) == {1}:
        return "a product with one row (R-MM-3)"
    return ""


def _is_transposed(product: ir.Node) -> bool:
    """Whether a matrix product transposes its weight."""
    return product.op_type == "Gemm" and product.attributes.get_int("transB", 0) != 0


@register_rule(
    "QDQ124",
    "info",
    "A layer that computes an output of the model is quantized, or the output itself (R-OUT).",
    "The last layers, especially in detection heads, are the most sensitive. Check the accuracy with this layer in "
    "float.",
    "[src] Ultralytics, cuDLA and yolov9 keep head outputs in float; ModelOpt quantizes only their inputs",
)
def _output_is_quantized(view: GraphView) -> Iterator[Flaw]:
    """Name the DQ of an output, and each int8 layer that computes an output."""
    for output in view.model.graph.outputs:
        producer = view.source(output, COMMUTING_OPS)
        if not is_op(producer, "DequantizeLinear"):
            continue
        if view.is_computed(producer.inputs[0]):
            yield Flaw(
                node=name_of(producer),
                message=f"the output {output.name} is rounded to {view.code_word(producer)} (R-OUT)",
                fix="remove the pair before the output.",
            )

    for node in view.weighted:
        if not view.has_quantized_operands(node):
            continue
        if _makes_output(view, node):
            yield Flaw(
                node=name_of(node),
                message="it computes an output of the model, and is quantized (R-OUT)",
                fix="analyze the layer, or leave it in float if the accuracy is too low.",
            )


def _makes_output(view: GraphView, node: ir.Node) -> bool:
    """Whether a node computes an output of the model, except for operators that move or squash values.

    Args:
        view: The graph.
        node: A weighted node.
    """
    visited, waiting = {node}, [node]
    while waiting:
        outputs = waiting.pop().outputs
        if any(value.is_graph_output() for value in outputs):
            return True

        for value in outputs:
            for reader in set(view.readers(value)) - visited:
                if _passes_output_on(view, reader):
                    visited.add(reader)
                    waiting.append(reader)
    return False


def _passes_output_on(view: GraphView, node: ir.Node) -> bool:
    """Whether the output of a node counts as the output of the layer before it.

    An Add counts if it adds a constant such as a bias, not if it joins two branches.
    """
    if is_op(node, "Add"):
        return view.has_constant_input(node)
    return is_op(node, *_BEFORE_OUTPUT)
