"""Scales channels up in one layer and down in the next, so that one range for a tensor wastes fewer codes.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction,
ICCV 2019 (arXiv 1906.04721), section 4.1; the balance between activation and weight is from SmoothQuant (Xiao et
al., ICML 2023, arXiv 2211.10438): s_c = w_c^(1 - a) / r_c^a, w_c the largest weight that reads channel c, r_c the
largest value of the channel. The exponent a is the one with the least predicted noise after the readers:

    noise ~ D_x^2 sum W^2 + sum_o D_o^2 sum E[x^2],   D the steps of the input and of the filters

With a range for each output channel, scaling the layer that writes a tensor costs no accuracy, nor does scaling a
depthwise convolution that reads it. Functions between the two must commute with a positive factor for each channel:
ReLU, pooling, residual adds. So the float model stays the same apart from rounding. ReLU6 and other clamps commute only
if no value reaches the clamp, and calibration data cannot show whether one will. So tensors with an upper clamp are
left unchanged.

Where only functions lie between that keep a shift of a channel (residual adds, pooling), the mean of each channel moves
from the bias of the writer to the biases of the readers. The range of a tensor is symmetric, so a mean takes codes away
from what carries information. This is the bias absorption of the same paper (section 4.1.3), exact without a ReLU.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.float_layers import (
    ScalableLayers,
    list_unchanged,
    pads_input,
    pads_zeros,
    require_float_model,
    rounding_db,
    undoing_changes,
)
from qdq.accuracy.layerwise import FlatArrays, FlatOutputs, list_decibels
from qdq.batch import list_filled_batches
from qdq.calibrate import calibrate_model
from qdq.dataflow import Dataflow, clamp_of
from qdq.device import read_numbers, without_tf32
from qdq.forward import (
    Operation,
    call_model,
    evaluating,
    require_model,
    trace_forward,
)
from qdq.functions import (
    ACTIVATIONS,
    AVERAGES,
    CONVOLUTIONS,
    HOMOGENEOUS,
    IDENTITIES,
    MAX_POOLINGS,
    RESHAPES,
    SHIFT_KEEPERS,
)
from qdq.quantizer import disable_quantization
from qdq.swap import quantized_layers, restore_modules, swap_modules

logger = logging.getLogger(__name__)

_ELEMENTWISE = HOMOGENEOUS & (ACTIVATIONS | IDENTITIES)
_POOLINGS = HOMOGENEOUS & (AVERAGES | MAX_POOLINGS)
_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_STEPS = 127  # int8 codes between 0 and the end of a range
# Largest factor. A channel that needs more is almost dead on this data, but may not be on other data.
_LARGEST = 16.0
_WORTHWHILE = 0.99  # equalization must lower the predicted noise below this fraction


@dataclass(frozen=True)
class EqualizedTensor:
    """Result for the channels of one tensor, or of several tensors that a residual add ties together.

    Args:
        written_by: Layers that write it.
        read_by: Layers that read it.
        exponent: The balance that was chosen, 0 if the channels were not scaled.
        predicted_db: Predicted reduction of the noise after the readers, in dB.
        reason: Why nothing was changed; empty if it was.
        is_centered: Whether the means of the channels moved to the biases of the readers.
    """

    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    exponent: float
    predicted_db: float
    reason: str = ""
    is_centered: bool = False


@dataclass(frozen=True)
class Equalization:
    """Result of `equalize_layers`.

    Args:
        tensors: In the order in which they are written.
        float_db: SQNR of the float outputs against those before the pass, on the same batches, in dB: 100 and more
            means that only float32 rounding changed them.
        before_db: SQNR of the int8 outputs before the pass against the float outputs before it, on the same batches,
            in dB. The model is quantized by `swap_modules` on the first batch, with the largest values as ranges. None
            if no layer is quantized.
        after_db: The same after the pass.
    """

    tensors: tuple[EqualizedTensor, ...]
    float_db: float
    before_db: float | None
    after_db: float | None

    def format_table(self) -> str:
        """Number of equalized tensors, the effect on the float model, and why tensors were left unchanged."""
        sqnr = "nothing to quantize"
        if self.before_db is not None and self.after_db is not None:
            sqnr = f"SQNR in int8 {self.before_db:.2f} to {self.after_db:.2f} dB"
        equalized = [tensor for tensor in self.tensors if not tensor.reason]
        lines = [
            f"{len(equalized)} of {len(self.tensors)} tensors equalized: {sqnr}; "
            f"float model against the one before: {self.float_db:.1f} dB"
        ]
        lines += list_unchanged(
            (tensor.reason, ", ".join(tensor.written_by)) for tensor in self.tensors
        )
        return "\n".join(lines)


@without_tf32()
def equalize_layers(model: nn.Module, batches: Iterable[Any]) -> Equalization:
    """Scale the channels between layers so that they use a common range better; in place.

    Call it after `fold_batchnorm` and before `swap_modules`. A tensor is left unchanged if one of its readers or
    writers is not a convolution or linear layer, if a parameter of these is also used elsewhere, if it is an output of
    the model, or if no less noise is predicted. A change of the float outputs beyond rounding is undone. On a GPU,
    everything runs without TF32, which rounds more than that.

    Args:
        model: A float model; its layers are quantized temporarily, to measure the effect of the pass.
        batches: As for `calibrate_model`; iterated once and kept in memory.

    Returns:
        The tensors, how exactly the float model was preserved, and the SQNR in int8 before and after.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch with samples.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    samples = list_filled_batches(batches)
    require_float_model(model, "equalize_layers")
    groups = _find_groups(model, samples[0])
    expected = _observe(model, samples, groups)
    swap_modules(model, samples[0])
    try:
        before_db = _measure_int8(model, samples, expected)
        with disable_quantization(model):
            tensors, float_db = _equalize_exactly(model, samples, groups, expected)
        after_db = _measure_int8(model, samples, expected)
    finally:
        restore_modules(model)
    return Equalization(tuple(tensors), float_db, before_db, after_db)


def _measure_int8(model: nn.Module, batches: list[Any], expected: FlatArrays) -> float | None:
    """SQNR in dB of the swapped model with maxima as ranges, None if no layer is quantized."""
    if not quantized_layers(model):
        return None
    calibrate_model(model, batches, method="max")
    return _sqnr(expected, _observe(model, batches, []))


def _sqnr(expected: FlatArrays, actual: FlatArrays) -> float:
    """In dB, of the worst output; minus infinity if one is missing or has another size."""
    return min(list_decibels(expected, actual).values())


def _equalize_exactly(
    model: nn.Module, batches: list[Any], groups: list[_Group], expected: FlatArrays
) -> tuple[list[EqualizedTensor], float]:
    """Equalize all groups; if the float outputs change beyond rounding, equalize one by one and undo those that do so.

    Returns:
        The results, and the SQNR of the float outputs in dB.
    """
    limit_db = rounding_db(model)
    with undoing_changes(_list_layers(groups)) as undo:
        tensors = [_equalize(group) for group in groups]
        float_db = _sqnr(expected, _observe(model, batches, []))
        if float_db >= limit_db:
            return tensors, float_db
        undo()

    tensors, float_db = [], inf
    for group in groups:
        with undoing_changes(_list_layers([group])) as undo:
            tensor = _equalize(group)
            if not tensor.reason:
                moved_db = _sqnr(expected, _observe(model, batches, []))
                if moved_db < limit_db:
                    undo()
                    reason = f"undone: it changed the float outputs, SQNR {moved_db:.1f} dB"
                    tensor = replace(
                        tensor, exponent=0.0, predicted_db=0.0, reason=reason, is_centered=False
                    )
                else:
                    float_db = moved_db
        tensors.append(tensor)
    return tensors, float_db


def _list_layers(groups: Iterable[_Group]) -> list[Any]:
    """The layers around the groups that may be scaled."""
    layers: list[Any] = []
    for group in groups:
        if not group.reason:
            layers += [*group.writers.values(), *group.readers.values()]
    return layers


@dataclass(frozen=True)
class _ChannelStatistics:
    """Statistics of the channels of a tensor.

    Args:
        highest: Largest value of each channel, `[C]`.
        lowest: Smallest value, likewise.
        total: Sum, float64.
        energy: Sum of squares, float64.
        rows: Number of positions in all samples.
    """

    highest: torch.Tensor
    lowest: torch.Tensor
    total: torch.Tensor
    energy: torch.Tensor
    rows: int

    @property
    def largest(self) -> torch.Tensor:
        """Largest absolute value of each channel, `[C]`."""
        return torch.maximum(self.highest, -self.lowest)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each channel, float64 `[C]`."""
        return self.total / self.rows

    def merge(self, statistics: _ChannelStatistics) -> _ChannelStatistics:
        return _ChannelStatistics(
            torch.maximum(self.highest, statistics.highest),
            torch.minimum(self.lowest, statistics.lowest),
            self.total + statistics.total,
            self.energy + statistics.energy,
            self.rows + statistics.rows,
        )

    def subtract(self, shift: torch.Tensor) -> _ChannelStatistics:
        """The statistics of the tensor minus a constant for each channel, float64 `[C]`."""
        return _ChannelStatistics(
            self.highest - shift.float(),
            self.lowest - shift.float(),
            self.total - self.rows * shift,
            self.energy - 2 * shift * self.total + self.rows * shift.square(),
            self.rows,
        )


@dataclass
class _Group:
    """Tensors that need the same factors for their channels, with the layers around them.

    Args:
        writers: Layers that write them, by name.
        readers: Layers that read them, by name.
        axes: The channel axes of the functions around them.
        reason: Why they must stay unchanged, "" if they may be scaled.
        keeps_shifts: Whether the functions between keep a shift of a channel.
        terms: Reader -> how often the output of each writer is a term of its input.
        inputs: Reader -> statistics of its input.
        outputs: Writer -> statistics of its output, if the channels may be centered.
    """

    writers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, Any] = field(default_factory=dict)
    axes: set[int] = field(default_factory=set)
    reason: str = ""
    keeps_shifts: bool = True
    terms: dict[str, Counter[str]] = field(default_factory=dict)
    inputs: dict[str, _ChannelStatistics] = field(default_factory=dict)
    outputs: dict[str, _ChannelStatistics] = field(default_factory=dict)

    @property
    def can_center(self) -> bool:
        """Whether means may move from the writers to the readers."""
        layers = [*self.writers.values(), *self.readers.values()]
        if not self.keeps_shifts or any(layer.bias is None for layer in layers):
            return False
        return not any(pads_input(layer) for layer in self.readers.values())


class _ChannelGroups:
    """Groups of tensors, as a union of sets; a tensor is identified by its number in the trace."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._groups: dict[int, _Group] = {}

    def root(self, value: int) -> int:
        while self._parents.setdefault(value, value) != value:
            value = self._parents[value]
        return value

    def group(self, value: int) -> _Group:
        return self._groups.setdefault(self.root(value), _Group())

    def join(self, first: int, second: int) -> _Group:
        """Put two tensors into one group."""
        group, absorbed = self.group(first), self.group(second)
        if group is not absorbed:
            group.writers |= absorbed.writers
            group.readers |= absorbed.readers
            group.axes |= absorbed.axes
            group.reason = group.reason or absorbed.reason
            group.keeps_shifts = group.keeps_shifts and absorbed.keeps_shifts
            group.terms |= absorbed.terms
            self._parents[self.root(second)] = self.root(first)
        return group

    def pin(self, values: Iterable[int], reason: str) -> None:
        """Leave the groups of some tensors unchanged; the first reason stays."""
        for value in values:
            group = self.group(value)
            group.reason = group.reason or reason

    def list_written(self) -> list[_Group]:
        """The groups that a layer writes, in order."""
        groups: dict[int, _Group] = {}
        for value in self._parents:
            root = self.root(value)
            groups[root] = self._groups[root]
        return [group for group in groups.values() if group.writers]


def _find_groups(model: nn.Module, example_inputs: Any) -> list[_Group]:
    """Every group of tensors that a layer writes, in order; `reason` says why one must stay unchanged."""
    trace = trace_forward(model, example_inputs)
    flow = Dataflow(trace)
    layers = ScalableLayers(model, trace)
    groups = _ChannelGroups()
    groups.pin(flow.inputs, "it is an input of the model")
    terms: dict[int, Counter[str]] = {}  # of each tensor
    for operation in flow.operations:
        computed = [value for value in operation.inputs if flow.is_computed(value)]
        if not computed:
            continue
        layer = layers.find(operation)
        if layer is None:
            _pass_on(groups, flow, operation, computed)
            terms[operation.outputs[0]] = _add_terms(terms, computed)
        else:
            _add_layer(groups, flow, operation, layer, computed[0])
            groups.group(computed[0]).terms[operation.module] = _add_terms(terms, computed[:1])
            terms[operation.outputs[0]] = Counter([operation.module])
            reason = layers.reason_against(operation, computed, len(flow.shapes[computed[0]]))
            if reason:
                groups.pin([*computed, *operation.outputs], reason)
    groups.pin(flow.outputs, "it is an output of the model")

    written = groups.list_written()
    for group in written:
        if group.reason:
            continue
        if not group.readers:
            group.reason = "no layer reads it"
        elif len(group.axes) > 1:
            group.reason = "its layers have different channel axes"
    return written


def _add_terms(terms: dict[int, Counter[str]], values: list[int]) -> Counter[str]:
    """The terms of a sum of some tensors."""
    total: Counter[str] = Counter()
    for value in values:
        total.update(terms.get(value, Counter()))
    return total


def _add_layer(
    groups: _ChannelGroups, flow: Dataflow, operation: Operation, layer: nn.Module, value: int
) -> None:
    """Register a layer as the reader of its input and the writer of its output.

    Args:
        groups: The groups.
        flow: The data flow of the model.
        operation: The product of the layer.
        layer: The layer.
        value: The input that the layer multiplies with its weight.
    """
    output = operation.outputs[0]
    groups.group(value).readers[operation.module] = layer
    groups.group(value).axes.add(_channel_axis(operation, flow.shapes[value]))
    groups.group(output).writers[operation.module] = layer
    groups.group(output).axes.add(_channel_axis(operation, flow.shapes[output]))


def _channel_axis(operation: Operation, shape: Sequence[int]) -> int:
    return 1 if operation.function in CONVOLUTIONS else len(shape) - 1


def _pass_on(
    groups: _ChannelGroups, flow: Dataflow, operation: Operation, computed: list[int]
) -> None:
    """Join input and output of a function that commutes with positive factors; pin those of other functions.

    Args:
        groups: The groups.
        flow: The data flow of the model.
        operation: A function that is not the product of a layer.
        computed: Its inputs that depend on the input of the model.
    """
    first = computed[0]
    output = operation.outputs[0]
    if _is_residual_add(flow, operation, computed):
        groups.join(first, computed[1])
        group = groups.join(first, output)
        group.keeps_shifts = group.keeps_shifts and "alpha" not in operation.arguments
        return

    is_unary = len(computed) == 1
    clamp = clamp_of(operation)
    if is_unary and (clamp == (0.0, inf) or operation.function in _ELEMENTWISE):
        group = groups.join(first, output)
        group.keeps_shifts = group.keeps_shifts and operation.function in SHIFT_KEEPERS
        return
    if clamp is not None:
        reason = f"{operation.function} clamps it, and factors would move the bound"
        groups.pin([first, output], reason)
        return
    if is_unary and (operation.function in _POOLINGS or _is_by_channel(flow, operation, first)):
        group = groups.join(first, output)
        group.axes.add(1)
        group.keeps_shifts = group.keeps_shifts and operation.function in SHIFT_KEEPERS
        return
    reason = f"{operation.function} does not commute with factors of its channels"
    groups.pin([*computed, *operation.outputs], reason)


def _is_residual_add(flow: Dataflow, operation: Operation, computed: list[int]) -> bool:
    """Whether a function adds two computed tensors of one shape, the shape of the result."""
    if operation.function != "add" or len(computed) != 2:
        return False
    first, second = computed
    return flow.shapes[second] == flow.shapes[first]


def _is_by_channel(flow: Dataflow, operation: Operation, value: int) -> bool:
    """Whether a function that may mix channels does not mix them here.

    This is so for zero padding, for flattening single pixels and for means over the pixels of each channel.
    """
    shape = flow.shapes[value]
    output_shape = flow.shapes[operation.outputs[0]]
    keeps_channels = shape[:2] == output_shape[:2]
    if operation.function == "pad":
        return keeps_channels and pads_zeros(operation)
    if operation.function in RESHAPES:
        return keeps_channels and prod(shape) == prod(output_shape)
    if operation.function == "mean":
        # If a side has as many pixels as there are channels, the shape does not show the axes of the mean.
        is_unambiguous = len(shape) == 4 and shape[1] not in shape[2:]
        return is_unambiguous and output_shape in (shape[:2], (*shape[:2], 1, 1))
    return False


def _observe(model: nn.Module, batches: list[Any], groups: list[_Group]) -> FlatArrays:
    """Run all batches, collect the statistics of the groups, and return the outputs by name."""
    outputs = FlatOutputs()
    task = "equalize" if groups else "verify"
    with ExitStack() as hooks:
        for group in groups:
            if not group.reason:
                _watch_layers(group, hooks)
        with evaluating(model):
            for batch in tqdm(batches, desc=task, unit="batch", disable=None):
                outputs.add(call_model(model, batch), batch)
    return outputs.join()


def _watch_layers(group: _Group, hooks: ExitStack) -> None:
    """Collect the statistics of the inputs of readers, and of the outputs of writers, until `hooks` is closed."""
    for name, layer in group.readers.items():
        collect = partial(_collect_input, group, name)
        handle = layer.register_forward_pre_hook(collect, with_kwargs=True)
        hooks.callback(handle.remove)
    if group.can_center:
        for name, layer in group.writers.items():
            handle = layer.register_forward_hook(partial(_collect_output, group, name))
            hooks.callback(handle.remove)


def _collect_input(group: _Group, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    _collect(group.inputs, name, layer, next(iter((*args, *kwargs.values()))))


def _collect_output(
    group: _Group, name: str, layer: nn.Module, _: Any, output: torch.Tensor
) -> None:
    _collect(group.outputs, name, layer, output)


def _collect(
    collected: dict[str, _ChannelStatistics], name: str, layer: nn.Module, x: torch.Tensor
) -> None:
    """Add the input or output of a layer to its statistics."""
    x = x.detach().float()
    if not isinstance(layer, Linear):
        x = x.movedim(1, -1)
    rows = x.flatten(0, -2)
    precise = rows.double()
    statistics = _ChannelStatistics(
        rows.amax(0), rows.amin(0), precise.sum(0), precise.square().sum(0), len(rows)
    )
    if name in collected:
        statistics = statistics.merge(collected[name])
    collected[name] = statistics


@torch.no_grad()
def _equalize(group: _Group) -> EqualizedTensor:
    """Choose means to move and factors for one group, and apply them."""
    writers, readers = tuple(group.writers), tuple(group.readers)
    if group.reason:
        return EqualizedTensor(writers, readers, 0.0, 0.0, group.reason)
    unchanged = torch.ones_like(next(iter(group.inputs.values())).highest)
    noise_before = float(_noise(group, unchanged))
    is_centered = _center(group, noise_before, unchanged)

    candidates = {exponent: _factors(group, exponent) for exponent in _EXPONENTS}
    products = [_noise(group, factors) for factors in (unchanged, *candidates.values())]
    noise_unscaled, *noise_after = read_numbers(products)
    noise = dict(zip(candidates, noise_after, strict=True))
    exponent = min(noise, key=noise.__getitem__)
    if noise[exponent] < _WORTHWHILE * noise_unscaled:
        _apply(group, candidates[exponent])
    elif is_centered:
        exponent = 0.0
        noise[exponent] = noise_unscaled
    else:
        reason = "no factors are predicted to lower the noise"
        return EqualizedTensor(writers, readers, 0.0, 0.0, reason)
    predicted_db = float(10 * np.log10(noise_before / noise[exponent]))
    return EqualizedTensor(writers, readers, exponent, predicted_db, is_centered=is_centered)


def _center(group: _Group, noise_before: float, unchanged: torch.Tensor) -> bool:
    """Move the means of the outputs of the writers to the biases of the readers, if less noise is predicted.

    Returns:
        Whether they were moved.
    """
    if not group.can_center:
        return False
    means = {name: statistics.mean for name, statistics in group.outputs.items()}
    inputs = dict(group.inputs)
    shifts = {}
    for reader, terms in group.terms.items():
        shifts[reader] = torch.zeros_like(next(iter(means.values())))
        for writer, number in terms.items():
            shifts[reader] += number * means[writer]
        group.inputs[reader] = inputs[reader].subtract(shifts[reader])
    if not float(_noise(group, unchanged)) < _WORTHWHILE * noise_before:
        group.inputs = inputs
        return False
    for name, layer in group.writers.items():
        layer.bias.copy_(layer.bias.double() - means[name])
    for name, layer in group.readers.items():
        weight = _by_input(layer, layer.weight).double().flatten(2)
        columns = weight.reshape(*weight.shape[:2], layer.weight.shape[1], -1).sum(-1)
        moved = (columns * shifts[name].reshape(len(columns), 1, -1)).sum(-1)
        layer.bias.copy_(layer.bias.double() + moved.flatten())
    return True


def _apply(group: _Group, factors: torch.Tensor) -> None:
    """Multiply the channels of a group by factors `[C]`, and divide the weights of its readers by them."""
    for layer in group.writers.values():
        filter_shape = [1] * (layer.weight.dim() - 1)
        layer.weight.mul_(factors.reshape(-1, *filter_shape))
        if layer.bias is not None:
            layer.bias.mul_(factors)
    for layer in group.readers.values():
        _by_input(layer, layer.weight).div_(_columns(layer, factors))


def _factors(group: _Group, exponent: float) -> torch.Tensor:
    """Positive factors `[C]`; 1 where the channel is dead. The largest value of the tensor does not change."""
    inputs = [statistics.largest for statistics in group.inputs.values()]
    ranges = torch.stack(inputs).amax(0)
    weights = torch.stack([_largest_weight(layer) for layer in group.readers.values()]).amax(0)
    is_live = (ranges > 0) & (weights > 0)
    ranges = torch.where(is_live, ranges, ranges.max())
    weights = torch.where(is_live, weights, weights.max())
    factors = weights ** (1 - exponent) / ranges**exponent
    # If all are dead, this divides by zero, and no factor is used.
    largest = torch.where(is_live, factors * ranges, torch.zeros_like(ranges)).max()
    factors = factors * (ranges.max() / largest)
    factors = factors.clamp(1 / _LARGEST, _LARGEST)
    return torch.where(is_live, factors, torch.ones_like(factors))


def _noise(group: _Group, factors: torch.Tensor) -> torch.Tensor:
    """Product of the noise predicted after each reader with these factors, float64; see the module."""
    product = torch.ones((), dtype=torch.float64, device=factors.device)
    for name, layer in group.readers.items():
        statistics = group.inputs[name]
        weight = (_by_input(layer, layer.weight) / _columns(layer, factors)).double()
        input_step = (factors * statistics.largest).max().double() / _STEPS
        filter_steps = weight.abs().flatten(2).amax(2) / _STEPS  # [groups, filters]
        channel_energy = factors.double().square() * statistics.energy / statistics.rows
        group_energy = channel_energy.reshape(len(weight), 1, -1).sum(-1)
        kernel_size = weight[0, 0, 0].numel()
        from_weight = (filter_steps.square() * group_energy).sum() * kernel_size
        from_input = input_step.square() * weight.square().sum()
        product *= from_input + from_weight
    return product


def _by_input(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight as `[groups, filters of a group, input channels of a group, kernel ...]`, a view."""
    return weight.detach().view(getattr(layer, "groups", 1), -1, *weight.shape[1:])


def _columns(layer: Any, factors: torch.Tensor) -> torch.Tensor:
    """The factors of the input channels, in a shape that broadcasts with `_by_input`."""
    kernel = [1] * (layer.weight.dim() - 2)
    return factors.reshape(getattr(layer, "groups", 1), 1, -1, *kernel)


def _largest_weight(layer: Any) -> torch.Tensor:
    """The largest weight that reads each input channel, relative to the largest of the layer, `[Cin]`."""
    largest = _by_input(layer, layer.weight).abs()
    if largest.dim() > 3:
        largest = largest.flatten(3).amax(3)
    largest = largest.amax(1).flatten().float()
    return largest / largest.max().clamp_min(torch.finfo(torch.float32).tiny)
