"""Casts that change nothing, that a wider one undoes, or that stand between a tensor and its Q/DQ (R-CAST)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.pairs import constant_of, is_op, remove_if_unused

_T = ir.DataType
# Types whose every value the type on the left can hold.
_HOLDS = {
    _T.FLOAT: {_T.FLOAT16, _T.BFLOAT16, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.BOOL},
    _T.DOUBLE: {
        _T.FLOAT16,
        _T.BFLOAT16,
        _T.FLOAT,
        _T.INT8,
        _T.UINT8,
        _T.INT16,
        _T.UINT16,
        _T.INT32,
        _T.BOOL,
    },
    _T.INT32: {_T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.BOOL},
    _T.INT64: {_T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.INT32, _T.BOOL},
}
_HALF_SCALE_OPSET = 19


class FoldCasts(ir.passes.InPlacePass):
    """Remove Casts, exactly.

    - to the type that the value has already;
    - after a Cast to a wider type: narrow -> wide -> any is narrow -> any;
    - half -> float -> Q, and DQ -> float -> half: the pair takes a half scale, from opset 19 on, where half holds the
      scale exactly. What it does not hold stays: rounding a scale changes numbers.

    A Cast whose output is an output of the graph stays, as its name must.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit Casts in graph order; each sees what the ones before it left."""
        modified = False
        halves = model.graph.opset_imports.get("", 0) >= _HALF_SCALE_OPSET
        for node in list(model.graph):
            if node.graph is None:  # gone already
                continue
            if is_op(node, "Cast"):
                modified |= _shorten_chain(node)
                modified |= _remove_idle(node)
            elif halves and is_op(node, "QuantizeLinear"):
                modified |= _take_half(model.graph, node)
            elif halves and is_op(node, "DequantizeLinear"):
                modified |= _give_half(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes.get_int("to", 0))


def _shorten_chain(cast: ir.Node) -> bool:
    """Read what a widening Cast in front reads."""
    value = cast.inputs[0]
    before = None if value is None else value.producer()
    if before is None or not is_op(before, "Cast") or before.graph is not cast.graph:
        return False
    origin = before.inputs[0]
    if (
        origin is None
        or origin.dtype is None
        or origin.dtype not in _HOLDS.get(_target(before), ())
    ):
        return False
    cast.replace_input_with(0, origin)
    _remove_unread(before)
    return True


def _remove_idle(cast: ir.Node) -> bool:
    """Remove a Cast to the type of its input."""
    value, output = cast.inputs[0], cast.outputs[0]
    if value is None or value.dtype != _target(cast) or output.is_graph_output():
        return False
    output.replace_all_uses_with(value)
    _remove_unread(cast)
    return True


def _take_half(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Half -> Cast to float -> Q: the Q reads half."""
    value = quantize.inputs[0]
    cast = None if value is None else value.producer()
    if cast is None or not is_op(cast, "Cast") or _target(cast) != _T.FLOAT:
        return False
    origin = cast.inputs[0]
    if origin is None or origin.dtype != _T.FLOAT16 or not _halve_scale(graph, quantize):
        return False
    quantize.replace_input_with(0, origin)
    _remove_unread(cast)
    return True


def _give_half(graph: ir.Graph, dequantize: ir.Node) -> bool:
    """Let a DQ give half where nothing but Casts to half read it."""
    output = dequantize.outputs[0]
    casts = [user for user, _ in output.uses()]
    if not casts or output.is_graph_output():
        return False
    if not all(is_op(cast, "Cast") and _target(cast) == _T.FLOAT16 for cast in casts):
        return False
    if any(cast.outputs[0].is_graph_output() for cast in casts) or not _halve_scale(
        graph, dequantize
    ):
        return False
    output.dtype = _T.FLOAT16
    for cast in casts:
        cast.outputs[0].replace_all_uses_with(output)
        _remove_unread(cast)
    return True


def _halve_scale(graph: ir.Graph, node: ir.Node) -> bool:
    """Give a Q or DQ its float scale as half; False where half does not hold it, or a type is written out."""
    scale = node.inputs[1]
    numbers = constant_of(scale)
    if scale is None or numbers is None or numbers.dtype != np.float32 or not _fits_half(numbers):
        return False
    if node.attributes.get_int("output_dtype", 0) or node.attributes.get_int("precision", 0):
        return False
    name = f"{scale.name}.float16"
    half = graph.initializers.get(name)
    if half is None:
        tensor = ir.tensor(numbers.astype(np.float16), name=name)
        half = ir.Value(
            name=name,
            shape=ir.Shape(numbers.shape),
            type=ir.TensorType(_T.FLOAT16),
            const_value=tensor,
        )
        graph.register_initializer(half)
    node.replace_input_with(1, half)
    remove_if_unused(scale)
    return True


def _fits_half(numbers: npt.NDArray[Any]) -> bool:
    """Exactly, and as a normal number: TensorRT may flush the others to zero (R-SCALE)."""
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    return bool(np.all((half.astype(np.float32) == numbers) & (half >= np.finfo(np.float16).tiny)))


def _remove_unread(node: ir.Node) -> None:
    if (
        node.graph is not None
        and not node.outputs[0].uses()
        and not node.outputs[0].is_graph_output()
    ):
        node.graph.remove(node, safe=True)
