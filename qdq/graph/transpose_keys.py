"""Attention written out in single operators, in the form that torch gives `scaled_dot_product_attention`."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qdq.graph.pairs import constant_of, is_op


class TransposeKeys(ir.passes.InPlacePass):
    """MatMul(query, Transpose(key)) of four dimensions or more: the keys are transposed with all heads in one.

    TensorRT-RTX 1.7 takes the int8 product that makes query, key and value into a float kernel with the plain
    Transpose. With Reshape, Transpose, Reshape and a factor, as torch exports `scaled_dot_product_attention`, it stays
    int8; both the Reshapes and the factor are needed. No value changes: the factor is one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every such product whose sizes, but for the first, are known."""
        modified = False
        for product in list(model.graph):
            if is_op(product, "MatMul") and (transpose := _transpose_of_keys(product)) is not None:
                modified |= _rewrite(model.graph, product, transpose)
        return ir.passes.PassResult(model, modified=modified)


def _transpose_of_keys(product: ir.Node) -> ir.Node | None:
    """The Transpose of the last two dimensions in front of the second operand of a product of two computed tensors."""
    query, keys = product.inputs
    transpose = None if keys is None else keys.producer()
    if (
        query is None
        or constant_of(query) is not None
        or transpose is None
        or not is_op(transpose, "Transpose")
    ):
        return None
    perm = list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else []
    swapped = [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
    source = transpose.inputs[0]
    return (
        transpose
        if len(perm) > 3 and perm == swapped and source is not None and source.dtype
        else None
    )


def _rewrite(graph: ir.Graph, product: ir.Node, transpose: ir.Node) -> bool:
    source = transpose.inputs[0]
    assert source is not None and source.dtype is not None  # noqa: S101  # _transpose_of_keys has looked
    sizes = list(source.shape or ())[1:]
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    *middle, tokens, features = (int(size) for size in sizes if isinstance(size, int))
    name = product.outputs[0].name
    joined = _constant(graph, f"{name}.joined", np.array([-1, tokens, features]))
    split = _constant(graph, f"{name}.split", np.array([-1, *middle, features, tokens]))
    one = _constant(graph, f"{name}.one", np.array(1, source.dtype.numpy()))
    batch = source.shape[0] if source.shape is not None else None
    rows = batch * math.prod(middle) if isinstance(batch, int) else None
    steps: list[tuple[str, ir.Value | None, list[int], list[int | ir.SymbolicDim | None]]] = [
        ("Reshape", joined, [], [rows, tokens, features]),
        ("Transpose", None, [0, 2, 1], [rows, features, tokens]),
        ("Reshape", split, [], [batch, *middle, features, tokens]),
        ("Mul", one, [], [batch, *middle, features, tokens]),
    ]
    value = source
    for number, (op_type, operand, perm, shape) in enumerate(steps):
        node = ir.node(
            op_type,
            [value] if operand is None else [value, operand],
            attributes={"perm": perm} if perm else {},
            name=f"{product.name or name}/keys_{number}",
        )
        node.metadata_props.update(product.metadata_props)
        graph.insert_before(product, node)
        value = node.outputs[0]
        value.name, value.type = f"{name}.keys_{number}", ir.TensorType(source.dtype)
        value.shape = ir.Shape(shape)
    product.replace_input_with(1, value)
    if not transpose.outputs[0].uses() and not transpose.outputs[0].is_graph_output():
        graph.remove(transpose, safe=True)
    return True


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
