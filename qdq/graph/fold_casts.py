"""Remove Casts that change nothing, and Casts between a tensor and its Q/DQ (R-CAST)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import add_initializer, remove_if_unread, remove_if_unused
from qdq.graph.opset import FIRST_WITH_HALF_SCALES
from qdq.graph.pairs import constant_of, is_op, producer_of

_T = ir.DataType
_HALF_TYPES = frozenset({_T.FLOAT16, _T.BFLOAT16})
_SMALL_TYPES = frozenset({_T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.BOOL})
# A wide type -> the narrower types whose values it can all represent.
_HOLDS = {
    _T.FLOAT: _SMALL_TYPES | _HALF_TYPES,
    _T.DOUBLE: _SMALL_TYPES | _HALF_TYPES | {_T.FLOAT, _T.INT32},
    _T.INT32: _SMALL_TYPES,
    _T.INT64: _SMALL_TYPES | {_T.INT32},
}


class FoldCasts(ir.passes.InPlacePass):
    """Remove Casts without changing a number.

    - A Cast to the type that the value already has is removed.
    - A Cast to a wider type before another Cast is skipped: narrow -> wide -> any becomes narrow -> any.
    - half -> float -> Q and DQ -> float -> half lose their Cast: the Q or DQ takes a half scale, from opset 19 on, if
      half represents the scale exactly. Other scales stay, because rounding a scale changes numbers.

    A Cast whose output is an output of the graph stays, because the name must not change.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit the nodes in graph order; each sees the result of the earlier edits.

        Only the main graph is visited. Below opset 19 no Q or DQ can have a half scale, so only Casts are edited there.
        """
        graph = model.graph
        opset = graph.opset_imports.get("", 0)
        has_half_scales = opset >= FIRST_WITH_HALF_SCALES

        modified = False
        for node in list(graph):
            if node.graph is None:  # an earlier edit has removed it
                continue
            if is_op(node, "Cast"):
                modified |= _skip_widening_cast(node)
                modified |= _remove_idle_cast(node)
            elif has_half_scales and is_op(node, "QuantizeLinear"):
                modified |= _quantize_half(graph, node)
            elif has_half_scales and is_op(node, "DequantizeLinear"):
                modified |= _dequantize_to_half(graph, node)

        return ir.passes.PassResult(model, modified=modified)


def _target_type(cast: ir.Node) -> ir.DataType:
    """The target type of a Cast."""
    return ir.DataType(cast.attributes.get_int("to", 0))


def _is_cast_to(node: ir.Node | None, dtype: ir.DataType) -> bool:
    """Whether a node is a Cast to a type."""
    return is_op(node, "Cast") and _target_type(node) == dtype


def _skip_widening_cast(cast: ir.Node) -> bool:
    """Let a Cast read the input of a widening Cast before it.

    The wider type represents every value of the narrow one, so the second Cast sees the same numbers.

    Returns:
        Whether there was one.
    """
    widening = producer_of(cast.inputs[0])
    if not is_op(widening, "Cast") or widening.graph is not cast.graph:
        return False

    narrow = widening.inputs[0]
    narrower_types = _HOLDS.get(_target_type(widening), frozenset())
    if narrow is None or narrow.dtype not in narrower_types:
        return False

    cast.replace_input_with(0, narrow)
    remove_if_unread(widening)
    return True


def _remove_idle_cast(cast: ir.Node) -> bool:
    """Remove a Cast to the type of its input.

    Returns:
        Whether it was one.
    """
    value = cast.inputs[0]
    output = cast.outputs[0]
    if value is None or value.dtype != _target_type(cast):
        return False
    if output.is_graph_output():
        return False

    output.replace_all_uses_with(value)
    remove_if_unread(cast)
    return True


def _quantize_half(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Half -> Cast to float -> Q: let the Q read half.

    Value and scale stay the same numbers, in a narrower type.

    Returns:
        Whether the Q reads half now.
    """
    cast = producer_of(quantize.inputs[0])
    if cast is None or not _is_cast_to(cast, _T.FLOAT):
        return False

    half_value = cast.inputs[0]
    if half_value is None or half_value.dtype != _T.FLOAT16:
        return False
    if not _replace_scale_by_half(graph, quantize):
        return False

    quantize.replace_input_with(0, half_value)
    remove_if_unread(cast)
    return True


def _dequantize_to_half(graph: ir.Graph, dequantize: ir.Node) -> bool:
    """DQ -> Casts to half: let the DQ output half if all its readers are such Casts.

    Code times scale is exact in float if half represents the scale, so rounding to half in the DQ or in the Cast gives
    the same number.

    Returns:
        Whether the DQ outputs half now.
    """
    output = dequantize.outputs[0]
    casts = [user for user, _ in output.uses()]
    if not casts or output.is_graph_output():
        return False
    if not all(_is_inner_cast_to_half(cast) for cast in casts):
        return False
    if not _replace_scale_by_half(graph, dequantize):
        return False

    output.dtype = _T.FLOAT16
    for cast in casts:
        cast.outputs[0].replace_all_uses_with(output)
        remove_if_unread(cast)
    return True


def _is_inner_cast_to_half(node: ir.Node) -> bool:
    """Whether a node is a Cast to half whose output is not an output of the graph."""
    return _is_cast_to(node, _T.FLOAT16) and not node.outputs[0].is_graph_output()


def _replace_scale_by_half(graph: ir.Graph, node: ir.Node) -> bool:
    """Give a Q or DQ its float scale as half.

    The half scale is a new constant, which all Q and DQ with the same float scale share.

    Args:
        graph: The graph.
        node: The Q or DQ.

    Returns:
        False, with nothing changed, if half cannot represent the scale or an attribute of the node fixes a type.
    """
    scale = node.inputs[1]
    numbers = constant_of(scale)
    if scale is None or numbers is None:
        return False
    if numbers.dtype != np.float32 or not _fits_half(numbers):
        return False
    if _states_type(node):
        return False

    name = f"{scale.name}.float16"
    half_scale = graph.initializers.get(name)
    if half_scale is None:
        half_scale = add_initializer(graph, name, numbers.astype(np.float16))

    node.replace_input_with(1, half_scale)
    remove_if_unused(scale)
    return True


def _states_type(node: ir.Node) -> bool:
    """Whether an attribute of a Q or DQ fixes the type of its output or of its arithmetic."""
    stated_types = [node.attributes.get_int(name, 0) for name in ("output_dtype", "precision")]
    return any(stated_types)


def _fits_half(numbers: npt.NDArray[Any]) -> bool:
    """Whether half represents numbers exactly and as normal numbers: TensorRT may flush others to zero (R-SCALE)."""
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16)

    is_exact = halves.astype(np.float32) == numbers
    is_normal = halves >= np.finfo(np.float16).tiny
    return bool(np.all(is_exact & is_normal))
