"""Fold a constant that is subtracted behind a Clip into the Clip and the bias before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import add_initializer, find_free_name, remove_if_unread, remove_if_unused
from qdq.graph.pairs import COPY_OPS, constant_of, input_of, is_op, producer_of

_BIAS = 2  # the input of Conv, ConvTranspose and Gemm
# The operators whose output moves by as much as their input; AveragePool does without the zeros of a padding.
_SHIFT_KEEPERS = COPY_OPS | {
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Identity",
    "MaxPool",
    "ReduceMax",
    "ReduceMean",
}


class FoldOffsets(ir.passes.InPlacePass):
    """Conv or Gemm -> Clip -> Sub of a constant becomes Conv or Gemm -> Clip with other bounds.

    clip(x, low, high) - c = clip(x - c, low - c, high - c), and x - c is the same product with another bias. So the
    operators are those of a model without Sub, which TensorRT fuses. Pooling and copies may lie between the Clip and
    the Sub. All readers of the Clip must be such a Sub with one constant, and nothing else may read the product.
    Elsewhere the Sub stays. A sum may differ in its last bit.
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
    subtractions = _find_subtractions(clip)
    if product is None or not subtractions or not _adds_bias(product):
        return False
    output = product.outputs[0]
    if product.graph is not graph or len(output.uses()) > 1 or output.is_graph_output():
        return False
    bias = constant_of(input_of(product, _BIAS))
    low = constant_of(input_of(clip, 1))
    high = constant_of(input_of(clip, 2))
    offset = _find_offset(subtractions)
    if bias is None or low is None or high is None or offset is None:
        return False

    _replace_constant(graph, product, _BIAS, bias - offset)
    _replace_constant(graph, clip, 1, low - offset)
    _replace_constant(graph, clip, 2, high - offset)
    for node in subtractions:
        shifted, constant = node.inputs
        assert shifted is not None  # noqa: S101
        node.outputs[0].replace_all_uses_with(shifted)
        if remove_if_unread(node):
            remove_if_unused(constant)
    return True


def _adds_bias(product: ir.Node) -> bool:
    """Whether a node adds its third input as it is: `beta` of Gemm would multiply it."""
    if is_op(product, "Gemm"):
        return product.attributes.get_float("beta", 1.0) == 1.0
    return is_op(product, "Conv", "ConvTranspose")


def _find_subtractions(node: ir.Node) -> list[ir.Node]:
    """The Sub nodes that read a node, directly or through operators that keep a shift; [] if other nodes do.

    Nodes that read only the shape do not count.
    """
    output = node.outputs[0]
    if output.is_graph_output() or any(other.uses() for other in node.outputs[1:]):
        return []
    subtractions = []
    for reader, position in output.uses():
        if is_op(reader, "Shape", "Size"):
            continue
        if position != 0:
            return []
        if is_op(reader, "Sub"):
            if reader.outputs[0].is_graph_output():
                return []
            subtractions.append(reader)
            continue
        behind = _find_subtractions(reader) if _keeps_shift(reader) else []
        if not behind:
            return []
        subtractions += behind
    return subtractions


def _keeps_shift(node: ir.Node) -> bool:
    """Whether the output of a node moves by as much as its first input."""
    if is_op(node, "AveragePool"):
        attributes = node.attributes
        pads = attributes.get_ints("pads", [])
        counts_zeros = bool(attributes.get_int("count_include_pad", 0))
        can_pad = any(pads) or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        can_overrun = bool(attributes.get_int("ceil_mode", 0))
        return not (counts_zeros and (can_pad or can_overrun))
    return is_op(node, *_SHIFT_KEEPERS)


def _find_offset(subtractions: list[ir.Node]) -> npt.NDArray[Any] | None:
    """The number `[]` that all nodes subtract; None if they do not subtract one number."""
    offsets = []
    for node in subtractions:
        offset = constant_of(node.inputs[1])
        if offset is None or offset.ndim:  # more dimensions could be those of the result
            return None
        offsets.append(offset)
    is_equal = all(np.array_equal(offset, offsets[0]) for offset in offsets)
    return offsets[0] if is_equal else None


def _replace_constant(
    graph: ir.Graph, node: ir.Node, position: int, array: npt.NDArray[Any]
) -> None:
    """Let a node read another constant; the former one is removed if nothing else reads it."""
    former = node.inputs[position]
    assert former is not None  # noqa: S101
    name = find_free_name(graph, f"{former.name}_minus_offset_", 0)
    value = add_initializer(graph, name, np.asarray(array))
    node.replace_input_with(position, value)
    remove_if_unused(former)
