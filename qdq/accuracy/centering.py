"""Moves the input of a layer behind a clamp with two bounds to the middle of its range, which halves the step of int8.

TensorRT's int8 is symmetric: of the values 0 to 6 behind a ReLU6, half of the codes are lost. A layer y = W x + b
computes W (x - c) + (b + W c), and x - c has codes on both sides. The subtraction is no operator of the file:
`graph.fold_offsets` moves c into the bias of the product before the clamp, and into the bounds of the clamp. So the
clamp stays, as a Clip with other bounds. Pooling, means over pixels and reshapes may lie between the clamp and the
layer: mean(x) - c = mean(x - c). A layer that pads its input would read 0 there instead of -c: it is left alone.

With a range that clips at h, the range around the middle c = (l + h) / 2 of [l, h] clips the same values with half of
the step: 6 dB if l is 0. The end h with the least squared error is taken. Rounded weights W' would shift the mean of
the output, because most values of the input are far from 0 then. So the bias of a swapped layer follows the rounding:
it has W' c in place of W c (`nn.mixin`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite, log10
from numbers import Real
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.accuracy.float_layers import (
    ScalableLayers,
    list_unchanged,
    may_read_zeros,
    require_float_model,
    rounding_db,
)
from qdq.accuracy.layerwise import FlatArrays, FlatOutputs, list_decibels
from qdq.batch import list_filled_batches
from qdq.dataflow import Dataflow, clamp_of
from qdq.device import without_tf32
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.forward import Operation, call_model, evaluating, require_model, trace_forward
from qdq.functions import (
    ADAPTIVE_AVERAGE_POOLINGS,
    AVERAGES,
    CONVOLUTIONS,
    LINEAR,
    MAX_POOLINGS,
    SHIFT_KEEPERS,
)
from qdq.nn.scaling import is_shifted, shift_input, unshift_input
from qdq.outputs import Mask, OutputView, Selection
from qdq.patterns import Pattern
from qdq.quantize import fake_quantize
from qdq.swap import SwapPlan, plan_swap

logger = logging.getLogger(__name__)

# Of the largest value; calibration computes the final range.
_FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_VALUES = 65536  # of a tensor, on which ranges are compared
# The terms of a sum grow by the offset, and their rounding with them. A mean that moves wrongly costs much more.
_ROUNDING_DB = 20.0
_LEAST_FLOAT_DB = 30.0  # of models in half precision, whose parameters are rounded coarsely
_POOLINGS = AVERAGES | MAX_POOLINGS
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CenteredInput:
    """Result for one tensor that quantized layers read.

    Args:
        read_by: The layers, which get the same offset.
        offset: What is subtracted from their input, 0 if nothing was changed.
        gain_db: By how much the error of the tensor in int8 is lower, in dB.
        reason: Why nothing was changed; empty if it was.
    """

    read_by: tuple[str, ...]
    offset: float
    gain_db: float
    reason: str = ""


@dataclass(frozen=True)
class Centering:
    """Result of `center_inputs`.

    Args:
        inputs: In the order in which they are read.
        float_db: SQNR of the float outputs against those before the pass, on the same batches, in dB: 80 and more
            means that only float32 rounding changed them.
    """

    inputs: tuple[CenteredInput, ...]
    float_db: float

    def format_table(self) -> str:
        """Number of centered inputs with their gains, and why others were left unchanged."""
        centered = [entry for entry in self.inputs if not entry.reason]
        lines = [
            f"{len(centered)} of {len(self.inputs)} inputs of layers centered; "
            f"float model against the one before: {self.float_db:.1f} dB"
        ]
        for entry in centered:
            readers = ", ".join(entry.read_by)
            lines.append(
                f"  {readers}: minus {entry.offset:.3g}, {entry.gain_db:.1f} dB less noise"
            )
        lines += list_unchanged((entry.reason, ", ".join(entry.read_by)) for entry in self.inputs)
        return "\n".join(lines)


@without_tf32()
def center_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    least_db: float = 3.0,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Centering:
    """Subtract the middle of the range from inputs behind ReLU6 and other clamps with two bounds; in place.

    Call it before `swap_modules`, and after `fold_batchnorm`, `equalize_layers` and `smooth_inputs`. A centered layer
    computes the same from `input - offset`; the offset is a buffer of it. After an error or Ctrl-C the model is as
    before. It is for int8: the numbers of FP8 are densest around 0, so FP8 loses by it.

    Args:
        model: A float model.
        batches: As for `calibrate_model`.
        least_db: The least gain for which an input is centered, in dB.
        include: As for `swap_modules`: layers that it would leave in float are left alone.
        exclude: Likewise.
        outputs: Parts of the outputs that must not change, as for `predictor.predict`; None for all.
        mask: What leaves padding out of them, likewise.

    Returns:
        The inputs of all layers that `swap_modules` would quantize, and how exactly the float model was preserved.

    Raises:
        ArgumentError: `least_db` is not finite, or outputs that do not exist.
        ArgumentTypeError: One tensor or dictionary instead of batches, or `least_db` is not a number.
        DataError: No batch with samples, or the mask fits no output.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    require_float_model(model, "center_inputs")
    if isinstance(least_db, bool) or not isinstance(least_db, Real):
        raise ArgumentTypeError(
            f"least_db is {least_db!r}, a {type(least_db).__name__}.", "pass a number of decibels."
        )
    if not isfinite(least_db):
        raise ArgumentError(f"least_db is {least_db}.", "pass a finite number of decibels.")
    view = OutputView(outputs, mask)
    samples = list_filled_batches(batches)
    plan = plan_swap(model, samples[0], include=include, exclude=exclude)
    groups = _find_groups(model, samples[0], plan)
    float_db = inf
    if any(not group.reason for group in groups):  # most networks have no such clamp
        float_db = _center(model, groups, samples, view, least_db)
    result = Centering(tuple(group.result for group in groups), float_db)
    logger.info("%s", result.format_table())
    return result


def _center(
    model: nn.Module,
    groups: list[_Group],
    samples: list[Any],
    view: OutputView,
    least_db: float,
) -> float:
    """Center the groups that gain enough.

    Returns:
        SQNR of the outputs against those before, in dB.
    """
    expected = _observe(model, samples, view, groups)
    for group in groups:
        group.decide(least_db)
    if all(group.reason for group in groups):
        return inf
    try:
        for group in groups:
            group.apply()
        float_db = min(list_decibels(expected, _observe(model, samples, view)).values())
    except BaseException:
        for group in groups:
            group.undo("interrupted")
        raise
    if float_db < max(rounding_db(model) - _ROUNDING_DB, _LEAST_FLOAT_DB):
        for group in groups:
            group.undo(f"undone: it changed the float outputs, SQNR {float_db:.1f} dB")
        float_db = min(list_decibels(expected, _observe(model, samples, view)).values())
    return float_db


@dataclass
class _Group:
    """The layers that read one tensor.

    Args:
        readers: The layers by name.
        reason: Why they must stay unchanged, "" if they may be centered.
        low: Smallest value of the tensor.
        high: Largest value.
        values: Some of its values, at random.
        offset: The middle of the range with the least error.
        gain_db: Its gain.
        former_biases: Reader -> its bias before `apply`.
    """

    readers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    low: float = inf
    high: float = -inf
    values: list[torch.Tensor] = field(default_factory=list)
    offset: float = 0.0
    gain_db: float = 0.0
    former_biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def collect(self, x: torch.Tensor, count: int, generator: torch.Generator) -> None:
        """Add the values of the tensor in one batch.

        Args:
            x: The tensor.
            count: Number of values to keep.
            generator: Draws them.
        """
        if not x.numel():
            return
        self.low = min(self.low, float(x.min()))
        self.high = max(self.high, float(x.max()))
        self.values.append(_draw(x.detach().float().flatten(), count, generator))

    @torch.no_grad()
    def decide(self, least_db: float) -> None:
        """Find the best offset, and leave the group unchanged if it gains too little."""
        if self.reason:
            return
        if not self.values:
            self.reason = "it is empty in the batches"
            return
        values = torch.cat(self.values)
        self.values.clear()
        largest = max(-self.low, self.high)
        plain = min(_error(values, fraction * largest) for fraction in _FRACTIONS)
        errors = {}
        for fraction in _FRACTIONS:
            radius = fraction * (self.high - self.low) / 2
            errors[self.low + radius] = _error(values - (self.low + radius), radius)
        self.offset = min(errors, key=errors.__getitem__)
        self.gain_db = 10 * log10(max(plain, _TINY) / max(errors[self.offset], _TINY))
        if not self.gain_db >= least_db:
            self.reason = f"no offset lowers the noise by {least_db:g} dB"

    @torch.no_grad()
    def apply(self) -> None:
        """Subtract the offset from the input, and add what it contributed to the bias."""
        if self.reason:
            return
        for name, layer in self.readers.items():
            offset = layer.weight.new_tensor(self.offset)  # rounded to the type of the weight
            self.former_biases[name] = layer.bias.detach().clone()
            shift_input(layer, offset)
            moved = offset.double() * layer.weight.double().flatten(1).sum(1)
            layer.bias.copy_(layer.bias.double() + moved)

    @torch.no_grad()
    def undo(self, reason: str) -> None:
        """Undo `apply`."""
        for name, bias in self.former_biases.items():
            layer = self.readers[name]
            layer.bias.copy_(bias)
            if is_shifted(layer):
                unshift_input(layer)
            self.reason = reason

    @property
    def result(self) -> CenteredInput:
        names = tuple(self.readers)
        if self.reason:
            return CenteredInput(names, 0.0, 0.0, self.reason)
        return CenteredInput(names, self.offset, self.gain_db)


def _find_groups(model: nn.Module, inputs: Any, plan: SwapPlan) -> list[_Group]:
    """The tensors that the layers read which a plan quantizes, in order."""
    quantized = {module.name for module in plan.of("quantize")}
    trace = trace_forward(model, inputs)
    flow = Dataflow(trace)
    layers = ScalableLayers(model, trace)
    inputs_of = {run.module: run.inputs[0] for run in trace.runs if run.inputs}
    groups: dict[int, _Group] = {}
    for operation in flow.operations:
        layer = layers.find(operation)
        if layer is None or operation.module not in quantized:
            continue
        computed = [value for value in operation.inputs if flow.is_computed(value)]
        if not computed:
            continue
        group = groups.setdefault(computed[0], _Group())
        dims = len(flow.shapes[computed[0]])
        reason = layers.reason_against(operation, computed, dims) or _reason_against(layer)
        if inputs_of[operation.module] != computed[0]:
            reason = reason or "its forward changes the input before the product"
        group.readers[operation.module] = layer
        group.reason = group.reason or reason
    for value, group in groups.items():
        group.reason = group.reason or _reason_against_tensor(flow, value, group.readers, quantized)
    return list(groups.values())


def _reason_against(layer: Any) -> str:
    """Why the input of a layer must keep its mean, "" if it may be moved."""
    if layer.bias is None:
        return "it has no bias; fold_batchnorm gives it one"
    if may_read_zeros(layer):
        return "it pads its input with zeros"
    if is_shifted(layer):
        return "it is centered already"
    return ""


def _reason_against_tensor(
    flow: Dataflow, value: int, readers: Collection[str], quantized: Collection[str]
) -> str:
    """Why a tensor cannot be centered for all its readers, "" if it can.

    Args:
        flow: The data flow of the model.
        value: Number of the tensor.
        readers: The layers that read it.
        quantized: The modules that will be quantized.
    """
    path = [value]
    producer = flow.producer_of(value)
    while producer is not None and _keeps_shift(flow, producer):
        if producer.function in _POOLINGS and producer.module in quantized:
            return f"{producer.module} lies between it and the clamp, and is quantized itself"
        path.append(producer.inputs[0])
        producer = flow.producer_of(path[-1])
    if producer is not None and producer.function in _POOLINGS:
        return f"{producer.function} before it may read padding, or has windows of several sizes"
    bounds = None if producer is None else clamp_of(producer)
    if producer is None or bounds is None or not all(map(isfinite, bounds)):
        return "no clamp with two bounds, such as ReLU6, writes it"
    if not _has_bias_before(flow, producer):
        return "no convolution with a bias, or linear layer of rows, is before its clamp"
    if not set(flow.outputs).isdisjoint([*path, *producer.inputs]):
        return "it is an output of the model"
    for tensor in path:
        for reader in flow.list_readers(tensor):
            is_on_path = not set(reader.outputs).isdisjoint(path)
            if not is_on_path and not (tensor == value and reader.module in readers):
                return f"{reader.module or reader.function} reads it, too"
    return ""


def _keeps_shift(flow: Dataflow, operation: Operation) -> bool:
    """Whether the result of a function of one tensor moves by as much as its input, as one operator of the file."""
    if operation.function not in SHIFT_KEEPERS or len(operation.inputs) > 1:
        return False
    if operation.function not in ADAPTIVE_AVERAGE_POOLINGS:
        return True
    # Windows of several sizes become many operators.
    sizes = flow.shapes[operation.inputs[0]][2:]
    wanted = flow.shapes[operation.outputs[0]][2:]
    return all(size % number == 0 for size, number in zip(sizes, wanted, strict=False))


def _has_bias_before(flow: Dataflow, clamp: Operation) -> bool:
    """Whether the export can move an offset into the bias of the product before a clamp.

    Args:
        flow: The data flow of the model.
        clamp: The clamp.
    """
    value = clamp.inputs[0]
    product = flow.producer_of(value)
    if product is None or len(product.inputs) < 3 or len(flow.list_readers(value)) > 1:
        return False
    is_convolution = product.function in CONVOLUTIONS
    return is_convolution or (product.function in LINEAR and len(flow.shapes[value]) == 2)


def _observe(
    model: nn.Module, batches: list[Any], view: OutputView, groups: Iterable[_Group] = ()
) -> FlatArrays:
    """Run all batches, collect the values of the groups, and return the outputs by name."""
    outputs = FlatOutputs(view)
    count = max(1, _VALUES // len(batches))
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as hooks, evaluating(model):
        for group in groups:
            if not group.reason:
                first = next(iter(group.readers.values()))
                collect = partial(_collect_input, group, count, generator)
                handle = first.register_forward_pre_hook(collect, with_kwargs=True)
                hooks.callback(handle.remove)
        for batch in tqdm(batches, desc="center", unit="batch", disable=None):
            outputs.add(call_model(model, batch), batch)
    return outputs.join()


def _collect_input(
    group: _Group, count: int, generator: torch.Generator, _: nn.Module, args: Any, kwargs: Any
) -> None:
    group.collect(next(iter((*args, *kwargs.values()))), count, generator)


def _draw(values: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Some of the values, at random; all if they are few."""
    if len(values) <= count:
        return values
    index = torch.randint(len(values), (count,), generator=generator)
    return values[index.to(values.device)]


def _error(values: torch.Tensor, amax: float) -> float:
    """Mean squared error of values in int8."""
    quantized = fake_quantize(values, values.new_tensor(amax))
    return float((quantized - values).square().mean())
