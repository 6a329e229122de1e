"""Rewrite attention in single operators in the form that torch exports for `scaled_dot_product_attention`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdq.graph.edits import add_initializer, remove_if_unread
from qdq.graph.pairs import constant_of, is_op, producer_of

_Shape = list[int | ir.SymbolicDim | None]


class TransposeKeys(ir.passes.InPlacePass):
    """In MatMul(query, Transpose(key)) of four or more dimensions, transpose the keys with all heads merged.

    With the plain Transpose, TensorRT-RTX 1.7 fuses the int8 product that computes query, key and value into a float
    kernel. With Reshape, Transpose, Reshape and a factor, as torch exports `scaled_dot_product_attention`, it stays
    int8; both the Reshapes and the factor are needed. No value changes: the factor is one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every such product whose sizes, except the first, are known."""
        modified = False
        for node in list(model.graph):
            if not is_op(node, "MatMul"):
                continue

            transpose = _transpose_of_keys(node)
            if transpose is None:
                continue

            keys = _read_keys(transpose)
            if keys is not None:
                _rewrite(model.graph, node, keys)
                remove_if_unread(transpose)
                modified = True

        return ir.passes.PassResult(model, modified=modified)


@dataclass(frozen=True)
class _Keys:
    """The keys of an attention, of shape `[batch, *heads, tokens, features]`.

    Args:
        value: The keys.
        dtype: Their type.
        batch: Their first size, which may be dynamic.
        heads: The sizes between the first and the last two.
        tokens: Number of tokens.
        features: Number of features of a head.
    """

    value: ir.Value
    dtype: ir.DataType
    batch: int | ir.SymbolicDim
    heads: list[int]
    tokens: int
    features: int

    @property
    def rows(self) -> int | None:
        """The product of batch and heads; None for a dynamic batch."""
        if not isinstance(self.batch, int):
            return None
        return self.batch * math.prod(self.heads)


def _transpose_of_keys(product: ir.Node) -> ir.Node | None:
    """The Transpose before the second operand of a product of two computed tensors.

    Returns:
        None if there is none, or if it does not just swap the last two of four or more dimensions.
    """
    query, keys = product.inputs
    transpose = producer_of(keys)
    if query is None or constant_of(query) is not None:
        return None
    if not is_op(transpose, "Transpose"):
        return None

    permutation = list(transpose.attributes.get_ints("perm", ()))
    rank = len(permutation)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if rank < 4 or permutation != swapped:
        return None
    return transpose


def _read_keys(transpose: ir.Node) -> _Keys | None:
    """The input of a Transpose with its sizes.

    Args:
        transpose: From `_transpose_of_keys`.

    Returns:
        None unless its type and all sizes except the first are known, because the Reshapes need them.
    """
    value = transpose.inputs[0]
    if value is None or not value.dtype or not value.shape:
        return None

    batch, *inner_sizes = value.shape
    sizes = []
    for size in inner_sizes:
        if not isinstance(size, int) or size <= 0:
            return None
        sizes.append(size)
    if len(sizes) < 2:
        return None

    *heads, tokens, features = sizes
    return _Keys(value, value.dtype, batch, heads, tokens, features)


@dataclass(frozen=True)
class _Step:
    """A node between the keys and the product.

    Args:
        op_type: Its operator.
        operand: Its second input; None for a Transpose.
        dtype: Type of its output.
        shape: Shape of its output; None for a size that is not known.
    """

    op_type: str
    operand: ir.Value | None
    dtype: ir.DataType
    shape: _Shape


def _rewrite(graph: ir.Graph, product: ir.Node, keys: _Keys) -> None:
    """Let a product read its keys through Reshape, Transpose, Reshape and Mul."""
    name = product.outputs[0].name
    tokens = keys.tokens
    features = keys.features
    joined = add_initializer(graph, f"{name}.joined", np.array([-1, tokens, features]))
    split = add_initializer(graph, f"{name}.split", np.array([-1, *keys.heads, features, tokens]))
    unit_factor = add_initializer(graph, f"{name}.one", np.array(1, keys.dtype.numpy()))

    output_shape: _Shape = [keys.batch, *keys.heads, features, tokens]
    steps = [
        _Step("Reshape", joined, keys.dtype, [keys.rows, tokens, features]),
        _Step("Transpose", None, keys.dtype, [keys.rows, features, tokens]),
        _Step("Reshape", split, keys.dtype, output_shape),
        _Step("Mul", unit_factor, keys.dtype, output_shape),
    ]
    value = keys.value
    for number, step in enumerate(steps):
        value = _insert_step(graph, product, value, step, f"keys_{number}")

    product.replace_input_with(1, value)


def _insert_step(
    graph: ir.Graph, product: ir.Node, value: ir.Value, step: _Step, suffix: str
) -> ir.Value:
    """Insert a node before a product.

    Args:
        graph: The graph.
        product: The product.
        value: First input of the new node.
        step: The new node.
        suffix: End of its name.

    Returns:
        The output of the new node.
    """
    inputs = [value]
    attributes = {}
    if step.operand is not None:
        inputs.append(step.operand)
    if step.op_type == "Transpose":
        attributes["perm"] = [0, 2, 1]

    output_name = product.outputs[0].name
    node = ir.node(
        step.op_type,
        inputs,
        attributes=attributes,
        name=f"{product.name or output_name}/{suffix}",
    )
    node.metadata_props.update(product.metadata_props)
    graph.insert_before(product, node)

    output = node.outputs[0]
    output.name = f"{output_name}.{suffix}"
    output.type = ir.TensorType(step.dtype)
    output.shape = ir.Shape(step.shape)
    return output
