"""Weights that a forward computes from parameters alone, as weight standardization does, made constant."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from qdq.graph.pairs import COPY_OPS, constant_of, is_op


class FoldWeights(ir.passes.InPlacePass):
    """Nodes that lead from initializers to a weight, or to the Q of one, and read no input, are computed now.

    TensorRT takes weights for int8 only as constants (R-WSTORE); the exporter leaves large ones to be computed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in the main graph."""
        nodes = {node for value in _list_weights(model.graph) for node in _computing(value)}
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        result = fold_constants(
            model,
            onnx_shape_inference=False,
            output_size_limit=sys.maxsize,
            should_fold=nodes.__contains__,
        )
        return ir.passes.PassResult(model, modified=result.modified)


def _list_weights(graph: ir.Graph) -> Iterator[ir.Value | None]:
    for node in graph:
        if is_op(node, "QuantizeLinear"):
            yield node.inputs[0]
        elif is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            yield node.inputs[1]


def _computing(weight: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes that make a value, if all that they start from is constant.

    Q/DQ are never computed away, and a parameter that is only moved stays one: others may read it too.
    """
    found: dict[ir.Node, None] = {}
    values = [weight]
    while values:
        value = values.pop()
        if value is None or constant_of(value) is not None:
            continue
        node = value.producer()
        if node is None or is_op(node, "QuantizeLinear", "DequantizeLinear"):
            return
        if node not in found:
            found[node] = None
            values.extend(node.inputs)
    if not all(is_op(node, "Cast", *COPY_OPS) for node in found):
        yield from found
