"""Identity nodes removed."""

from __future__ import annotations

import onnx_ir as ir

from qdq.graph.pairs import is_op


class RemoveIdentities(ir.passes.InPlacePass):
    """Identity -> readers becomes readers of what the Identity reads.

    `onnx_ir.passes.common.IdentityEliminationPass` renames an output of the graph where an Identity joins two of
    them (onnx-ir 1.1). Here the Identity stays in front of an output, unless a node of the same graph makes its value
    and nothing else needs that value's name.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit the main graph; what stands in subgraphs stays."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Identity"):
                modified |= _remove(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _remove(graph: ir.Graph, node: ir.Node) -> bool:
    value, output = node.inputs[0], node.outputs[0]
    if value is None:
        return False
    if output.is_graph_output():
        if value.producer() is None or value.graph is not graph or value.is_graph_output():
            return False
        name = output.name
        value.shape, value.type = value.shape or output.shape, value.type or output.type
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        value.name = name
        return True
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return True
