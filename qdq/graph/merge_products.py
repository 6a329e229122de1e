"""Compute the product of a tensor and a constant once."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from qdq.graph.edits import remove_if_unused
from qdq.graph.pairs import constant_of, is_op


class MergeProducts(ir.passes.InPlacePass):
    """Equal products of one tensor with a constant become one, so that their readers share a Q (R-FAN).

    `smooth_inputs` multiplies the input of each layer by factors, and the layers that read one tensor have the same
    factors. A product that is an output of the graph stays, because its name must not change.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the products of the main graph."""
        first_nodes: dict[Hashable, ir.Node] = {}
        modified = False
        for node in list(model.graph):
            identity = _identity_of(node)
            if identity is None or node.outputs[0].is_graph_output():
                continue

            first_node = first_nodes.setdefault(identity, node)
            if first_node is node:
                continue

            node.outputs[0].replace_all_uses_with(first_node.outputs[0])
            factors = node.inputs[1]
            model.graph.remove(node, safe=True)
            remove_if_unused(factors)
            modified = True

        return ir.passes.PassResult(model, modified=modified)


def _identity_of(node: ir.Node) -> Hashable | None:
    """Everything that is equal in equal products; None for a node that is no product with a constant on the right."""
    if not is_op(node, "Mul"):
        return None

    factors = constant_of(node.inputs[1])
    if factors is None:
        return None
    return node.inputs[0], factors.dtype.str, factors.shape, factors.tobytes()
