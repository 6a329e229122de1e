"""Nodes, scales and zero points named after the torch modules they came from."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # written by torch.onnx: the modules around a node, then the node itself


class NameNodes(ir.passes.InPlacePass):
    """Node `MODULE/OP`, scale `QUANTIZER.scale`, zero point `QUANTIZER.zero_point`.

    A second node of the same kind in one module gets `_2`, and so on. TensorRT shows these names in its layer list.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename everything; types, shapes and values stay."""
        used: Counter[str] = Counter()
        for node in model.graph:
            module = scope_of(node)
            name = f"{module}/{node.op_type}"
            used[name] += 1
            node.name = name if used[name] == 1 else f"{name}_{used[name]}"
            if node.op_type == "QuantizeLinear":
                _name_parameters(model, node, module)
        return ir.passes.PassResult(model, modified=True)


def scope_of(node: ir.Node) -> str:
    """Dotted name of the torch module whose forward made the node; "" for the model itself."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""
    modules = ast.literal_eval(scopes)[:-1]
    return str(modules[-1]) if modules else ""


def _name_parameters(model: ir.Model, node: ir.Node, quantizer: str) -> None:
    """Give a node's scale and zero point the quantizer's name, as values of its own.

    The exporter shares equal constants between quantizers; here each gets its own, so that a name says whose it is.
    """
    initializers = model.graph.initializers
    users = [node, *(user for user, _ in node.outputs[0].uses() if user.op_type == "DequantizeLinear")]
    for position, suffix in ((1, "scale"), (2, "zero_point")):
        old = node.inputs[position]
        if old is None or old.const_value is None:
            continue
        name = f"{quantizer}.{suffix}"
        if name in initializers:  # one quantizer, used twice: the same numbers
            new = initializers[name]
        else:
            tensor = ir.tensor(old.const_value.numpy(), name=name)
            new = ir.Value(name=name, shape=old.shape, type=old.type, const_value=tensor)
            model.graph.register_initializer(new)
        for user in users:
            user.replace_input_with(position, new)
        if not old.uses():
            initializers.pop(str(old.name), None)
