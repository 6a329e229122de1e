"""The scales of an ONNX file with QuantizeLinear and DequantizeLinear, read and set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import remove_if_unused
from qdq.graph.pairs import constant_of, has_int8_zeros, input_of, is_op
from qdq.range_files.entry import Entry, Floats, add_entry, entry_of_codes
from qdq.range_files.format import Row

_CODES = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}


# -- reading ---------------------------------------------------------------------------------------------------------


def read_pairs(graph: ir.Graph) -> dict[str, Entry]:
    """Read the range of every DequantizeLinear, by the name of the tensor before Q, or of the codes.

    The name is that of the codes if they are stored, or if two Q of one tensor have different ranges.

    Raises:
        CalibrationError: Two DequantizeLinear of the same codes have different scales.
    """
    by_tensor: dict[str, dict[str, Entry]] = defaultdict(dict)
    for node in graph:
        codes = node.inputs[0] if is_op(node, "DequantizeLinear") else None
        if codes is not None:
            name = _name_of_tensor(codes)
            place = f"{name} at {node.name}"
            add_entry(by_tensor[name], str(codes.name), _read_node(node), place)

    entries: dict[str, Entry] = {}
    for name, by_codes in by_tensor.items():
        first, *rest = by_codes.values()
        if all(np.array_equal(first.amax, entry.amax) for entry in rest):
            entries[name] = first
        else:
            entries |= by_codes
    return entries


def _name_of_tensor(codes: ir.Value) -> str:
    """The name of the tensor before Q, or of the codes if they are stored.

    Args:
        codes: The input of a DequantizeLinear.
    """
    quantize = codes.producer()
    if quantize is not None and is_op(quantize, "QuantizeLinear"):
        tensor = quantize.inputs[0]
        if tensor is not None:
            return str(tensor.name)
    return str(codes.name)


def _read_node(node: ir.Node) -> Entry:
    """The range of one DequantizeLinear, or its problem."""
    scale = constant_of(input_of(node, 1))
    zero_point = constant_of(input_of(node, 2))
    is_zero_computed = zero_point is None and input_of(node, 2) is not None
    if scale is None or is_zero_computed:
        return Entry(problem="its scale or zero point is computed in the graph")
    if zero_point is None:
        zero_point = np.zeros((), np.uint8)
    if zero_point.dtype not in _CODES:
        return Entry(problem=f"its codes are {zero_point.dtype}, not of 8 bit")
    if scale.ndim > 1:
        return Entry(
            problem="its scales are in blocks: a quantizer has one range, or one per channel"
        )
    qmin, qmax = _CODES[zero_point.dtype]
    if scale.size == 1:
        return entry_of_codes(scale.reshape(()), zero_point, qmin, qmax)
    return entry_of_codes(scale, zero_point, qmin, qmax, _axis_of(node))


def _axis_of(node: ir.Node) -> int:
    """The axis of the channels of a DequantizeLinear.

    Counted from the start if the rank is known; otherwise as in the file.
    """
    axis = node.attributes.get_int("axis", 1)
    for value in (node.outputs[0], node.inputs[0]):
        if value is not None and value.shape:
            return axis % len(value.shape)
    return axis


# -- writing ---------------------------------------------------------------------------------------------------------

_Users = list[tuple[str, Row]]


def write_scales(
    graph: ir.Graph, rows: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Set the scales of pairs in place; a pair that serves several quantizers gets the largest.

    Args:
        graph: The graph.
        rows: Quantizer -> its rows, one for each of its places.

    Returns:
        Quantizer -> how its scale differs from that of its pair, and quantizer -> why its scale was not set.
    """
    notes: dict[str, str] = {}
    refused: dict[str, str] = {}
    users_of_codes: dict[ir.Value, _Users] = defaultdict(list)
    for name, rows_of_quantizer in rows.items():
        for row in rows_of_quantizer:
            codes = None if row.dequantize is None else row.dequantize.inputs[0]
            if codes is None:
                refused[name] = "the file has no Q/DQ pair at its tensor"
            else:
                users_of_codes[codes].append((name, row))

    for users in users_of_codes.values():
        names = [name for name, _ in users]
        reason = _set_largest_scale(graph, users)
        if reason:
            refused |= dict.fromkeys(names, reason)
        else:
            notes |= _note_smaller_ranges(users)
    return notes, refused


def _set_largest_scale(graph: ir.Graph, users: _Users) -> str:
    """Set the scale of one pair to the largest of its quantizers.

    Args:
        graph: The graph.
        users: The quantizers of the pair with their rows.

    Returns:
        Why it was not set, "" if it was.
    """
    if len({row.amax.size for _, row in users}) > 1:
        return "quantizers with different numbers of channels share its pair"
    node = users[0][1].dequantize
    assert node is not None  # noqa: S101  # `write_scales` has looked
    scale = _largest_scale(users)
    reason = _reason_against(node, scale)
    if not reason:
        _set_scale(graph, node, scale)
    return reason


def _largest_scale(users: _Users) -> Floats:
    """The largest scale of all quantizers, for each channel."""
    largest: Floats = np.max([row.scale for _, row in users], axis=0)
    return largest


def _note_smaller_ranges(users: _Users) -> dict[str, str]:
    """A note for each quantizer whose range is smaller than that of its pair."""
    scale = _largest_scale(users)
    notes = {}
    for name, row in users:
        if not np.array_equal(row.scale, scale):
            notes[name] = "another quantizer of its pair has a larger range, which the pair now has"
    return notes


def _reason_against(node: ir.Node, scale: Floats) -> str:
    """Why the scale of a pair cannot be set, "" if it can.

    Args:
        node: The DequantizeLinear.
        scale: The new scale, of any shape.
    """
    former, codes = constant_of(input_of(node, 1)), node.inputs[0]
    if former is None or codes is None:
        return "the scale of its pair is computed in the graph"
    if not has_int8_zeros(node):
        return "the codes of its pair are not int8 with zero point 0; `qdq check --fix` can repair some of them"
    if scale.size != former.size:
        return f"the pair has {former.size} scales, the quantizer {scale.size}"
    is_stored = not is_op(codes.producer(), "QuantizeLinear")
    if is_stored and not np.array_equal(_as_stored(scale, former), former.reshape(-1)):
        return "the file stores the weight as codes with another scale; export the model again"
    return ""


def _as_stored(scale: Floats, former: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scales in the type of the former ones."""
    return scale.reshape(-1).astype(former.dtype)


def _set_scale(graph: ir.Graph, node: ir.Node, scale: Floats) -> None:
    """Give the Q and all its DQ the scale, as a constant that no other node reads.

    Args:
        graph: The graph.
        node: A DequantizeLinear of the pair.
        scale: As many numbers as the pair has.
    """
    former_value, codes = node.inputs[1], node.inputs[0]
    former = constant_of(former_value)
    assert former is not None and codes is not None  # noqa: S101  # `_reason_against` has looked
    array = _as_stored(scale, former).reshape(former.shape)
    if np.array_equal(array, former):
        return
    value = _make_constant(_unused_name(graph, f"{codes.name}.scale"), array)
    graph.register_initializer(value)

    quantize = codes.producer()
    nodes = [user for user, _ in codes.uses()]
    if quantize is not None:
        nodes.insert(0, quantize)
    for user in nodes:
        if is_op(user, "QuantizeLinear", "DequantizeLinear"):
            user.replace_input_with(1, value)
    remove_if_unused(former_value)


def _make_constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A constant for `register_initializer`."""
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )


def _unused_name(graph: ir.Graph, stem: str) -> str:
    """The stem, with a number if the graph has an initializer of that name."""
    name = stem
    number = 2
    while name in graph.initializers:
        name = f"{stem}_{number}"
        number += 1
    return name
