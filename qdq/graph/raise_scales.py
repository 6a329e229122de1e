"""Raise weight scales that are too small for the bias of their layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.errors import ExportError
from qdq.graph.coverage import dequantizer_of, follow_axis, module_of, output_axis
from qdq.graph.edits import add_initializer, find_free_name, remove_if_unused
from qdq.graph.pairs import constant_of, input_of, is_int8_zero, is_op, producer_of
from qdq.graph.work import WEIGHTED_OPS
from qdq.text import list_names

_BIAS_CODES = 2.0**30  # half of int32: the sum of products that the bias is added to needs room too
# For channels of zeros: the smallest normal float16 number (R-SCALE), so that the bias, in units of it and of the scale
# of the input, loses as little as possible.
_DEAD_SCALE = 2.0**-14
_INT8 = np.iinfo(np.int8)

Floats = npt.NDArray[np.float64]


class RaiseWeightScales(ir.passes.InPlacePass):
    """Give weights a scale with which the bias of their layer fits int32.

    A runtime that computes a product in integers adds the bias as int32 in units of input scale * weight scale. If the
    weights of a channel are zero, or tiny compared with its bias, that number does not fit, and ONNX Runtime clips it.

    A channel whose codes are all 0 keeps its numbers with any scale; if its scale is too small for float16, it gets a
    larger one. Other weights change by at most half of the new scale, so the output of a layer with K products per
    value changes by less than K * 2^-24 of the bias: no more than a different order of summation in float32. Clipped
    weights stay clipped.

    Args:
        only_dead: Change only channels whose numbers do not change, and only if a bias does not fit.
    """

    def __init__(self, only_dead: bool = False) -> None:
        super().__init__()
        self._only_dead = only_dead
        self.changed: list[str] = []
        """Names of the DQ of the weights that were changed."""
        self.removed_q = 0
        self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the weights of the main graph; `removed_q` and `removed_dq` count each copy of a pair as -1.

        Raises:
            ExportError: A weight contains NaN or Inf, for which there is no code.
        """
        self.changed = []
        self.removed_q = 0
        self.removed_dq = 0

        nodes = list(model.graph)
        if not self._only_dead:
            self._raise_dead_channels(nodes)
        for node in nodes:
            smallest_scale = least_scale(node)
            if smallest_scale is not None:
                self._raise_weight_of(node, smallest_scale)

        return ir.passes.PassResult(model, modified=bool(self.changed))

    def _raise_dead_channels(self, nodes: list[ir.Node]) -> None:
        """Give channels of zeros a scale that fits float16."""
        weights = []
        for node in nodes:
            weight = _read_weight(node)
            if weight is not None:
                weights.append(weight)

        _require_finite(weights)
        for weight in weights:
            self._raise_scale(weight, np.where(weight.dead, _DEAD_SCALE, 0))

    def _raise_weight_of(self, product: ir.Node, smallest_scale: Floats) -> None:
        """Raise the scale of the weight of one product; other readers of the weight keep its numbers."""
        weight = _read_weight(dequantizer_of(product.inputs[1]))
        if weight is None:
            return

        output = weight.dequantize.outputs[0]
        is_shared = len(output.uses()) > 1
        if is_shared and self._changes_numbers(weight, smallest_scale):
            if product.inputs[1] is not output:
                return  # it is after a Transpose, which other nodes may read too
            weight = self._copy_pair(weight, product)

        self._raise_scale(weight, smallest_scale)

    def _changes_numbers(self, weight: _Weight, smallest_scale: Floats) -> bool:
        """Whether a channel that is not all zeros would get a larger scale."""
        grows = weight.raised(smallest_scale, self._only_dead) > weight.scale
        return bool(np.any(grows & ~weight.dead))

    def _raise_scale(self, weight: _Weight, smallest_scale: Floats) -> None:
        """Write larger scales, and the numbers that go with them, if any scale grows and the file can store all."""
        scale = weight.raised(smallest_scale, self._only_dead)
        with np.errstate(over="ignore"):
            stored_scale = scale.astype(weight.scale_type)

        has_grown = np.any(scale > weight.scale)
        if not has_grown or not np.all(np.isfinite(stored_scale)):
            return

        _set_constant(weight.nodes[:1], 0, weight.numbers_for(scale))
        _set_constant(weight.nodes, 1, stored_scale)
        self.changed.append(weight.dequantize.name or str(weight.dequantize.outputs[0].name))

    def _copy_pair(self, weight: _Weight, reader: ir.Node) -> _Weight:
        """Give one reader of a weight a separate DQ, and a separate Q."""
        value = weight.dequantize.inputs[0]
        graph = reader.graph
        assert value is not None and graph is not None  # noqa: S101  # it was read from the graph

        suffix = f"_for_{module_of(reader)}"
        if weight.quantize is not None:
            quantize = _copy_node(weight.quantize, weight.quantize.inputs[0], suffix)
            graph.insert_before(reader, quantize)
            self.removed_q -= 1
            value = quantize.outputs[0]

        dequantize = _copy_node(weight.dequantize, value, suffix)
        graph.insert_before(reader, dequantize)
        self.removed_dq -= 1
        reader.replace_input_with(1, dequantize.outputs[0])

        copied_weight = _read_weight(dequantize)
        assert copied_weight is not None  # noqa: S101  # the original could be read
        return copied_weight


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A constant that is quantized to int8 with zero point 0.

    Args:
        dequantize: Its DQ.
        quantize: Its Q; None if the file contains codes.
        numbers: Float weights, or codes if there is no Q.
        scale: As in the file, 0-D or 1-D.
        scale_type: Type of the scale in the file.
        axis: The axis of a 1-D scale; None for one scale.
    """

    dequantize: ir.Node
    quantize: ir.Node | None
    numbers: npt.NDArray[Any]
    scale: Floats
    scale_type: np.dtype[Any]
    axis: int | None

    @property
    def nodes(self) -> list[ir.Node]:
        """The Q, if there is one, and the DQ."""
        if self.quantize is None:
            return [self.dequantize]
        return [self.quantize, self.dequantize]

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """For each scale, whether all codes are 0."""
        sizes = np.abs(self.numbers.astype(np.float64))
        reduced_axes = tuple(axis for axis in range(sizes.ndim) if axis != self.axis)
        largest = sizes.max(reduced_axes, initial=0)
        if self.quantize is None:
            return np.asarray(largest == 0)

        # A float of half a scale is rounded to the even code, which is 0.
        return np.asarray(largest <= self.scale / 2)

    def raised(self, smallest_scale: Floats, only_dead: bool) -> Floats:
        """The scale, at least `smallest_scale` where it may change."""
        larger_scale = np.maximum(self.scale, smallest_scale)
        if only_dead:
            return np.where(self.dead, larger_scale, self.scale)
        return np.asarray(larger_scale)

    def numbers_for(self, scale: Floats) -> npt.NDArray[Any]:
        """The numbers for the file with another scale: floats to quantize, or codes."""
        old_scale = self._broadcast(self.scale)
        new_scale = self._broadcast(scale)
        if self.quantize is None:
            codes = np.rint(self.numbers * (old_scale / new_scale))
            return codes.clip(_INT8.min, _INT8.max).astype(self.numbers.dtype)

        # Without this, floats that the old scale clips would get larger codes with the new one.
        floats = self.numbers.astype(np.float64)
        clipped_floats = floats.clip(_INT8.min * old_scale, _INT8.max * old_scale)
        floats_for_scale = np.where(new_scale > old_scale, clipped_floats, self.numbers)
        return floats_for_scale.astype(self.numbers.dtype)

    def _broadcast(self, scale: Floats) -> Floats:
        """The scales in a shape that numpy can combine with the weights."""
        if self.axis is None:
            return scale

        shape = [1] * self.numbers.ndim
        shape[self.axis] = -1
        return scale.reshape(shape)


def _read_weight(dequantize: ir.Node | None) -> _Weight | None:
    """The constant that a DQ reads, directly or through a Q.

    Args:
        dequantize: Any node, or none.

    Returns:
        None for other nodes, other types than int8 and other zero points than 0. None too if Q and DQ have different
        scales, or if the codes of the Q have other readers.
    """
    if not is_op(dequantize, "DequantizeLinear") or not _is_symmetric(dequantize):
        return None

    scale = constant_of(input_of(dequantize, 1))
    if scale is None or scale.ndim > 1:
        return None

    quantize = producer_of(dequantize.inputs[0])
    if is_op(quantize, "QuantizeLinear"):
        if not _is_pair(quantize, scale):
            return None
        numbers = constant_of(quantize.inputs[0])
    else:
        quantize = None
        numbers = _codes_of(dequantize)
    if numbers is None:
        return None

    axis = None
    if scale.size > 1:
        axis = dequantize.attributes.get_int("axis", 1) % max(numbers.ndim, 1)
        if numbers.shape[axis] != scale.size:
            return None

    return _Weight(
        dequantize=dequantize,
        quantize=quantize,
        numbers=numbers,
        scale=scale.astype(np.float64),
        scale_type=scale.dtype,
        axis=axis,
    )


def _codes_of(dequantize: ir.Node) -> npt.NDArray[Any] | None:
    """The int8 codes that a DQ reads, if they are constant."""
    codes = constant_of(dequantize.inputs[0])
    if codes is None or codes.dtype != np.int8:
        return None
    return codes


def _is_symmetric(node: ir.Node) -> bool:
    """Whether the codes are int8 with zero point 0; a DQ of int8 codes may omit the zero point."""
    if input_of(node, 2) is None:
        return node.op_type == "DequantizeLinear"

    zero_point = constant_of(input_of(node, 2))
    return is_int8_zero(zero_point)


def _is_pair(quantize: ir.Node, scale: npt.NDArray[Any]) -> bool:
    """Whether a Q and the DQ after it can get another scale together.

    Args:
        quantize: The Q.
        scale: Scale of the DQ, which the Q must have too. The DQ must be the only reader of the Q.
    """
    has_single_reader = len(quantize.outputs[0].uses()) <= 1
    if not has_single_reader or not _is_symmetric(quantize):
        return False

    quantize_scale = constant_of(input_of(quantize, 1))
    return quantize_scale is not None and np.array_equal(quantize_scale, scale)


def _require_finite(weights: list[_Weight]) -> None:
    """Refuse weights that contain NaN or Inf."""
    broken_names = []
    for weight in weights:
        is_finite = np.isfinite(weight.numbers).all()
        if weight.quantize is not None and not is_finite:
            broken_names.append(str(weight.quantize.name))

    if broken_names:
        raise ExportError(
            f"{len(broken_names)} weights contain NaN or Inf, which int8 has no code for: "
            f"{list_names(broken_names, 5)}.",
            "check the parameters that they are computed from.",
        )


# --- the smallest scale ---------------------------------------------------------------------------------------------


def least_scale(node: ir.Node) -> Floats | None:
    """The weight scales below which the bias of a product is more than half of int32.

    Args:
        node: Any node.

    Returns:
        One number for each weight scale, in its shape. None if there is no constant bias, if the operands are not
        quantized, or if scales are not along the output channels.
    """
    bias = _bias_of(node)
    if bias is None:
        return None

    weight = dequantizer_of(input_of(node, 1))
    activation = dequantizer_of(input_of(node, 0))
    if weight is None or activation is None:
        return None

    scale = constant_of(input_of(weight, 1))
    input_scale = _positive_scalar(constant_of(input_of(activation, 1)))
    if scale is None or input_scale is None:
        return None
    if scale.size > 1:
        is_divisible = bias.size % scale.size == 0
        if not is_divisible or not _is_along_outputs(node, weight):
            return None

    # In a grouped transposed convolution several output channels have one scale.
    biases_of_scales = np.abs(bias.astype(np.float64)).reshape(-1, scale.size)
    smallest_scales = biases_of_scales.max(0) / (_BIAS_CODES * input_scale)
    return np.asarray(smallest_scales, np.float64).reshape(scale.shape)


def _bias_of(node: ir.Node) -> npt.NDArray[Any] | None:
    """The constant bias of a product.

    Returns:
        None if it has none, like a MatMul, or if the bias is computed.
    """
    if not is_op(node, *WEIGHTED_OPS) or node.op_type == "MatMul":
        return None

    bias = constant_of(input_of(node, 2))
    if bias is None or not bias.size:
        return None
    return bias


def _positive_scalar(scale: npt.NDArray[Any] | None) -> float | None:
    """The number of a scale, if it is a single number above 0.

    Args:
        scale: From `constant_of`.
    """
    if scale is None or scale.size != 1:
        return None

    number = float(scale.reshape(()))
    if not number > 0:  # NaN is not above 0 either
        return None
    return number


def _is_along_outputs(node: ir.Node, dequantize: ir.Node) -> bool:
    """Whether the scales of a weight are along the output channels of a product.

    Args:
        node: The product.
        dequantize: The DQ of its weight, which may be before a Transpose.
    """
    rank = _rank_of(dequantize.inputs[0])
    if not rank:
        return False

    axis = dequantize.attributes.get_int("axis", 1) % rank
    return follow_axis(node.inputs[1], dequantize, axis) == output_axis(node, rank)


def _rank_of(value: ir.Value | None) -> int:
    """The number of dimensions of a value.

    Returns:
        0 if it is not known, and for a scalar.
    """
    array = constant_of(value)
    if array is not None:
        return array.ndim
    if value is None or value.shape is None:
        return 0
    return len(value.shape)


# --- edits ----------------------------------------------------------------------------------------------------------


def _copy_node(node: ir.Node, value: ir.Value | None, suffix: str) -> ir.Node:
    """A copy of a Q or DQ that reads another value, with a suffix to its names."""
    copy = ir.node(
        node.op_type,
        [value, *node.inputs[1:]],
        attributes=dict(node.attributes),
        name=f"{node.name}{suffix}",
    )
    output = node.outputs[0]
    copied_output = copy.outputs[0]
    copied_output.name = f"{output.name}{suffix}"
    copied_output.shape = output.shape
    copied_output.type = output.type
    return copy


def _set_constant(readers: list[ir.Node], position: int, array: npt.NDArray[Any]) -> None:
    """Give nodes another constant.

    The new constant takes the name of the old one, unless that has other readers.

    Args:
        readers: The nodes.
        position: Position of the input.
        array: The numbers of the new constant.
    """
    for reader in readers:
        old_value = reader.inputs[position]
        graph = reader.graph
        assert old_value is not None and graph is not None  # noqa: S101  # it was read from the graph

        old_array = constant_of(old_value)
        if old_array is not None and np.array_equal(old_array, array):
            continue

        users = {user for user, _ in old_value.uses()}
        if old_value.is_initializer() and users <= set(readers):
            old_value.const_value = ir.tensor(array, name=old_value.name)
            continue

        name = find_free_name(graph, f"{old_value.name}_", 2)
        new_value = add_initializer(graph, name, array)
        for user in readers:
            if user.inputs[position] is old_value:
                user.replace_input_with(position, new_value)
        remove_if_unused(old_value)
