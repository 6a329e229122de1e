"""Pairs that are one-sided, useless or redundant: QDQ110, QDQ119, QDQ120 and QDQ130."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COPY_OPS, GraphView, is_op, name_of

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")


@register_rule(
    "QDQ110",
    "warning",
    "Only one of the two operands of a Conv, ConvTranspose, Gemm or MatMul is quantized (R-CONV-2).",
    "It runs in float, with extra kernels for the Q and DQ. A matrix product of float with int8 codes + DQ is "
    "weight-only quantization, which TensorRT fuses: an info.",
    "[probe] float convolution plus stand-alone quantize kernels (R-MM-4)",
)
def _one_operand_is_quantized(view: GraphView) -> Iterator[Flaw]:
    for node in view.weighted:
        first, second = (view.is_quantized(value) for value in node.inputs[:2])
        if first == second:
            continue
        if second and is_op(node, "Gemm", "MatMul") and _is_weight(view, node.inputs[1]):
            if not _has_float_source(view, node.inputs[1]):  # else QDQ130
                message = "weight-only: int8 weights, float arithmetic (R-WSTORE)"
                yield Flaw(
                    name_of(node),
                    message,
                    "quantize the input too if int8 arithmetic was meant.",
                    "info",
                )
            continue
        which = "input" if first else "weight"
        message = (
            f"only the {which} is quantized, so it runs in float with extra kernels (R-CONV-2)"
        )
        yield Flaw(name_of(node), message, "quantize both or none.")


@register_rule(
    "QDQ130",
    "warning",
    "A weight-only matrix product is written as float weight + Q + DQ (R-WSTORE).",
    "TensorRT folds that to a plain fp16 weight: nothing is saved. Only int8 codes + DQ keep the weight in int8.",
    "[probe] TensorRT-RTX fuses int8 + DQ only",
)
def _weight_only_is_float(view: GraphView) -> Iterator[Flaw]:
    for node in view.select("Gemm", "MatMul"):
        activation, weight = node.inputs[:2]
        if (
            view.is_quantized(activation)
            or not view.is_quantized(weight)
            or not _is_weight(view, weight)
        ):
            continue
        if _has_float_source(view, weight):
            message = (
                "weight-only from a float weight + Q + DQ, which is folded to float (R-WSTORE)"
            )
            yield Flaw(
                name_of(node),
                message,
                "store the weight as int8 codes + DQ, or quantize the input too.",
            )


def _is_weight(view: GraphView, value: ir.Value | None) -> bool:
    return not view.is_computed(value)


def _has_float_source(view: GraphView, value: ir.Value | None) -> bool:
    dequantizer = view.dequantizer(value)
    source = None if dequantizer is None else view.source(dequantizer.inputs[0], COPY_OPS)
    return source is not None and is_op(source, "QuantizeLinear")


@register_rule(
    "QDQ119",
    "warning",
    "Q/DQ of its own on a copy operator, a bias or an element-wise operator with a constant (R-COPY, R-MUL, R-BIAS).",
    "Nothing gets faster: Q and DQ pass through copy operators, and an element-wise operator with a constant is part "
    "of the product before it. Every pair rounds once more.",
    "[src] ModelOpt takes these operators out of its registry and skips constant operands",
)
def _pair_is_useless(view: GraphView) -> Iterator[Flaw]:
    for node in view.dequantizers:
        readers = view.readers(node.outputs[0])
        if not readers or node.outputs[0].is_graph_output():
            continue
        name = name_of(node)
        if not view.is_computed(node.inputs[0]):
            if view.dtype(node.inputs[0]) != ir.DataType.INT32:  # QDQ108
                yield from _check_constant(node, readers)
        elif all(_has_constant_operand(view, reader) for reader in readers):
            message = f"only {readers[0].op_type} with a constant reads it (R-MUL)"
            yield Flaw(
                name, message, "take the pair away: quantize the input of the next product instead."
            )
        elif all(is_op(reader, *COPY_OPS) for reader in readers):
            behind = list(view.reached(node.outputs[0], COPY_OPS))
            if behind and all(is_op(reader, "QuantizeLinear") for reader in behind):
                message = f"{readers[0].op_type} has a pair of its own before it, and another behind it (R-COPY)"
                yield Flaw(name, message, "keep one of the two: Q and DQ pass through it.")


def _check_constant(node: ir.Node, readers: list[ir.Node]) -> Iterator[Flaw]:
    if all(_is_bias(node, reader) for reader in readers):
        message = f"it quantizes the bias of {name_of(readers[0])} (R-BIAS)"
        yield Flaw(name_of(node), message, "leave the bias in float.")
    elif all(is_op(reader, *_ELEMENTWISE) for reader in readers):
        message = f"it quantizes a constant of {readers[0].op_type} {name_of(readers[0])} (R-MUL)"
        yield Flaw(name_of(node), message, "leave constants of element-wise operators in float.")


def _is_bias(node: ir.Node, reader: ir.Node) -> bool:
    third = is_op(reader, "Conv", "ConvTranspose", "Gemm") and len(reader.inputs) > 2
    return (
        third and reader.inputs[2] is node.outputs[0] and node.outputs[0] not in reader.inputs[:2]
    )


def _has_constant_operand(view: GraphView, node: ir.Node) -> bool:
    """Whether one operand is a plain constant; that of the erf GELU is QDQ118's."""
    if not is_op(node, *_ELEMENTWISE) or all(view.is_computed(value) for value in node.inputs):
        return False
    if any(view.is_quantized(value) for value in node.inputs if not view.is_computed(value)):
        return False  # the constant's own pair is what is said
    return not any(is_op(reader, "Erf") for reader in view.readers(node.outputs[0]))


@register_rule(
    "QDQ120",
    "info",
    "A Cast between Q/DQ and an operator, or one pair behind another (R-CAST, R-DBL, R-FAN).",
    "TensorRT folds equal pairs and most casts, so this is an info. Two pairs of different scale in a row are a "
    "rescale kernel: a warning.",
    "[probe] equal pairs collapse; [src] ModelOpt folds casts for FP8",
)
def _pair_is_redundant(view: GraphView) -> Iterator[Flaw]:
    for node in view.dequantizers:
        for reader in view.readers(node.outputs[0]):
            if is_op(reader, "Cast"):
                message = "it stands between a DQ and what reads it (R-CAST)"
                yield Flaw(
                    name_of(reader),
                    message,
                    "write the scale in the type wanted, and drop the Cast.",
                )
            elif is_op(reader, "QuantizeLinear") and view.is_computed(node.inputs[0]):
                yield from _check_double(view, node, reader)
    for node in view.quantizers:
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is not None and is_op(producer, "Cast") and view.is_computed(node.inputs[0]):
            message = "it stands in front of a Q (R-CAST)"
            yield Flaw(
                name_of(producer),
                message,
                "write the scale in the type of the tensor, and drop the Cast.",
            )
    yield from _find_duplicates(view)


def _check_double(view: GraphView, first: ir.Node, second: ir.Node) -> Iterator[Flaw]:
    scales = view.scale(first), view.scale(second)
    if scales[0] is None or scales[1] is None:
        return
    if np.array_equal(scales[0].ravel(), scales[1].ravel()):
        message = f"it quantizes again what {name_of(first)} gives, with the same scale (R-DBL)"
        yield Flaw(name_of(second), message, "take one pair away; --fix does.")
    else:
        message = f"it quantizes again what {name_of(first)} gives, with another scale (R-DBL)"
        yield Flaw(
            name_of(second), message, "take one pair away, or give both one scale.", "warning"
        )


def _find_duplicates(view: GraphView) -> Iterator[Flaw]:
    first: dict[tuple[ir.Value, bytes], ir.Node] = {}
    for node in view.quantizers:
        scale = view.scale(node)
        if node.inputs[0] is None or scale is None or not view.is_computed(node.inputs[0]):
            continue
        same = first.setdefault((node.inputs[0], scale.tobytes()), node)
        if same is not node:
            message = (
                f"it quantizes the same tensor as {name_of(same)}, with the same scale (R-FAN)"
            )
            yield Flaw(name_of(node), message, "let all readers share one pair; --fix does.")
