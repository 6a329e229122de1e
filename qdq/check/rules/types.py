"""Element types and operators that TensorRT does not read: QDQ107, QDQ108 and QDQ121."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView, is_op, name_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_FIRST_HALF_OPSET = 19
_FIRST_MIXED_OPSET = 23
_MICROSOFT_INTEGER_OPS = ("QGemm", "QAttention", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")


@register_rule(
    "QDQ107",
    "error",
    "The operands of a product have different float types, or fp16 Q/DQ stand in a file below opset 19 (R-CONV-2).",
    "TensorRT 11 is strongly typed: the type of a DQ's output is that of its scale, and it must be that of the other "
    "operand and of the bias.",
    "[probe] 'input and kernel must be of same type'; [src] onnxOpImporters.cpp",
)
def _types_differ(view: GraphView) -> Iterator[Flaw]:
    for node in view.weighted:
        found = [view.dtype(value) for value in node.inputs if value is not None]
        known = [dtype for dtype in found if dtype in _FLOATS]
        if len(set(known)) > 1:
            names = ", ".join("?" if dtype is None else dtype.name for dtype in found)
            message = f"its operands are {names}; TensorRT wants one type"
            yield Flaw(
                name_of(node), message, "write scales and bias in the type of the other operands."
            )
    for node in [*view.quantizers, *view.dequantizers]:
        scale = view.dtype(node.inputs[1])
        if (
            scale in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            and 0 < view.opset < _FIRST_HALF_OPSET
        ):
            message = f"its scale is {scale.name}, which opset {view.opset} does not have"
            yield Flaw(name_of(node), message, "export at opset 19 or later.")
        elif node.op_type == "QuantizeLinear" and view.opset < _FIRST_MIXED_OPSET:
            values = view.dtype(node.inputs[0])
            if values in _FLOATS and scale in _FLOATS and values != scale:
                message = f"it quantizes {values.name} with a scale of {scale.name}"
                yield Flaw(name_of(node), message, "write the scale in the type of the tensor.")


@register_rule(
    "QDQ108",
    "error",
    "A DQ of int32 (a quantized bias), or an operator of integer arithmetic (R-BIAS).",
    "TensorRT reads int8 as Q/DQ around float operators. An int32 DQ is a parse error, QLinear*, *Integer and "
    "DynamicQuantizeLinear are not imported.",
    "[probe] 'has type Int32 but must have type ...'; [iss] onnx-tensorrt 850",
)
def _operator_is_unsupported(view: GraphView) -> Iterator[Flaw]:
    for node in view.dequantizers:
        if view.dtype(node.inputs[0]) == ir.DataType.INT32:
            fix = "leave the bias in float: QuantizeBias=False in ONNX Runtime's extra_options."
            yield Flaw(name_of(node), "it dequantizes int32, a quantized bias (R-BIAS)", fix)
    for node in view.nodes:
        known = node.domain in ("", "com.microsoft")
        integer = "Integer" in node.op_type or node.op_type.startswith("QLinear")
        if known and (
            integer or node.op_type in ("DynamicQuantizeLinear", *_MICROSOFT_INTEGER_OPS)
        ):
            fix = "write Q/DQ around the float operator: quant_format=QuantFormat.QDQ in ONNX Runtime."
            yield Flaw(name_of(node), f"TensorRT does not import {node.op_type} (R-BIAS)", fix)


@register_rule(
    "QDQ121",
    "info",
    "The float rest of a quantized file is fp32.",
    "TensorRT 11 runs what is float32 in the file in float32. Such a file is often slower than a plain fp16 engine. "
    "TensorRT 10 can be told --int8 --fp16, so this is an info: a file does not say its target.",
    "[doc] TensorRT 11 migration guide; [iss] ultralytics 26159",
)
def _rest_is_fp32(view: GraphView) -> Iterator[Flaw]:
    if not view.quantizers + view.dequantizers:
        return
    nodes = [
        n
        for n in view.nodes
        if n.outputs and view.is_computed(n.outputs[0]) and not _is_int8_member(n)
    ]
    floats = [n for n in nodes if n.outputs[0].dtype in _FLOATS]
    fp32 = [n for n in floats if n.outputs[0].dtype == ir.DataType.FLOAT]
    if fp32:
        name = view.model.graph.name or "graph"
        message = f"{len(fp32)} of {len(floats)} float operators are fp32, and TensorRT 11 runs them in fp32"
        yield Flaw(
            name,
            message,
            "write the float part in fp16 for TensorRT 11; on TensorRT 10 build with --fp16.",
        )


def _is_int8_member(node: ir.Node) -> bool:
    return is_op(node, "QuantizeLinear", "DequantizeLinear", "Cast", "Constant")
