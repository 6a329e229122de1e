"""Make weights and biases of attention constant that a forward computes from parameters alone.

Weight standardization computes such weights. The relative position biases and the masks of Swin are such biases.
"""

from __future__ import annotations

import math
import sys

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from qdq.graph.pairs import COPY_OPS, QDQ_OPS, constant_of, is_op
from qdq.graph.work import WEIGHTED_OPS

# Of a bias: Swin at 384 pixels has masks of 1.3 million, and a model for long texts would have gigabytes.
_MOST_ELEMENTS = 2**21


class FoldWeights(ir.passes.InPlacePass):
    """Fold the nodes that compute a weight, the input of its Q or a bias of attention from initializers only.

    TensorRT takes weights for int8 only as constants (R-WSTORE), and it does not fuse attention with a bias that is
    gathered from a table (R-MHA-3). The exporter leaves large ones to be computed. A bias with more than 2^21 elements
    stays so.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in the main graph."""
        nodes: set[ir.Node] = set()
        for weight in _list_weights(model.graph):
            computing = _nodes_that_compute(weight)
            # A parameter that is only moved stays a parameter, because other nodes may read it too.
            if not all(is_op(node, "Cast", *COPY_OPS) for node in computing):
                nodes |= computing
        for bias in _list_biases(model.graph):
            if _has_few_elements(bias):
                nodes |= _nodes_that_compute(bias)

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


def _list_biases(graph: ir.Graph) -> list[ir.Value | None]:
    """What is added in front of each softmax, directly or before reshapes: the scores of attention, biases and masks.

    Args:
        graph: The main graph.
    """
    biases: list[ir.Value | None] = []
    visited: set[ir.Node] = set()
    pending = [node.inputs[0] for node in graph if is_op(node, "Softmax")]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is None or node in visited:
            continue
        visited.add(node)
        if is_op(node, "Add"):
            biases += node.inputs
            pending += node.inputs
        elif is_op(node, "Cast", *COPY_OPS):
            pending.append(node.inputs[0])
    return biases


def _has_few_elements(value: ir.Value | None) -> bool:
    """Whether the size of a value is known, and small enough for a constant in the file."""
    if value is None or value.shape is None or not value.shape.is_static():
        return False
    return math.prod(value.shape.numpy()) <= _MOST_ELEMENTS


def _nodes_that_compute(value: ir.Value | None) -> set[ir.Node]:
    """The nodes that compute a value from constants.

    Args:
        value: Any value.

    Returns:
        Nothing if an input of the graph or a Q/DQ is among the sources: Q/DQ are never folded.
    """
    nodes: set[ir.Node] = set()
    pending = [value]
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

    return nodes
