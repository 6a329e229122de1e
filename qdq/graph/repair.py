"""Repairs of Q/DQ from other tools that do not change any number of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import add_initializer, find_free_name, remove_if_unused
from qdq.graph.pairs import QDQ_OPS, code_type_of, constant_of, input_of, is_op, producer_of

_UINT8_MIDDLE = 128  # the zero point with which uint8 has the range of int8


class _Repair(ir.passes.InPlacePass):
    """A repair of single nodes.

    Attributes:
        changed: Names of the nodes that were changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Repair every Q and DQ of the model, in subgraphs too."""
        self.changed = []
        for node in list(model.graph.all_nodes()):
            if not is_op(node, *QDQ_OPS) or len(node.inputs) < 2:
                continue

            if self.repair(node):
                self.changed.append(node.name or str(node.outputs[0].name))

        return ir.passes.PassResult(model, modified=bool(self.changed))

    def repair(self, node: ir.Node) -> bool:
        """Repair one node.

        Args:
            node: A Q or DQ with a scale.

        Returns:
            Whether anything changed.
        """
        raise NotImplementedError


class MakeScalesScalar(_Repair):
    """Make per-tensor scales and zero points of shape `[1]` 0-D (R-SHAPE)."""

    def repair(self, node: ir.Node) -> bool:
        """Repair one Q or DQ; returns whether anything changed.

        The single scale of a weight with one output channel does not change, because it is per channel.

        Args:
            node: A Q or DQ with a scale.
        """
        scale = constant_of(node.inputs[1])
        if scale is None or scale.shape != (1,):
            return False
        if _scales_single_channel(node):
            return False

        _replace_constant(node, 1, scale.reshape(()))
        zero_point = constant_of(input_of(node, 2))
        if zero_point is not None and zero_point.shape == (1,):
            _replace_constant(node, 2, zero_point.reshape(()))
        return True


class WriteAxes(_Repair):
    """Write the axis of per-channel Q/DQ of constants if the number of scales leaves only one choice (R-AXIS)."""

    def repair(self, node: ir.Node) -> bool:
        """Repair one Q or DQ; returns whether anything changed.

        Without the attribute the axis is 1. If only another axis fits, no runtime could run the file.

        Args:
            node: A Q or DQ with a scale.
        """
        scale = constant_of(node.inputs[1])
        if scale is None or scale.ndim != 1 or scale.size == 1:
            return False

        shape = _constant_shape_of(node)
        if shape is None or "axis" in node.attributes:
            return False

        fitting_axes = [axis for axis, size in enumerate(shape) if size == scale.size]
        if len(fitting_axes) != 1:
            return False

        node.attributes.add(ir.AttrInt64("axis", fitting_axes[0]))
        return True


class MakeCodesSigned(_Repair):
    """Turn uint8 codes with zero point 128 into int8 codes with zero point 0 (R-SYM).

    Codes and zero point are both shifted by 128, so no value changes. With another zero point the range itself would
    change: such pairs stay. So do codes that anything but a DQ reads.
    """

    def repair(self, node: ir.Node) -> bool:
        """Repair a Q with all its DQ, or a DQ of constants; returns whether anything changed.

        Args:
            node: A Q or DQ with a scale. A DQ after a Q is repaired with the Q.
        """
        if not _has_middle_zero_point(node):
            return False
        if node.op_type == "DequantizeLinear":
            return _sign_constant_codes(node)
        return _sign_computed_codes(node)


class WriteZeroPoints(_Repair):
    """Write the zero point of DQ of int8 codes that have none: it is zero by definition (R-SYM)."""

    def repair(self, node: ir.Node) -> bool:
        """Repair one DQ; returns whether anything changed.

        A Q without a zero point is uint8: a zero point of int8 would change its numbers.

        Args:
            node: A Q or DQ with a scale.
        """
        if not is_op(node, "DequantizeLinear") or input_of(node, 2) is not None:
            return False

        scale = constant_of(node.inputs[1])
        if scale is None or code_type_of(node) != ir.DataType.INT8:
            return False

        if len(node.inputs) < 3:
            node.resize_inputs(3)
        _replace_constant(node, 2, np.zeros(scale.shape, np.int8))
        return True


def _scales_single_channel(node: ir.Node) -> bool:
    """Whether a Q or DQ names an axis of a constant which has one channel along it."""
    shape = _constant_shape_of(node)
    if shape is None or "axis" not in node.attributes:
        return False

    axis = node.attributes.get_int("axis", 1)
    is_valid = -len(shape) <= axis < len(shape)
    return is_valid and shape[axis] == 1


def _constant_shape_of(node: ir.Node) -> tuple[int, ...] | None:
    """The shape of the weight that a Q or DQ works on.

    Args:
        node: The Q or DQ; a DQ may be after the Q of the weight.

    Returns:
        None if it is not constant.
    """
    value = node.inputs[0]
    quantize = producer_of(value)
    if is_op(quantize, "QuantizeLinear"):
        value = quantize.inputs[0]

    array = constant_of(value)
    if array is None:
        return None
    return tuple(array.shape)


def _has_middle_zero_point(node: ir.Node) -> bool:
    """Whether the zero point of a Q or DQ is the middle of uint8."""
    zero_point = constant_of(input_of(node, 2))
    if zero_point is None or zero_point.dtype != np.uint8:
        return False
    return bool(np.all(zero_point == _UINT8_MIDDLE))


def _sign_constant_codes(dequantize: ir.Node) -> bool:
    """Move the constant codes of a DQ to int8.

    Args:
        dequantize: A DQ whose zero point is the middle of uint8.

    Returns:
        False, with nothing changed, if a node computes the codes.
    """
    codes = constant_of(dequantize.inputs[0])
    if codes is None or codes.dtype != np.uint8:
        return False

    signed_codes = codes.astype(np.int16) - _UINT8_MIDDLE
    _replace_constant(dequantize, 0, signed_codes.astype(np.int8))
    _write_int8_zeros(dequantize)
    return True


def _sign_computed_codes(quantize: ir.Node) -> bool:
    """Move the codes between a Q and its DQ to int8.

    Args:
        quantize: A Q whose zero point is the middle of uint8.

    Returns:
        False, with nothing changed, if the codes have a reader that would then see other codes.
    """
    output = quantize.outputs[0]
    readers = [reader for reader, _ in output.uses()]
    if output.is_graph_output() or not all(_reads_middle(reader) for reader in readers):
        return False

    for node in (quantize, *readers):
        _write_int8_zeros(node)
    output.type = ir.TensorType(ir.DataType.INT8)
    return True


def _reads_middle(node: ir.Node) -> bool:
    """Whether a node is a DQ whose zero point is the middle of uint8."""
    return is_op(node, "DequantizeLinear") and _has_middle_zero_point(node)


def _write_int8_zeros(node: ir.Node) -> None:
    """Give a Q or DQ a zero point of int8 zeros."""
    zero_point = constant_of(node.inputs[2])
    assert zero_point is not None  # noqa: S101  # `_has_middle_zero_point` has read it

    _replace_constant(node, 2, np.zeros(zero_point.shape, np.int8))
    if node.op_type == "QuantizeLinear":
        node.attributes.pop("output_dtype", None)


def _replace_constant(node: ir.Node, position: int, array: npt.NDArray[Any]) -> None:
    """Give a node a separate constant; other readers of the old one keep it.

    Args:
        node: The node.
        position: Position of the input.
        array: The numbers of the new constant.
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)  # noqa: S101  # repairs run on graphs, not on functions

    old_value = input_of(node, position)
    old_name = node.outputs[0].name if old_value is None else old_value.name
    name = find_free_name(graph, f"{old_name or 'constant'}.qdq", 0)
    node.replace_input_with(position, add_initializer(graph, name, array))
    remove_if_unused(old_value)
