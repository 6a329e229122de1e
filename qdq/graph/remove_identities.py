"""Remove Identity nodes."""

from __future__ import annotations

import onnx_ir as ir

from qdq.graph.pairs import is_op


class RemoveIdentities(ir.passes.InPlacePass):
    """Let the readers of an Identity read its input, and remove the Identity.

    `onnx_ir.passes.common.IdentityEliminationPass` renames an output of the graph if an Identity joins two of them
    (onnx-ir 1.1). Here the Identity stays before an output, unless a node of the same graph computes its value and
    nothing else needs the name of that value.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit the main graph; subgraphs stay as they are."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Identity"):
                modified |= _remove_identity(model.graph, node)

        return ir.passes.PassResult(model, modified=modified)


def _remove_identity(graph: ir.Graph, identity: ir.Node) -> bool:
    """Remove an Identity; returns whether that was possible."""
    value = identity.inputs[0]
    output = identity.outputs[0]
    if value is None:
        return False

    if output.is_graph_output():
        return _return_input_of(graph, identity, value)

    output.replace_all_uses_with(value)
    graph.remove(identity, safe=True)
    return True


def _return_input_of(graph: ir.Graph, identity: ir.Node, value: ir.Value) -> bool:
    """Let the graph return the input of an Identity under the name of its output.

    The name of the value must be free to change, so an input, an initializer, another output of the graph and a value
    of an outer graph stay.
    """
    if value.producer() is None or value.graph is not graph:
        return False
    if value.is_graph_output():
        return False

    output = identity.outputs[0]
    name = output.name
    if value.shape is None:
        value.shape = output.shape
    if value.type is None:
        value.type = output.type

    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(identity, safe=True)
    value.name = name
    return True
