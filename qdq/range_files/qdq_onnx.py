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


def read_pairs(graph: ir.Graph) -> dict[str, Entry]:
    """The range of every DequantizeLinear, by the name of the tensor before Q, or of the codes.

    The codes name it where they are stored, and where two Q of one tensor say different things.

    Raises:
        CalibrationError: Two DequantizeLinear of the same codes have different scales.
    """
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for node in graph:
        codes = node.inputs[0] if is_op(node, "DequantizeLinear") else None
        if codes is None:
            continue
        quantize = codes.producer()
        tensor = (
            quantize.inputs[0]
            if quantize is not None and is_op(quantize, "QuantizeLinear")
            else codes
        )
        name = str((tensor or codes).name)
        add_entry(found[name], str(codes.name), _read_node(node), f"{name} at {node.name}")
    entries: dict[str, Entry] = {}
    for tensor_name, by_codes in found.items():
        first, *others = by_codes.values()
        is_one = all(np.array_equal(first.amax, other.amax) for other in others)
        entries.update({tensor_name: first} if is_one else by_codes)
    return entries


def _read_node(node: ir.Node) -> Entry:
    scale, zero_point = constant_of(input_of(node, 1)), constant_of(input_of(node, 2))
    if scale is None or (zero_point is None and input_of(node, 2) is not None):
        return Entry(problem="its scale or zero point is computed in the graph")
    zero_point = np.zeros((), np.uint8) if zero_point is None else zero_point
    if zero_point.dtype not in _CODES:
        return Entry(problem=f"its codes are {zero_point.dtype}, not of 8 bit")
    if scale.ndim > 1:
        return Entry(
            problem="its scales are in blocks: a quantizer has one range, or one a channel"
        )
    is_scalar = scale.size == 1
    values = scale.reshape(()) if is_scalar else scale
    qmin, qmax = _CODES[zero_point.dtype]
    axis = None if is_scalar else _axis_of(node)
    return entry_of_codes(values, zero_point, qmin, qmax, axis)


def _axis_of(node: ir.Node) -> int:
    """The axis of the channels, counted from the start where the rank is known."""
    axis, shape = (
        node.attributes.get_int("axis", 1),
        node.outputs[0].shape or (node.inputs[0] or node.outputs[0]).shape,
    )
    return axis if shape is None else axis % len(shape)


def write_scales(
    graph: ir.Graph, rows: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Set the scales of pairs in place; a pair that serves several quantizers gets the largest.

    Args:
        graph: The graph.
        rows: Quantizer -> what it has at each of its places.

    Returns:
        Quantizer -> what its scale is not the same for, and quantizer -> why its scale was not set.
    """
    notes: dict[str, str] = {}
    refused: dict[str, str] = {}
    users: dict[ir.Value, list[tuple[str, Row]]] = defaultdict(list)
    for name, own in rows.items():
        for row in own:
            if row.dequantize is None or row.dequantize.inputs[0] is None:
                refused[name] = "no Q/DQ pair of the file stands at its tensor"
            else:
                users[row.dequantize.inputs[0]].append((name, row))
    for served in users.values():
        node = served[0][1].dequantize
        assert node is not None  # noqa: S101  # see above
        sizes = {row.amax.size for _, row in served}
        scale = np.max([row.scale for _, row in served], axis=0) if len(sizes) == 1 else None
        reason = (
            "quantizers of unlike channels share its pair"
            if scale is None
            else _reason_against(node, scale)
        )
        if reason or scale is None:
            refused |= {name: reason for name, _ in served}
        else:
            _set_scale(graph, node, scale)
            smaller = [name for name, row in served if not np.array_equal(row.scale, scale)]
            notes |= dict.fromkeys(
                smaller, "another quantizer of its pair has a larger range, which the pair has now"
            )
    return notes, refused


def _reason_against(node: ir.Node, scale: Floats) -> str:
    """Why the scale of a pair cannot be set, "" if it can."""
    old, codes = constant_of(input_of(node, 1)), node.inputs[0]
    if old is None or codes is None:
        return "the scale of its pair is computed in the graph"
    if not has_int8_zeros(node):
        return "the codes of its pair are not int8 with zero point 0; `qdq check --fix` repairs what can be repaired"
    if scale.size != old.size:
        return f"the pair has {old.size} scales, the quantizer {scale.size}"
    is_stored = not is_op(codes.producer(), "QuantizeLinear")
    if is_stored and not np.array_equal(_as_stored(scale, old), old.reshape(-1)):
        return "the file holds the weight as codes of another scale; export the model again"
    return ""


def _as_stored(scale: Floats, old: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return scale.reshape(-1).astype(old.dtype)


def _set_scale(graph: ir.Graph, node: ir.Node, scale: Floats) -> None:
    """Give the Q and all its DQ the scale, as a constant of their own."""
    old_value, codes = node.inputs[1], node.inputs[0]
    old = constant_of(old_value)
    assert old is not None and codes is not None  # noqa: S101  # `_reason_against` has looked
    array = _as_stored(scale, old).reshape(old.shape)
    if np.array_equal(array, old):
        return
    quantize = codes.producer()
    nodes = [*([] if quantize is None else [quantize]), *(user for user, _ in codes.uses())]
    name = _unused_name(graph, f"{codes.name}.scale")
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    for one in nodes:
        if is_op(one, "QuantizeLinear", "DequantizeLinear"):
            one.replace_input_with(1, value)
    remove_if_unused(old_value)


def _unused_name(graph: ir.Graph, stem: str) -> str:
    names = (stem, *(f"{stem}_{number}" for number in range(2, len(graph.initializers) + 3)))
    return next(name for name in names if name not in graph.initializers)
