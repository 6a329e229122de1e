"""Zero padding as an attribute of the convolution behind it (R-CONV-6)."""

from __future__ import annotations

import onnx_ir as ir

from qdq.graph.pairs import constant_of, input_of, is_op, remove_if_unused


class FoldPad(ir.passes.InPlacePass):
    """Pad with zeros -> Conv becomes Conv with larger `pads`.

    Only padding of spatial dimensions, by constants of 0 or more. A Q/DQ pair between the two must have been moved in
    front of the Pad (`MoveQuantizeBeforeCopies`). The sums are the same but for added zeros; the order in which a
    runtime adds may differ, and with it the last bit.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold each Pad into every Conv that reads it; it goes once nothing reads it."""
        modified = False
        for conv in list(model.graph):
            while is_op(conv, "Conv") and (found := _padding_before(conv)) is not None:
                pad, pads = found
                conv.attributes.pop("auto_pad", None)
                conv.attributes.add(ir.AttrInt64s("pads", pads))
                conv.replace_input_with(0, pad.inputs[0])
                _remove_if_unread(pad)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _padding_before(conv: ir.Node) -> tuple[ir.Node, list[int]] | None:
    """The Pad in front of a Conv and the `pads` of both together; None where they cannot become one."""
    value = conv.inputs[0]
    pad = None if value is None else value.producer()
    if pad is None or not is_op(pad, "Pad") or pad.graph is not conv.graph:
        return None
    pads = join_pads(conv, pad)
    return None if pads is None else (pad, pads)


def join_pads(conv: ir.Node, pad: ir.Node) -> list[int] | None:
    """The `pads` of a Conv that takes in a Pad, wherever the two stand; None if it cannot."""
    weight = conv.inputs[1]
    if weight is None or weight.shape is None:
        return None
    if conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(weight.shape)
    added = _spatial_zeros(pad, rank)
    if added is None:
        return None
    own = conv.attributes.get_ints("pads", ()) or [0] * len(added)
    return [one + other for one, other in zip(own, added, strict=True)]


def _spatial_zeros(pad: ir.Node, rank: int) -> list[int] | None:
    """What a Pad adds to the spatial dimensions, all begins first, then all ends; None where it does anything else."""
    amounts, axes = constant_of(input_of(pad, 1)), constant_of(input_of(pad, 3))
    constant = constant_of(input_of(pad, 2))
    if pad.attributes.get_string("mode", "constant") != "constant" or amounts is None:
        return None
    if input_of(pad, 2) is not None and (constant is None or constant.any()):
        return None
    if input_of(pad, 3) is not None and axes is None:
        return None
    where = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.ravel()]
    numbers = [int(amount) for amount in amounts.ravel()]
    if len(numbers) != 2 * len(where) or min(numbers, default=0) < 0:
        return None
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(where):
        begins[axis], ends[axis] = numbers[position], numbers[position + len(where)]
    if any((*begins[:2], *ends[:2])):
        return None
    return [*begins[2:], *ends[2:]]


def _remove_if_unread(pad: ir.Node) -> None:
    if pad.graph is None or pad.outputs[0].uses() or pad.outputs[0].is_graph_output():
        return
    inputs = pad.inputs
    pad.graph.remove(pad, safe=True)
    for value in inputs[1:]:
        remove_if_unused(value)
