"""Element types and operators that TensorRT does not read: QDQ107, QDQ108 and QDQ121."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView, is_op, name_of
from qdq.graph.opset import FIRST_WITH_HALF_SCALES

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (*_HALVES, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_FIRST_MIXED_OPSET = 23  # input and scale of Q/DQ may differ in type
_INTEGER_OPS = (
    "DynamicQuantizeLinear",
    "QGemm",
    "QAttention",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
)
_DOMAINS_OF_INTEGER_OPS = ("", "com.microsoft")


@register_rule(
    "QDQ107",
    "error",
    "The operands of a product have different float types, or fp16 Q/DQ are in a file below opset 19 (R-CONV-2).",
    "TensorRT 11 is strongly typed: the type of a DQ's output is that of its scale, and it must be that of the other "
    "operand and of the bias.",
    "[probe] 'input and kernel must be of same type'; [src] onnxOpImporters.cpp",
)
def _types_differ(view: GraphView) -> Iterator[Flaw]:
    """Name the product with the operands, or the Q or DQ with the scale."""
    for node in view.weighted:
        yield from _check_operands(view, node)
    for node in [*view.quantizers, *view.dequantizers]:
        yield from _check_scale_type(view, node)


def _check_operands(view: GraphView, node: ir.Node) -> Iterator[Flaw]:
    """Whether the operands and the bias of a product have one float type, as far as types are known.

    Args:
        view: The graph.
        node: A weighted node.
    """
    dtypes = [view.dtype(value) for value in node.inputs if value is not None]
    floats = set(dtypes).intersection(_FLOATS)
    if len(floats) > 1:
        names = ", ".join(map(_type_name, dtypes))
        yield Flaw(
            node=name_of(node),
            message=f"its operands are {names}; TensorRT requires one type",
            fix="write scales and bias in the type of the other operands.",
        )


def _type_name(dtype: ir.DataType | None) -> str:
    return "?" if dtype is None else dtype.name


def _check_scale_type(view: GraphView, node: ir.Node) -> Iterator[Flaw]:
    """Whether the opset allows the type of the scale.

    Half precision needs opset 19. A type other than that of the tensor needs opset 23.
    """
    scale = view.dtype(node.inputs[1])
    has_no_halves = 0 < view.opset < FIRST_WITH_HALF_SCALES
    if scale in _HALVES and has_no_halves:
        yield Flaw(
            node=name_of(node),
            message=f"its scale is {scale.name}, which opset {view.opset} does not have",
            fix="export at opset 19 or later.",
        )
        return

    if view.opset >= _FIRST_MIXED_OPSET:
        return
    if node.op_type != "QuantizeLinear":  # the input of a DQ has the type of codes
        return
    tensor = view.dtype(node.inputs[0])
    if tensor not in _FLOATS or scale not in _FLOATS:
        return

    if tensor != scale:
        yield Flaw(
            node=name_of(node),
            message=f"it quantizes {tensor.name} with a scale of {scale.name}",
            fix="write the scale in the type of the tensor.",
        )


@register_rule(
    "QDQ108",
    "error",
    "A DQ of int32 (a quantized bias), or an operator of integer arithmetic (R-BIAS).",
    "TensorRT reads int8 as Q/DQ around float operators. An int32 DQ is a parse error; QLinear*, *Integer and "
    "DynamicQuantizeLinear are not imported.",
    "[probe] 'has type Int32 but must have type ...'; [iss] onnx-tensorrt 850",
)
def _operator_is_unsupported(view: GraphView) -> Iterator[Flaw]:
    """Name the DQ of int32, or the operator."""
    for node in view.dequantizers:
        if view.dtype(node.inputs[0]) == ir.DataType.INT32:
            yield Flaw(
                node=name_of(node),
                message="it dequantizes int32, a quantized bias (R-BIAS)",
                fix="leave the bias in float: QuantizeBias=False in ONNX Runtime's extra_options.",
            )
    for node in view.nodes:
        if _is_integer_operator(node):
            yield Flaw(
                node=name_of(node),
                message=f"TensorRT does not import {node.op_type} (R-BIAS)",
                fix="write Q/DQ around the float operator: quant_format=QuantFormat.QDQ in ONNX Runtime.",
            )


def _is_integer_operator(node: ir.Node) -> bool:
    """Whether an operator of ONNX or ONNX Runtime computes with integers instead of Q/DQ."""
    if node.domain not in _DOMAINS_OF_INTEGER_OPS:
        return False

    if "Integer" in node.op_type or node.op_type.startswith("QLinear"):
        return True
    return node.op_type in _INTEGER_OPS


@register_rule(
    "QDQ121",
    "info",
    "The float part of a quantized file is fp32.",
    "TensorRT 11 runs float32 parts in float32. Such a file is often slower than a plain fp16 engine. TensorRT 10 can "
    "be built with --int8 --fp16, so this is an info: a file does not show its target.",
    "[doc] TensorRT 11 migration guide; [iss] ultralytics 26159",
)
def _float_part_is_fp32(view: GraphView) -> Iterator[Flaw]:
    """Name the graph, once for all of its operators."""
    if not view.qdq_nodes:
        return

    dtypes = []
    for node in view.nodes:
        if _computes_floats(view, node):
            dtypes.append(node.outputs[0].dtype)

    fp32 = dtypes.count(ir.DataType.FLOAT)
    if fp32:
        yield Flaw(
            node=view.model.graph.name or "graph",
            message=f"{fp32} of {len(dtypes)} float operators are fp32, and TensorRT 11 runs them in fp32",
            fix="write the float part in fp16 for TensorRT 11; on TensorRT 10 build with --fp16.",
        )


def _computes_floats(view: GraphView, node: ir.Node) -> bool:
    """Whether a node computes float values from the model's inputs.

    Q, DQ and Cast do not count: they are part of int8 operators, or only change the type.
    """
    if not node.outputs:
        return False
    if not view.is_computed(node.outputs[0]):
        return False
    if is_op(node, "QuantizeLinear", "DequantizeLinear", "Cast", "Constant"):
        return False
    return node.outputs[0].dtype in _FLOATS
