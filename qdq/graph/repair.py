"""Repairs of Q/DQ that others wrote, where not one number of the model changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.pairs import code_type_of, constant_of, input_of, is_op, remove_if_unused

_PAIR = ("QuantizeLinear", "DequantizeLinear")


class _Repair(ir.passes.InPlacePass):
    """A repair of single nodes; `changed` has the names of those that it changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Repair every Q and DQ of the model, also in bodies."""
        self.changed = [
            node.name or str(node.outputs[0].name)
            for node in list(model.graph.all_nodes())
            if is_op(node, *_PAIR) and len(node.inputs) > 1 and self.repair(node)
        ]
        return ir.passes.PassResult(model, modified=bool(self.changed))

    def repair(self, node: ir.Node) -> bool:
        """Repair one node; whether it had to be."""
        raise NotImplementedError


class MakeScalesScalar(_Repair):
    """A per-tensor scale and zero point of shape `[1]` become 0-D (R-SHAPE)."""

    def repair(self, node: ir.Node) -> bool:
        """The one scale of a weight with one output channel stays: it is per channel."""
        scale, shape = constant_of(node.inputs[1]), _shape_of(node)
        if scale is None or scale.shape != (1,):
            return False
        axis = node.attributes.get_int("axis", 1)
        if (
            shape is not None
            and "axis" in node.attributes
            and -len(shape) <= axis < len(shape)
            and shape[axis] == 1
        ):
            return False
        for position in (1, 2):
            old = constant_of(input_of(node, position))
            if old is not None and old.shape == (1,):
                _replace(node, position, old.reshape(()))
        return True


class WriteAxes(_Repair):
    """Per-channel Q/DQ of constants get the axis that their number of scales leaves no choice about (R-AXIS)."""

    def repair(self, node: ir.Node) -> bool:
        """Without the attribute the axis is 1; where only another one fits, no runtime could run the file."""
        scale, shape = constant_of(node.inputs[1]), _shape_of(node)
        if (
            scale is None
            or scale.ndim != 1
            or scale.size == 1
            or "axis" in node.attributes
            or shape is None
        ):
            return False
        fitting = [axis for axis, size in enumerate(shape) if size == scale.size]
        if len(fitting) != 1:
            return False
        node.attributes.add(ir.AttrInt64("axis", fitting[0]))
        return True


class MakeCodesSigned(_Repair):
    """uint8 codes with zero point 128 become int8 codes with zero point 0 (R-SYM).

    Both ranges are moved by 128, so every value keeps its code. With another zero point the range itself would change:
    such pairs stay. So do codes that anything but a DQ reads.
    """

    def repair(self, node: ir.Node) -> bool:
        """Each Q with all its DQ, and each DQ of constants."""
        if not _is_middle(node):
            return False
        if node.op_type == "DequantizeLinear":
            codes = constant_of(node.inputs[0])
            if codes is None or codes.dtype != np.uint8:
                return False
            _replace(node, 0, (codes.astype(np.int16) - 128).astype(np.int8))
            _zero(node)
            return True
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not all(
            is_op(r, _PAIR[1]) and _is_middle(r) for r in readers
        ):
            return False
        for member in (node, *readers):
            _zero(member)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        return True


class WriteZeroPoints(_Repair):
    """A DQ of int8 codes without zero point gets the zeros that it has by definition (R-SYM)."""

    def repair(self, node: ir.Node) -> bool:
        """A Q without one is uint8: that would change its numbers."""
        scale = constant_of(node.inputs[1])
        if not is_op(node, "DequantizeLinear") or input_of(node, 2) is not None or scale is None:
            return False
        if code_type_of(node) != ir.DataType.INT8:
            return False
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        _replace(node, 2, np.zeros(scale.shape, np.int8))
        return True


def _is_middle(node: ir.Node) -> bool:
    zeros = constant_of(input_of(node, 2))
    return zeros is not None and zeros.dtype == np.uint8 and bool(np.all(zeros == 128))


def _zero(node: ir.Node) -> None:
    zeros = constant_of(node.inputs[2])
    assert zeros is not None  # noqa: S101  # `_is_middle` has read them
    _replace(node, 2, np.zeros(zeros.shape, np.int8))
    if "output_dtype" in node.attributes and node.op_type == "QuantizeLinear":
        node.attributes.pop("output_dtype")


def _replace(node: ir.Node, position: int, array: npt.NDArray[Any]) -> None:
    """Give a node a constant of its own; other readers of the old one keep it."""
    old, graph = input_of(node, position), node.graph
    assert isinstance(graph, ir.Graph)  # noqa: S101  # repairs run on graphs, not on functions
    stem = f"{(old.name if old is not None else node.outputs[0].name) or 'constant'}.qdq"
    name = next(
        name
        for n in range(len(graph.initializers) + 1)
        if (name := f"{stem}{n}") not in graph.initializers
    )
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    node.replace_input_with(position, value)
    remove_if_unused(old)


def _shape_of(node: ir.Node) -> tuple[int, ...] | None:
    """The shape of what a Q or DQ works on, if it is a constant."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is not None and is_op(producer, "QuantizeLinear"):
        value = producer.inputs[0]
    array = constant_of(value)
    return None if array is None else tuple(array.shape)
