"""Remove Q/DQ: of all pairs, the float network of a quantized file with the rounded weights remains."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.errors import ExportError
from qdq.graph.edits import add_initializer, find_free_name, remove_if_unread, remove_if_unused
from qdq.graph.pairs import QDQ_OPS, constant_of, is_op, producer_of
from qdq.text import list_names

_STEM = "qdq.float_weight_"


class RemovePairs(ir.passes.InPlacePass):
    """Connect the reader of each DQ with what its Q reads, and store constants as floats.

    The network has the layers and the shapes of the quantized one, so its engine takes the time of the float model. Its
    weights are those of the file, rounded to int8 or FP8: the numbers are close to those of the float model, not equal.

    Args:
        names: Names of the only DQ to remove; None for all.

    Raises:
        ExportError: A Q or DQ has other operators between it and its partner, or its scale is computed. The model may
            be changed then.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__()
        self._names = names
        self.removed_q = 0
        self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each DQ, then remove the Q that nothing reads any more."""
        self.removed_q = 0
        self.removed_dq = 0
        graph = model.graph
        for node in list(graph):
            if self._is_removed(node):
                self._replace(graph, node)
        for node in reversed(list(graph)):
            if is_op(node, "QuantizeLinear") and remove_if_unread(node):
                self.removed_q += 1
        for value in list(graph.initializers.values()):
            remove_if_unused(value)

        remaining = [node.name or node.op_type for node in graph if self._is_removed(node)]
        if self._names is None:
            remaining = [node.name or node.op_type for node in graph if is_op(node, *QDQ_OPS)]
        if remaining:
            raise ExportError(
                f"{len(remaining)} Q/DQ cannot be removed: {list_names(remaining, 5)}.",
                "place Q and DQ next to each other, with constant scales.",
            )
        return ir.passes.PassResult(model, modified=bool(self.removed_dq))

    def _is_removed(self, node: ir.Node) -> bool:
        is_named = self._names is None or node.name in self._names
        return is_named and is_op(node, "DequantizeLinear")

    def _replace(self, graph: ir.Graph, dequantize: ir.Node) -> None:
        """Let the readers of a DQ read the value before its Q, or the dequantized constant."""
        output = dequantize.outputs[0]
        value = _find_source(graph, dequantize)
        if value is None:
            return
        if output.dtype is not None and value.dtype not in (None, output.dtype):
            value = _cast(graph, dequantize, value, output.dtype)
        if output.is_graph_output():
            value = _copy_for_output(graph, dequantize, value)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(dequantize, safe=True)
        self.removed_dq += 1


def _cast(graph: ir.Graph, dequantize: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A value in the type of a DQ's output: the scale of a Q and that of its DQ may differ in type."""
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.name = f"{dequantize.name}/Cast"
    converted = cast.outputs[0]
    converted.name = f"{dequantize.outputs[0].name}.converted"
    converted.type, converted.shape = ir.TensorType(dtype), value.shape
    graph.insert_before(dequantize, cast)
    return converted


def _copy_for_output(graph: ir.Graph, dequantize: ir.Node, value: ir.Value) -> ir.Value:
    """An Identity of a value, with the name that the graph returns."""
    output = dequantize.outputs[0]
    identity = ir.node("Identity", [value])
    identity.name = dequantize.name
    copied = identity.outputs[0]
    copied.type, copied.shape = output.type, output.shape
    copied.name = output.name
    output.name = f"{output.name}.removed"
    graph.insert_before(dequantize, identity)
    return copied


def _find_source(graph: ir.Graph, dequantize: ir.Node) -> ir.Value | None:
    """What takes the place of the output of a DQ; None if there is nothing."""
    quantize = producer_of(dequantize.inputs[0])
    if is_op(quantize, "QuantizeLinear"):
        return quantize.inputs[0]
    return _store_constant(graph, dequantize)


def _store_constant(graph: ir.Graph, dequantize: ir.Node) -> ir.Value | None:
    """A new initializer with the values of a DQ of constant codes; None if they are not constant."""
    values = _dequantize(dequantize)
    if values is None:
        return None
    return add_initializer(graph, find_free_name(graph, _STEM, len(graph.initializers)), values)


def _dequantize(node: ir.Node) -> npt.NDArray[np.floating] | None:
    """(code - zero point) * scale, in the type of the scale (ONNX: DequantizeLinear)."""
    codes, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    if codes is None or scale is None:
        return None
    zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    offset = np.zeros((), codes.dtype) if zero_point is None else zero_point
    if scale.size > 1:
        attribute = node.attributes.get("axis")
        axis = 1 if attribute is None else attribute.as_int()
        shape = [1] * codes.ndim
        shape[axis] = scale.size
        scale = scale.reshape(shape)
        offset = offset.reshape(shape) if offset.size > 1 else offset
    differences = codes.astype(np.float64) - offset.astype(np.float64)
    values: npt.NDArray[np.floating] = differences.astype(scale.dtype) * scale
    return values
