"""What the parser of TensorRT does not import: operators, options of operators and element types; QDQ131 and QDQ132.

The lists were measured: the parser of TensorRT-RTX 1.7 read the example graphs of every operator in onnx 1.23, and
constants, inputs and casts of every type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView, is_op, name_of
from qdq.graph.pairs import QDQ_OPS, constant_of, input_of

_NOT_IMPORTED = frozenset(
    {
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CausalConvWithState",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "CumProd",
        "DFT",
        "Det",
        "ImageDecoder",
        "LinearAttention",
        "MaxUnpool",
        "MelWeightMatrix",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    }
)
# TensorRT has plugins for them, TensorRT-RTX has none.
_PLUGINS = frozenset({"DeformConv", "NonZero", "RoiAlign"})
_FIXES = {
    "DFT": "multiply by the matrix of the transform, a constant, in the model; or transform before the model.",
    "DeformConv": "build with TensorRT, or leave this part to the caller.",
    "RoiAlign": "build with TensorRT, or export the model without it and leave it to the caller.",
    "NonZero": "use a mask of a fixed shape, or leave this part to the caller.",
}
_OTHER_FIX = "replace it in the model before the export, or leave this part to the caller."

_READABLE = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.BOOL,
        ir.DataType.INT4,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT4E2M1,
    }
)


@register_rule(
    "QDQ131",
    "error",
    "An operator, or an option of one, that TensorRT does not import.",
    "The parser refuses the whole file, also if the node computes a constant. A few operators need a plugin that "
    "TensorRT has and TensorRT-RTX does not: a warning.",
    "[probe] the parser of TensorRT-RTX 1.7 on the example graphs of onnx 1.23 for each operator",
)
def _operator_is_not_imported(view: GraphView) -> Iterator[Flaw]:
    """Name the node. Operators of integer arithmetic are those of QDQ108."""
    for node in view.nodes:
        if is_op(node, *_NOT_IMPORTED):
            yield Flaw(
                node=name_of(node),
                message=f"TensorRT does not import {node.op_type}",
                fix=_FIXES.get(node.op_type, _OTHER_FIX),
            )
        elif is_op(node, *_PLUGINS):
            yield Flaw(
                node=name_of(node),
                message=f"TensorRT-RTX does not import {node.op_type}, for which TensorRT has a plugin",
                fix=_FIXES[node.op_type],
                severity="warning",
            )
    for op_type, find_fault in _OPTIONS.items():
        for node in view.select(op_type):
            fault = find_fault(node)
            if fault:
                yield Flaw(
                    node=name_of(node),
                    message=f"TensorRT does not import {op_type} with {fault}",
                    fix="choose another option in the model before the export.",
                )


def _find_dilation(node: ir.Node) -> str:
    """A pooling whose pixels have gaps between them."""
    dilations = node.attributes.get_ints("dilations", [1])
    return "" if set(dilations) == {1} else f"dilations {list(dilations)}"


def _find_second_output(node: ir.Node) -> str:
    """A second output, such as the indices of a MaxPool."""
    used = [output for output in node.outputs if output.name]
    return "" if len(used) < 2 else "more than one output"


def _find_pooling_fault(node: ir.Node) -> str:
    return _find_dilation(node) or _find_second_output(node)


def _find_smoothing(node: ir.Node) -> str:
    return "antialias" if node.attributes.get_int("antialias", 0) else ""


def _find_reduction(node: ir.Node) -> str:
    reduction = node.attributes.get_string("reduction", "none")
    return "" if reduction == "none" else f"reduction {reduction!r}"


def _find_computed_step(node: ir.Node) -> str:
    is_constant = constant_of(input_of(node, 1)) is not None
    return "" if is_constant else "a frame_step that is no initializer"


_OPTIONS: dict[str, Callable[[ir.Node], str]] = {
    "AveragePool": _find_dilation,
    "LpPool": _find_dilation,
    "MaxPool": _find_pooling_fault,
    "LayerNormalization": _find_second_output,
    "Resize": _find_smoothing,
    "ScatterND": _find_reduction,
    "STFT": _find_computed_step,
}


@register_rule(
    "QDQ132",
    "error",
    "A constant, an input or a Cast of an element type that TensorRT does not read.",
    "The parser refuses the whole file. It reads float32, float16, bfloat16, float64, int8, uint8, int32, int64, bool, "
    "int4, float8e4m3fn and float4e2m1, and no other type.",
    "[probe] 'Failed to convert ONNX date type to TensorRT data type', TensorRT-RTX 1.7, for every type of onnx 1.23",
)
def _type_is_not_read(view: GraphView) -> Iterator[Flaw]:
    """Name the constant, the input, or the Cast. Codes and zero points have rules of their own."""
    graph = view.model.graph
    for value in [*graph.inputs, *graph.initializers.values()]:
        tensor = value.const_value
        dtype = value.dtype if tensor is None else tensor.dtype
        yield from _check_type(value, dtype, value.name or "a nameless value", "it is of type")
    for node in view.select("Constant"):
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        dtype = None if tensor is None else tensor.dtype
        yield from _check_type(node.outputs[0], dtype, name_of(node), "it is of type")
    for node in view.select("Cast"):
        dtype = ir.DataType(node.attributes["to"].as_int())
        yield from _check_type(node.outputs[0], dtype, name_of(node), "it casts to")


def _check_type(value: ir.Value, dtype: ir.DataType | None, name: str, verb: str) -> Iterator[Flaw]:
    """Whether TensorRT reads a type.

    Args:
        value: The value that has it.
        dtype: The type; None if it is not known.
        name: Of the value or node, for the finding.
        verb: For the message.
    """
    if dtype is None or dtype in _READABLE or dtype == ir.DataType.UNDEFINED:
        return
    readers = [node for node, _ in value.uses()]
    if readers and all(is_op(reader, *QDQ_OPS) for reader in readers):
        return
    yield Flaw(
        node=name,
        message=f"{verb} {dtype.name}, which TensorRT does not read",
        fix="use int32, int64 or float32 in the model before the export.",
    )
