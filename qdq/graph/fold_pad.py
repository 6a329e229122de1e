"""Fold zero padding into the convolution after it (R-CONV-6)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import remove_if_unread, remove_if_unused
from qdq.graph.pairs import constant_of, input_of, is_op, producer_of

_FIRST_SPATIAL_AXIS = 2  # after batch and channels


class FoldPad(ir.passes.InPlacePass):
    """Pad with zeros -> Conv becomes Conv with larger `pads`.

    Only padding of spatial dimensions, by constants of 0 or more. A Q/DQ pair between the two must have been moved
    before the Pad (`MoveQuantizeBeforeCopies`). The sums are the same except for added zeros; a runtime may add in
    another order, so the last bit may differ.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold each Pad into every Conv that reads it, and remove it once nothing reads it."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Conv"):
                modified |= _fold_pads_before(node)

        return ir.passes.PassResult(model, modified=modified)


def _fold_pads_before(conv: ir.Node) -> bool:
    """Fold every Pad of a chain before a Conv, the nearest first.

    Returns:
        Whether there was one.
    """
    modified = False
    while True:
        pad = producer_of(conv.inputs[0])
        if not is_op(pad, "Pad") or pad.graph is not conv.graph:
            return modified

        pads = join_pads(conv, pad)
        if pads is None:
            return modified

        _fold_pad(conv, pad, pads)
        modified = True


def _fold_pad(conv: ir.Node, pad: ir.Node, pads: list[int]) -> None:
    """Let a Conv read the input of a Pad, with the `pads` of both."""
    conv.attributes.pop("auto_pad", None)
    conv.attributes.add(ir.AttrInt64s("pads", pads))
    conv.replace_input_with(0, pad.inputs[0])

    parameters = pad.inputs[1:]
    if remove_if_unread(pad):
        for parameter in parameters:
            remove_if_unused(parameter)


def join_pads(conv: ir.Node, pad: ir.Node) -> list[int] | None:
    """The `pads` of a Conv into which a Pad is folded, wherever the two are.

    Args:
        conv: The Conv.
        pad: The Pad.

    Returns:
        Rows or columns of zeros for each spatial dimension, all begins first, then all ends. None if the Conv cannot
        pad like the Pad.
    """
    weight = conv.inputs[1]
    if weight is None or weight.shape is None:
        return None
    if conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None

    pads_of_pad = _spatial_zeros(pad, rank=len(weight.shape))
    if pads_of_pad is None:
        return None

    pads_of_conv = conv.attributes.get_ints("pads")
    if not pads_of_conv:
        return pads_of_pad
    return [sum(pads) for pads in zip(pads_of_conv, pads_of_pad, strict=True)]


def _spatial_zeros(pad: ir.Node, rank: int) -> list[int] | None:
    """The zeros that a Pad adds to the spatial dimensions.

    Args:
        pad: The Pad.
        rank: Number of dimensions of its input.

    Returns:
        All begins first, then all ends. None if the Pad does anything else, or if its amounts are not known.
    """
    amounts = constant_of(input_of(pad, 1))
    if amounts is None or not _pads_with_zeros(pad):
        return None

    axes = _padded_axes(pad, rank)
    if axes is None or not _are_valid(amounts, axes):
        return None

    begins = [0] * rank
    ends = [0] * rank
    begin_amounts, end_amounts = amounts.ravel().reshape(2, -1)
    for axis, begin, end in zip(axes, begin_amounts, end_amounts, strict=True):
        begins[axis] = int(begin)
        ends[axis] = int(end)

    other_axes = begins[:_FIRST_SPATIAL_AXIS] + ends[:_FIRST_SPATIAL_AXIS]
    if any(other_axes):
        return None
    return begins[_FIRST_SPATIAL_AXIS:] + ends[_FIRST_SPATIAL_AXIS:]


def _pads_with_zeros(pad: ir.Node) -> bool:
    """Whether a Pad adds a constant, and that constant is known to be zero, which is the default.

    Other modes, such as reflect, add values of the input.
    """
    if pad.attributes.get_string("mode", "constant") != "constant":
        return False
    if input_of(pad, 2) is None:
        return True

    constant = constant_of(input_of(pad, 2))
    return constant is not None and not constant.any()


def _padded_axes(pad: ir.Node, rank: int) -> list[int] | None:
    """The axes that a Pad lists, or all axes if it lists none.

    Args:
        pad: The Pad.
        rank: Number of dimensions of its input.

    Returns:
        Axes of 0 or above; None if they are computed.
    """
    if input_of(pad, 3) is None:
        return list(range(rank))

    axes = constant_of(input_of(pad, 3))
    if axes is None:
        return None
    return [int(axis) % rank for axis in axes.ravel()]


def _are_valid(amounts: npt.NDArray[Any], axes: list[int]) -> bool:
    """Whether there are two amounts for each axis, and none of them crops."""
    is_complete = amounts.size == 2 * len(axes)
    return is_complete and bool((amounts >= 0).all())
