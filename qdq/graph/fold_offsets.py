"""Fold a constant that is subtracted behind a Clip into the Clip and the bias before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import add_initializer, find_free_name, remove_if_unread, remove_if_unused
from qdq.graph.pairs import constant_of, input_of, is_op, producer_of

_BIAS = 2  # the input of Conv and Gemm


class FoldOffsets(ir.passes.InPlacePass):
    """Conv or Gemm -> Clip -> Sub of a constant becomes Conv or Gemm -> Clip with other bounds.

    clip(x, low, high) - c = clip(x - c, low - c, high - c), and x - c is the same product with another bias. So the
    operators are those of a model without Sub, which TensorRT fuses. All readers of the Clip must be such a Sub with
    one constant, and nothing else may read the product. Elsewhere the Sub stays. A sum may differ in its last bit.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit every Clip of the main graph."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Clip"):
                modified |= _fold_offset(model.graph, node)

        return ir.passes.PassResult(model, modified=modified)


def _fold_offset(graph: ir.Graph, clip: ir.Node) -> bool:
    """Fold the Sub nodes behind a Clip, if all conditions hold."""
    product = producer_of(clip.inputs[0])
    if not is_op(product, "Conv", "Gemm") or product.graph is not graph:
        return False
    offset = _find_offset(clip)
    bias = constant_of(input_of(product, _BIAS))
    bounds = [constant_of(input_of(clip, position)) for position in (1, 2)]
    is_read_once = len(product.outputs[0].uses()) == 1 and not product.outputs[0].is_graph_output()
    if offset is None or bias is None or any(bound is None for bound in bounds) or not is_read_once:
        return False

    _replace_constant(graph, product, _BIAS, bias - offset)
    for position, bound in zip((1, 2), bounds, strict=True):
        assert bound is not None  # noqa: S101
        _replace_constant(graph, clip, position, bound - offset)
    for node, _ in list(clip.outputs[0].uses()):
        node.outputs[0].replace_all_uses_with(clip.outputs[0])
        constant = node.inputs[1]
        if remove_if_unread(node):
            remove_if_unused(constant)
    return True


def _find_offset(clip: ir.Node) -> npt.NDArray[Any] | None:
    """The scalar that all readers of a Clip subtract from it; None if they do not."""
    output = clip.outputs[0]
    if output.is_graph_output():
        return None
    offsets = []
    for node, position in output.uses():
        offset = constant_of(input_of(node, 1)) if is_op(node, "Sub") and position == 0 else None
        if offset is None or offset.size != 1 or node.outputs[0].is_graph_output():
            return None
        offsets.append(offset.reshape(()))
    if not offsets or any(not np.array_equal(offset, offsets[0]) for offset in offsets):
        return None
    return offsets[0]


def _replace_constant(
    graph: ir.Graph, node: ir.Node, position: int, array: npt.NDArray[Any]
) -> None:
    """Let a node read another constant; the former one is removed if nothing else reads it."""
    former = node.inputs[position]
    assert former is not None  # noqa: S101
    name = find_free_name(graph, f"{former.name}_minus_offset_", 0)
    value = add_initializer(graph, name, np.asarray(array, dtype=array.dtype))
    node.replace_input_with(position, value)
    remove_if_unused(former)
