"""Weight scales that are too small for the bias of their layer, made larger."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.errors import ExportError
from qdq.graph.coverage import WEIGHTED_OPS, dequantizer_of, follow_axis, module_of, output_axis
from qdq.graph.pairs import constant_of, input_of, is_op, remove_if_unused
from qdq.text import list_names

_BIAS_CODES = 2.0**30  # half of int32: the sum of products that the bias is added to needs room too
# Of channels of zeros: the smallest that float16 holds with all digits (R-SCALE), so that the bias, in units of it and
# of the input's scale, loses as little as possible.
_DEAD_SCALE = 2.0**-14
_INT8 = np.iinfo(np.int8)

Floats = npt.NDArray[np.float64]


class RaiseWeightScales(ir.passes.InPlacePass):
    """Give weights a scale with which the bias of their layer fits int32.

    A runtime that computes a product in integers adds the bias as int32 in units of input scale * weight scale. Where
    the weights of a channel are zero, or tiny beside its bias, that number does not fit, and ONNX Runtime clips it.

    A channel whose codes are all 0 keeps every number with any scale; where its scale is too small for float16, it
    gets one that is not. Elsewhere each weight moves by half of the new scale at most, so the output of a
    layer with K products per value moves by less than K * 2^-24 of the bias: no more than the order of a float32 sum
    changes. What was clipped stays clipped.

    Args:
        only_dead: Change only what keeps every number, and only where a bias does not fit.
    """

    def __init__(self, only_dead: bool = False) -> None:
        super().__init__()
        self._only_dead = only_dead
        self.changed: list[str] = []
        self.removed_q = self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the weights of the main graph; `changed` names the DQ of each, `removed_*` count copies as -1.

        Raises:
            ExportError: A weight holds NaN or Inf, so that its codes are those of another number.
        """
        self.changed, self.removed_q, self.removed_dq = [], 0, 0
        nodes = list(model.graph)
        if not self._only_dead:
            weights = [weight for node in nodes if (weight := _read_weight(node)) is not None]
            _require_finite(weights)
            for weight in weights:
                self._raise(weight, np.where(weight.dead, _DEAD_SCALE, 0))
        for node in nodes:
            if (least := least_scale(node)) is not None:
                self._raise_for(node, least)
        return ir.passes.PassResult(model, modified=bool(self.changed))

    def _raise_for(self, node: ir.Node, least: Floats) -> None:
        """Raise the scale of the weight of one product; other readers of the weight keep its numbers."""
        weight = _read_weight(dequantizer_of(node.inputs[1]))
        if weight is None:
            return
        grows = weight.raised(least, self._only_dead) > weight.scale
        if np.any(grows & ~weight.dead) and len(weight.dequantize.outputs[0].uses()) > 1:
            if node.inputs[1] is not weight.dequantize.outputs[0]:
                return  # behind a Transpose, which others may read too
            weight = self._copy_pair(weight, node)
        self._raise(weight, least)

    def _raise(self, weight: _Weight, least: Floats) -> None:
        scale = weight.raised(least, self._only_dead)
        with np.errstate(over="ignore"):
            stored = scale.astype(weight.scale_type)
        if not np.any(scale > weight.scale) or not np.all(np.isfinite(stored)):
            return
        pair = [node for node in (weight.quantize, weight.dequantize) if node is not None]
        _set_constant(pair[:1], 0, weight.numbers_for(scale))
        _set_constant(pair, 1, stored)
        self.changed.append(weight.dequantize.name or str(weight.dequantize.outputs[0].name))

    def _copy_pair(self, weight: _Weight, reader: ir.Node) -> _Weight:
        """A DQ, and a Q, of its own for one reader of a weight."""
        value, graph = weight.dequantize.inputs[0], reader.graph
        assert value is not None and graph is not None  # noqa: S101  # it was read from the graph
        suffix = f"_for_{module_of(reader)}"
        if weight.quantize is not None:
            quantize = _copy(weight.quantize, weight.quantize.inputs[0], suffix)
            graph.insert_before(reader, quantize)
            value = quantize.outputs[0]
            self.removed_q -= 1
        dequantize = _copy(weight.dequantize, value, suffix)
        graph.insert_before(reader, dequantize)
        self.removed_dq -= 1
        reader.replace_input_with(1, dequantize.outputs[0])
        copied = _read_weight(dequantize)
        assert copied is not None  # noqa: S101  # it is what was read before
        return copied


@dataclass(frozen=True)
class _Weight:
    """A constant that is quantized to int8 with zero point 0.

    Args:
        dequantize: Its DQ.
        quantize: Its Q; None where the file holds codes.
        numbers: Float weights, or codes where there is no Q.
        scale: As in the file, 0-D or 1-D.
        scale_type: Type of the scale in the file.
        axis: The axis of a 1-D scale.
    """

    dequantize: ir.Node
    quantize: ir.Node | None
    numbers: npt.NDArray[Any]
    scale: Floats
    scale_type: np.dtype[Any]
    axis: int | None

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """Whether all codes are 0, for each scale."""
        sizes = np.abs(self.numbers.astype(np.float64))
        others = tuple(axis for axis in range(sizes.ndim) if axis != self.axis)
        largest = sizes.max(others, initial=0)
        return np.asarray(largest == 0 if self.quantize is None else largest <= self.scale / 2)

    def raised(self, least: Floats, only_dead: bool) -> Floats:
        """The scale, no smaller than `least` where it may change."""
        return np.asarray(
            np.where(self.dead | (not only_dead), np.maximum(self.scale, least), self.scale)
        )

    def numbers_for(self, scale: Floats) -> npt.NDArray[Any]:
        """What the file must hold where the scale becomes another: floats to quantize, or codes."""
        old, new = self._along(self.scale), self._along(scale)
        if self.quantize is None:
            codes = np.rint(self.numbers * (old / new)).clip(_INT8.min, _INT8.max)
            return codes.astype(self.numbers.dtype)
        clipped = self.numbers.astype(np.float64).clip(_INT8.min * old, _INT8.max * old)
        return np.where(new > old, clipped, self.numbers).astype(self.numbers.dtype)

    def _along(self, scale: Floats) -> Floats:
        if self.axis is None:
            return scale
        return scale.reshape([-1 if axis == self.axis else 1 for axis in range(self.numbers.ndim)])


def _require_finite(weights: list[_Weight]) -> None:
    broken = [
        str(w.quantize.name)
        for w in weights
        if w.quantize is not None and not np.isfinite(w.numbers).all()
    ]
    if broken:
        raise ExportError(
            f"{len(broken)} weights hold NaN or Inf, which int8 has no code for: {list_names(broken, 5)}.",
            "look at the parameters that they are computed from.",
        )


def least_scale(node: ir.Node) -> Floats | None:
    """The weight scales below which the bias of a product is more than half of int32, of the shape of the scale.

    None where there is no constant bias, where the operands are not quantized, or where scales are not along the
    output channels.
    """
    bias = constant_of(input_of(node, 2)) if is_op(node, *WEIGHTED_OPS) else None
    if bias is None or not bias.size or node.op_type == "MatMul":
        return None
    weight, activation = (dequantizer_of(input_of(node, position)) for position in (1, 0))
    if weight is None or activation is None:
        return None
    scale, input_scale = constant_of(input_of(weight, 1)), constant_of(input_of(activation, 1))
    if (
        scale is None
        or input_scale is None
        or input_scale.size != 1
        or not float(input_scale.reshape(())) > 0
    ):
        return None
    if scale.size > 1 and (bias.size % scale.size or not _is_along_outputs(node, weight)):
        return None
    # In a grouped transposed convolution several output channels have one scale.
    largest = np.abs(bias.astype(np.float64)).reshape(-1, scale.size).max(0)
    return np.asarray(largest / (_BIAS_CODES * float(input_scale.reshape(()))), np.float64).reshape(
        scale.shape
    )


def _is_along_outputs(node: ir.Node, dequantize: ir.Node) -> bool:
    codes = dequantize.inputs[0]
    shape = None if codes is None else codes.shape
    array = constant_of(codes)
    rank = array.ndim if array is not None else len(shape) if shape is not None else 0
    if not rank:
        return False
    axis = dequantize.attributes.get_int("axis", 1) % rank
    return follow_axis(node.inputs[1], dequantize, axis) == output_axis(node, rank)


def _read_weight(dequantize: ir.Node | None) -> _Weight | None:
    """The constant behind a DQ; None for other nodes, other types and other zero points."""
    if (
        dequantize is None
        or not is_op(dequantize, "DequantizeLinear")
        or not _is_symmetric(dequantize)
    ):
        return None
    codes, scale = dequantize.inputs[0], constant_of(input_of(dequantize, 1))
    producer = None if codes is None else codes.producer()
    quantize = producer if producer is not None and is_op(producer, "QuantizeLinear") else None
    numbers = constant_of(codes) if quantize is None else constant_of(quantize.inputs[0])
    if numbers is None or scale is None or scale.ndim > 1:
        return None
    if quantize is None and numbers.dtype != np.int8:
        return None
    if quantize is not None and (
        len(quantize.outputs[0].uses()) > 1 or not _is_pair(quantize, scale)
    ):
        return None
    axis = (
        dequantize.attributes.get_int("axis", 1) % max(numbers.ndim, 1) if scale.size > 1 else None
    )
    if axis is not None and numbers.shape[axis] != scale.size:
        return None
    return _Weight(dequantize, quantize, numbers, scale.astype(np.float64), scale.dtype, axis)


def _is_symmetric(node: ir.Node) -> bool:
    """Whether the codes are int8 with zero point 0; a DQ of int8 codes need not write it."""
    zeros = constant_of(input_of(node, 2))
    if input_of(node, 2) is None:
        return node.op_type == "DequantizeLinear"
    return zeros is not None and zeros.dtype == np.int8 and not zeros.any()


def _is_pair(quantize: ir.Node, scale: npt.NDArray[Any]) -> bool:
    other = constant_of(input_of(quantize, 1))
    return other is not None and _is_symmetric(quantize) and np.array_equal(other, scale)


def _copy(node: ir.Node, value: ir.Value | None, suffix: str) -> ir.Node:
    output = node.outputs[0]
    copy = ir.node(
        node.op_type,
        [value, *node.inputs[1:]],
        attributes=dict(node.attributes),
        name=f"{node.name}{suffix}",
    )
    copy.outputs[0].name = f"{output.name}{suffix}"
    copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
    return copy


def _set_constant(readers: list[ir.Node], position: int, array: npt.NDArray[Any]) -> None:
    """Give nodes another constant, under the name of the old one unless that has other readers."""
    for reader in readers:
        old, graph = reader.inputs[position], reader.graph
        assert old is not None and graph is not None  # noqa: S101  # it was read from the graph
        present = constant_of(old)
        if present is not None and np.array_equal(present, array):
            continue
        if old.is_initializer() and {user for user, _ in old.uses()} <= set(readers):
            old.const_value = ir.tensor(array, name=old.name)
            continue
        names = (f"{old.name}_{number}" for number in itertools.count(2))
        name = next(name for name in names if name not in graph.initializers)
        tensor = ir.tensor(array, name=name)
        new = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(new)
        for user in readers:
            if user.inputs[position] is old:
                user.replace_input_with(position, new)
        remove_if_unused(old)
