"""Pairs that are one-sided, useless or redundant: QDQ110, QDQ119, QDQ120 and QDQ130."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COPY_OPS, GraphView, has_only, is_op, name_of, producer_of
from qdq.graph.code_types import find_code_type

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")
_MATRIX_PRODUCTS = ("Gemm", "MatMul")
_PRODUCTS_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


@register_rule(
    "QDQ110",
    "warning",
    "A Conv, ConvTranspose, Gemm or MatMul with only one quantized operand, or with operands of two types (R-CONV-2).",
    "It runs in float, with extra kernels for the Q and DQ. A matrix product of float with stored codes + DQ is "
    "weight-only quantization, which TensorRT fuses for int8, int4 and FP8: an info.",
    "[probe] float convolution plus stand-alone quantize kernels (R-MM-4)",
)
def _one_operand_is_quantized(view: GraphView) -> Iterator[Flaw]:
    """Name the product.

    Weight-only products with a float weight are left to QDQ130.
    """
    for node in view.weighted:
        has_quantized_input = view.is_quantized(node.inputs[0])
        has_quantized_weight = view.is_quantized(node.inputs[1])
        if has_quantized_input == has_quantized_weight:
            yield from _check_types(view, node)
            continue
        if _is_weight_only(view, node):
            yield from _check_stored_weight(view, node)
            continue

        operand = "input" if has_quantized_input else "weight"
        yield Flaw(
            node=name_of(node),
            message=f"only the {operand} is quantized, so it runs in float with extra kernels (R-CONV-2)",
            fix="quantize both or none.",
        )


def _check_types(view: GraphView, product: ir.Node) -> Iterator[Flaw]:
    """A product whose operands have codes of two types; QDQ129 reports unsigned ones, which TensorRT reads as int8."""
    words: dict[str, None] = {}
    for value in product.inputs[:2]:
        dequantizer = view.dequantizer(value)
        if dequantizer is not None and find_code_type(dequantizer).multiplies:
            words[view.code_word(dequantizer)] = None
    if len(words) > 1:
        yield Flaw(
            node=name_of(product),
            message=f"its operands are {' and '.join(words)}, so it runs in float with extra kernels (R-CONV-2)",
            fix="quantize both to one type.",
        )


def _check_stored_weight(view: GraphView, product: ir.Node) -> Iterator[Flaw]:
    """A weight-only product with stored codes; QDQ130 reports those with a float weight."""
    if _has_float_source(view, product.inputs[1]):
        return
    dequantizer = view.dequantizer(product.inputs[1])
    word = view.code_word(dequantizer)
    if dequantizer is not None and not find_code_type(dequantizer).multiplies:
        fix = f"nothing, if float arithmetic is intended: TensorRT does not multiply in {word}."
    else:
        fix = f"quantize the input too if {word} arithmetic is intended."
    yield Flaw(
        node=name_of(product),
        message=f"weight-only: {word} weights, float arithmetic (R-WSTORE)",
        fix=fix,
        severity="info",
    )


@register_rule(
    "QDQ130",
    "warning",
    "A weight-only matrix product is written as float weight + Q + DQ (R-WSTORE).",
    "TensorRT folds that to a plain fp16 weight: nothing is saved. Only stored codes + DQ keep the weight narrow.",
    "[probe] TensorRT-RTX fuses int8 + DQ only",
)
def _weight_only_is_float(view: GraphView) -> Iterator[Flaw]:
    """Name the product."""
    for node in view.select(*_MATRIX_PRODUCTS):
        if not _is_weight_only(view, node):
            continue
        if _has_float_source(view, node.inputs[1]):
            word = view.code_word(view.dequantizer(node.inputs[1]))
            yield Flaw(
                node=name_of(node),
                message="weight-only from a float weight + Q + DQ, which is folded to float (R-WSTORE)",
                fix=f"store the weight as {word} codes + DQ, or quantize the input too.",
            )


def _is_weight_only(view: GraphView, node: ir.Node) -> bool:
    """Whether a matrix product has a quantized weight and a float input."""
    if not is_op(node, *_MATRIX_PRODUCTS):
        return False

    activation, weight = node.inputs[:2]
    if view.is_quantized(activation):
        return False
    if view.is_computed(weight):
        return False
    return view.is_quantized(weight)


def _has_float_source(view: GraphView, weight: ir.Value | None) -> bool:
    """Whether the codes of a weight come from a Q, and are not stored in the file."""
    dequantizer = view.dequantizer(weight)
    if dequantizer is None:
        return False
    source = view.source(dequantizer.inputs[0], COPY_OPS)
    return is_op(source, "QuantizeLinear")


@register_rule(
    "QDQ119",
    "warning",
    "Separate Q/DQ on a copy operator, a bias or an element-wise operator with a constant (R-COPY, R-MUL, R-BIAS).",
    "Nothing gets faster: Q and DQ pass through copy operators, and an element-wise operator with a constant is part "
    "of the product before it. Every pair adds a rounding.",
    "[src] ModelOpt removes these operators from its registry and skips constant operands",
)
def _pair_is_useless(view: GraphView) -> Iterator[Flaw]:
    """Name the DQ of the pair; QDQ124 reports pairs of outputs of the graph."""
    for node in view.dequantizers:
        readers = view.readers(node.outputs[0])
        if not readers:
            continue
        if node.outputs[0].is_graph_output():
            continue

        if view.is_computed(node.inputs[0]):
            yield from _check_pair_of_activation(view, node, readers)
        elif view.dtype(node.inputs[0]) != ir.DataType.INT32:  # QDQ108
            yield from _check_constant(node, readers)


def _check_pair_of_activation(
    view: GraphView, dequantizer: ir.Node, readers: list[ir.Node]
) -> Iterator[Flaw]:
    """A pair that only an element-wise operator with a constant reads, or a copy operator with a pair after it.

    Args:
        view: The graph.
        dequantizer: The DQ of the pair.
        readers: The nodes that read its output, at least one.
    """
    if all(_has_plain_constant(view, reader) for reader in readers):
        yield Flaw(
            node=name_of(dequantizer),
            message=f"only {readers[0].op_type} with a constant reads it (R-MUL)",
            fix="remove the pair: quantize the input of the next product instead.",
        )
        return

    if not has_only(readers, *COPY_OPS):
        return
    readers_of_copies = list(view.reached(dequantizer.outputs[0], COPY_OPS))
    if not readers_of_copies:
        return
    if has_only(readers_of_copies, "QuantizeLinear"):
        yield Flaw(
            node=name_of(dequantizer),
            message=f"{readers[0].op_type} has a separate pair before it, and another after it (R-COPY)",
            fix="keep one of the two: Q and DQ pass through it.",
        )


def _has_plain_constant(view: GraphView, node: ir.Node) -> bool:
    """Whether one operand of an element-wise operator is a constant without a pair."""
    if not is_op(node, *_ELEMENTWISE):
        return False
    if not view.has_constant_input(node):
        return False

    for value in node.inputs:
        if view.is_computed(value):
            continue
        if view.is_quantized(value):  # the pair of the constant is reported instead
            return False
    return not _starts_gelu(view, node)


def _starts_gelu(view: GraphView, node: ir.Node) -> bool:
    """Whether a node computes x / sqrt 2 of an erf GELU, which QDQ118 reports."""
    return any(is_op(reader, "Erf") for reader in view.readers(node.outputs[0]))


def _check_constant(dequantizer: ir.Node, readers: list[ir.Node]) -> Iterator[Flaw]:
    """A constant that only products add as a bias, or that only element-wise operators read.

    Args:
        dequantizer: The DQ of the constant.
        readers: The nodes that read its output, at least one.
    """
    reader = readers[0]
    if all(_is_bias(dequantizer, reader) for reader in readers):
        yield Flaw(
            node=name_of(dequantizer),
            message=f"it quantizes the bias of {name_of(reader)} (R-BIAS)",
            fix="leave the bias in float.",
        )
    elif has_only(readers, *_ELEMENTWISE):
        yield Flaw(
            node=name_of(dequantizer),
            message=f"it quantizes a constant of {reader.op_type} {name_of(reader)} (R-MUL)",
            fix="leave constants of element-wise operators in float.",
        )


def _is_bias(dequantizer: ir.Node, reader: ir.Node) -> bool:
    """Whether a product reads a DQ as its bias, and not as an operand."""
    if not is_op(reader, *_PRODUCTS_WITH_BIAS):
        return False

    value = dequantizer.outputs[0]
    positions = [position for position, operand in enumerate(reader.inputs) if operand is value]
    return positions == [2]


@register_rule(
    "QDQ120",
    "info",
    "A Cast between Q/DQ and an operator, or two pairs in a row (R-CAST, R-DBL, R-FAN).",
    "TensorRT folds equal pairs and most casts, so this is an info. Two pairs of different scale in a row become a "
    "rescale kernel: a warning.",
    "[probe] equal pairs collapse; [src] ModelOpt folds casts for FP8",
)
def _pair_is_redundant(view: GraphView) -> Iterator[Flaw]:
    """Name the Cast, the second Q in a row, or the Q with the same tensor and scale as another one."""
    for dequantizer in view.dequantizers:
        for reader in view.readers(dequantizer.outputs[0]):
            yield from _check_reader(view, dequantizer, reader)
    for quantizer in view.quantizers:
        yield from _check_producer(view, quantizer)
    yield from _find_duplicates(view)


def _check_reader(view: GraphView, dequantizer: ir.Node, reader: ir.Node) -> Iterator[Flaw]:
    """A Cast or a second pair after a DQ."""
    if is_op(reader, "Cast"):
        yield Flaw(
            node=name_of(reader),
            message="it is between a DQ and its reader (R-CAST)",
            fix="write the scale in the type that is needed, and drop the Cast.",
        )
    elif is_op(reader, "QuantizeLinear") and view.is_computed(dequantizer.inputs[0]):
        yield from _check_second_pair(view, dequantizer, reader)


def _check_producer(view: GraphView, quantizer: ir.Node) -> Iterator[Flaw]:
    """A Cast before a Q; a Cast of a constant costs nothing."""
    tensor = quantizer.inputs[0]
    producer = producer_of(tensor)
    if not is_op(producer, "Cast"):
        return
    if view.is_computed(tensor):
        yield Flaw(
            node=name_of(producer),
            message="it is before a Q (R-CAST)",
            fix="write the scale in the type of the tensor, and drop the Cast.",
        )


def _check_second_pair(view: GraphView, dequantizer: ir.Node, quantizer: ir.Node) -> Iterator[Flaw]:
    """A Q that reads a DQ: with equal scales nothing changes, with different ones TensorRT adds a kernel."""
    first, second = view.scale(dequantizer), view.scale(quantizer)
    if first is None or second is None:
        return

    if np.array_equal(first.ravel(), second.ravel()):
        yield Flaw(
            node=name_of(quantizer),
            message=f"it quantizes the output of {name_of(dequantizer)} again, with the same scale (R-DBL)",
            fix="remove one pair; --fix does this.",
        )
    else:
        yield Flaw(
            node=name_of(quantizer),
            message=f"it quantizes the output of {name_of(dequantizer)} again, with another scale (R-DBL)",
            fix="remove one pair, or give both one scale.",
            severity="warning",
        )


def _find_duplicates(view: GraphView) -> Iterator[Flaw]:
    """Pairs with the same scale on one tensor."""
    firsts: dict[tuple[ir.Value, bytes], ir.Node] = {}
    for node in view.quantizers:
        tensor, scale = node.inputs[0], view.scale(node)
        if tensor is None or scale is None:
            continue
        if not view.is_computed(tensor):  # a weight
            continue

        first = firsts.setdefault((tensor, scale.tobytes()), node)
        if first is not node:
            yield Flaw(
                node=name_of(node),
                message=f"it quantizes the same tensor as {name_of(first)}, with the same scale (R-FAN)",
                fix="let all readers share one pair; --fix does this.",
            )
