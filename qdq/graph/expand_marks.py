"""Write a Q/DQ pair in place of each node by which a captured graph stands for a quantizer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq.graph.edits import add_initializer, find_free_name

DOMAIN = "qdq"
MARK_OP = "FakeQuantize"
"""The operator of such a node; `ExpandMarks` says what its attributes are."""


class ExpandMarks(ir.passes.InPlacePass):
    """Replace each `qdq.FakeQuantize` by a QuantizeLinear and a DequantizeLinear that reads it.

    Every element of the scale is `mark`: one 0-D element if `num_ranges` is 0, else `num_ranges` of them along `axis`.
    The zero points are zeros of the type `code_type`, int8 or FP8.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand the nodes of the main graph."""
        marked_nodes = [node for node in model.graph if is_mark(node)]
        for number, node in enumerate(marked_nodes):
            _expand(model.graph, node, number)
        model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(marked_nodes))


def is_mark(node: ir.Node) -> bool:
    """Whether a node stands for a quantizer."""
    return node.domain == DOMAIN and node.op_type == MARK_OP


def _expand(graph: ir.Graph, node: ir.Node, number: int) -> None:
    num_ranges = node.attributes["num_ranges"].as_int()
    shape = (num_ranges,) if num_ranges else ()
    code_type = ir.DataType(node.attributes["code_type"].as_int())
    mark = node.attributes["mark"].as_float()
    scale = add_initializer(
        graph, find_free_name(graph, "mark_scale_", number), np.full(shape, mark, np.float32)
    )
    zero_point = add_initializer(
        graph, find_free_name(graph, "mark_zero_point_", number), np.zeros(shape, code_type.numpy())
    )

    (values,) = node.inputs
    (result,) = node.outputs
    axis = {"axis": node.attributes["axis"].as_int()}
    quantize = ir.node("QuantizeLinear", [values, scale, zero_point], axis)
    codes = quantize.outputs[0]
    codes.name = f"{result.name}_codes"
    codes.type, codes.shape = ir.TensorType(code_type), result.shape
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero_point], axis)
    for part in (quantize, dequantize):
        part.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [quantize, dequantize], [result], dequantize.outputs
    )
