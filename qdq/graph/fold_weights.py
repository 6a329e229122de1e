"""Make weights constant that a forward computes from parameters alone, such as weight standardization."""

from __future__ import annotations

import sys

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from qdq.graph.pairs import COPY_OPS, QDQ_OPS, constant_of, is_op
from qdq.graph.work import WEIGHTED_OPS


class FoldWeights(ir.passes.InPlacePass):
    """Fold the nodes that compute a weight, or the input of its Q, from initializers only.

    TensorRT takes weights for int8 only as constants (R-WSTORE); the exporter leaves large ones to be computed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in the main graph."""
        nodes: set[ir.Node] = set()
        for weight in _list_weights(model.graph):
            nodes |= _nodes_that_compute(weight)

        if not nodes:
            return ir.passes.PassResult(model, modified=False)

        result = fold_constants(
            model,
            onnx_shape_inference=False,
            output_size_limit=sys.maxsize,
            should_fold=nodes.__contains__,
        )
        return ir.passes.PassResult(model, modified=result.modified)


def _list_weights(graph: ir.Graph) -> list[ir.Value | None]:
    """The values that TensorRT may need as constants.

    They are the inputs of every Q, and the second operands of products, which are weights or activations.

    Args:
        graph: The main graph.
    """
    weights = []
    for node in graph:
        if is_op(node, "QuantizeLinear"):
            weights.append(node.inputs[0])
        elif is_op(node, *WEIGHTED_OPS):
            weights.append(node.inputs[1])

    return weights


def _nodes_that_compute(weight: ir.Value | None) -> set[ir.Node]:
    """The nodes that compute a value from constants.

    Args:
        weight: An input of a Q or of a product.

    Returns:
        Nothing if an input of the graph or a Q/DQ is among the sources: Q/DQ are never folded. Nothing either if a
        parameter is only moved: it stays a parameter, because other nodes may read it too.
    """
    nodes: set[ir.Node] = set()
    pending = [weight]
    while pending:
        value = pending.pop()
        if value is None or constant_of(value) is not None:
            continue

        node = value.producer()
        if node is None or is_op(node, *QDQ_OPS):
            return set()
        if node not in nodes:
            nodes.add(node)
            pending.extend(node.inputs)

    if all(is_op(node, "Cast", *COPY_OPS) for node in nodes):
        return set()
    return nodes
