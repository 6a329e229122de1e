"""What a type of codes needs from opset, GPU and runtime: QDQ133 to QDQ135, QDQ137 and QDQ138."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COPY_OPS, GraphView, is_op, name_of
from qdq.graph.code_types import find_code_type, list_lacking
from qdq.text import list_names

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@register_rule(
    "QDQ133",
    "error",
    "Codes of a type that Q/DQ do not have in the opset of the file (R-OPSET).",
    "The file is not valid ONNX: FP8 needs opset 19, int4 and int16 need 21, FP4 needs 23. TensorRT-RTX builds it all "
    "the same, and ONNX Runtime does not load it.",
    "onnx.defs; [probe] FP8 at opset 17 becomes an FP8 kernel",
)
def _opset_lacks_type(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such codes."""
    if view.opset < 1:  # QDQ207
        return
    for node in view.qdq_nodes:
        code_type = find_code_type(node)
        if view.opset < code_type.opset:
            yield Flaw(
                node=name_of(node),
                message=f"its codes are {code_type.name}, which opset {view.opset} does not have (R-OPSET)",
                fix=f"export at opset {code_type.opset} or later.",
            )


@register_rule(
    "QDQ134",
    "error",
    "Codes of a type that the GPU does not have (R-SM).",
    "TensorRT refuses the file: FP8 needs SM 89 or later, FP4 needs SM 100. Only the caller knows the GPU: the rule is "
    "silent without --sm or --gpu.",
    "[probe] 'Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3'",
)
def _gpu_lacks_type(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such codes, also TensorRT's own."""
    if view.sm is None:
        return
    for node, word, least_sm in list_lacking(view.nodes, view.sm):
        yield Flaw(
            node=name_of(node),
            message=f"its codes are {word}, which SM {view.sm} does not have (R-SM)",
            fix=f"use a GPU of SM {least_sm} or later, or leave the layer in int8 or float.",
        )


@register_rule(
    "QDQ135",
    "error",
    "A Q to FP8 does not saturate.",
    "With saturate=0 ONNX turns a value beyond 448 scales into NaN. TensorRT ignores the attribute and saturates: the "
    "numbers silently differ.",
    "[probe] the same kernel with saturate 0 and 1; ONNX Runtime 1.32 returns NaN",
)
def _quantizer_does_not_saturate(view: GraphView) -> Iterator[Flaw]:
    """Name the Q."""
    for node in view.quantizers:
        if node.attributes.get_int("saturate", 1) or view.code_word(node) != "FP8":
            continue
        yield Flaw(
            node=name_of(node),
            message="saturate is 0: a value that is too large becomes NaN in ONNX, and the largest code in TensorRT",
            fix="leave out the attribute, or write saturate=1.",
        )


@register_rule(
    "QDQ137",
    "info",
    "A convolution in FP8 has one weight scale per output channel, in a graph of half precision.",
    "TensorRT-RTX converts the scales to float32, and the convolution writes float32: scale, bias and activation move "
    "to the kernel after it. With one scale for the weight the convolution does all of it and writes half precision. "
    "The scales of channels may be worth it: compare the accuracy.",
    "[probe] 'Converting conv weight scales to fp32', TensorRT-RTX 1.7; Conv and Relu write Float instead of Half",
)
def _convolution_has_channel_scales(view: GraphView) -> Iterator[Flaw]:
    """Name the convolution."""
    for node in view.select("Conv"):
        weight = view.dequantizer(node.inputs[1])
        if weight is None or not view.is_quantized(node.inputs[0]):
            continue
        scale = view.scale(weight)
        if view.code_word(weight) != "FP8" or scale is None or scale.size < 2:
            continue
        if view.dtype(node.inputs[1]) in _HALVES:
            yield Flaw(
                node=name_of(node),
                message=f"its FP8 weight has {scale.size} scales, so it writes float32, not half precision",
                fix="use one scale for the weight if the accuracy allows it.",
            )


@register_rule(
    "QDQ138",
    "info",
    "ONNX Runtime's default session changes the results of a file with FP8 Q/DQ.",
    "At its graph optimization levels EXTENDED and ALL, the default, ONNX Runtime takes zero point 0 for the smallest "
    "value of the type, as in uint8, and drops a Relu before a Q: negative values stay negative. It writes biases as "
    "int32, in units that half precision cannot hold. It moves a Transpose between a Q and its DQ, and has no "
    "Transpose of FP8. TensorRT is not affected. qdq runs such a file without these three.",
    "measured: ONNX Runtime 1.32 computes [-1.92, -0.96, 0.96, 1.92] from Relu and Q/DQ of [-2, -1, 1, 2]; a network "
    "of two convolutions has 0.6 dB against torch, and 133.9 dB at level BASIC",
)
def _runtime_changes_fp8(view: GraphView) -> Iterator[Flaw]:
    """Name the graph, once for all of its Q; weights of FP8 alone, without a Q, are safe."""
    if not any(_quantizes_to_fp8(view, node) for node in view.quantizers):
        return
    message = "ONNX Runtime's default session changes the results of its FP8 Q/DQ"
    relus = [name_of(node) for node in view.select("Relu") if _is_removed(view, node)]
    if relus:
        message += f", and lets negative values pass {list_names(relus, 3)}"
    yield Flaw(
        node=view.model.graph.name or "graph",
        message=message,
        fix="in ONNX Runtime set graph_optimization_level to ORT_ENABLE_BASIC and session.disable_quant_qdq to 1, and "
        "leave out the TransposeOptimizer; TensorRT needs no change.",
    )


def _is_removed(view: GraphView, relu: ir.Node) -> bool:
    """Whether Q to FP8 are all that reads a Relu, and it is not in half precision.

    ONNX Runtime keeps a Relu with another reader, and on a CPU one in half precision, which it casts.
    """
    output = relu.outputs[0]
    if output.is_graph_output() or view.dtype(output) in _HALVES:
        return False
    readers = list(view.reached(output, COPY_OPS | {"Identity"}))
    return bool(readers) and all(_quantizes_to_fp8(view, reader) for reader in readers)


def _quantizes_to_fp8(view: GraphView, node: ir.Node) -> bool:
    return is_op(node, "QuantizeLinear") and view.code_word(node) == "FP8"
