"""Scales the channels of the input of a layer in front of its quantizer, where no other layer can take the factors.

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, ICML 2023 (arXiv 2211.10438), section 4. A layer y = W x computes
(W / s) (s x): with small factors s for channels with large values, one range for the tensor wastes fewer codes. The
paper folds s into the LayerNorm before the layer. That is exact only if nothing else reads the LayerNorm, and behind a
GELU or a ReLU6 there is nothing to fold into. Here the product s x is computed. It is a multiplication by a constant,
which TensorRT puts into one kernel with the function before it (LayerNorm, GELU, an activation) and with the quantizer.

The factors are s_c = w_c^(1 - a) / r_c^a, relative to their median: r_c the largest value of the channel, w_c the
largest weight that reads it, relative to the largest of its filter. The maxima of many channels over few samples are
noisy, so the factors may be limited to 1. Exponent and limit are chosen by the error of the output of the layer in int8
on samples that gave no maximum: each half of the samples is judged with the maxima of the other one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product as combine
from math import inf, log10
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.accuracy.float_layers import (
    ScalableLayers,
    list_unchanged,
    require_float_model,
    rounding_db,
)
from qdq.accuracy.layerwise import Product, list_decibels, run_flat, visit_products
from qdq.batch import count_samples, join_batches
from qdq.dataflow import Dataflow
from qdq.device import without_tf32
from qdq.errors import DataError
from qdq.forward import require_model, trace_forward
from qdq.nn.scaling import factors_of, restore_input, scale_input
from qdq.outputs import Mask, OutputView
from qdq.patterns import Pattern
from qdq.quantize import fake_quantize
from qdq.swap import SwapPlan, plan_swap

_EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LIMITS = (1.0, inf)  # of the factors
_RANGES = (1.0, 0.8, 0.6)  # relative to the largest value; calibration computes the final range
_LARGEST = 64.0  # of the factors and of their reciprocals
_POSITIONS = 512  # of a half of the samples, on which a layer is judged
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SmoothedInput:
    """Result for one tensor that quantized layers read.

    Args:
        read_by: The layers, which get the same factors.
        exponent: The balance that was chosen, 0 if nothing was changed.
        gain_db: By how much the error of their outputs in int8 was lower on samples that gave no maximum, in dB.
        reason: Why nothing was changed; empty if it was.
    """

    read_by: tuple[str, ...]
    exponent: float
    gain_db: float
    reason: str = ""


@dataclass(frozen=True)
class Smoothing:
    """Result of `smooth_inputs`.

    Args:
        inputs: In the order in which they are read.
        float_db: SQNR of the float outputs against those before the pass, on the same batches, in dB: 100 and more
            means that only float32 rounding changed them.
    """

    inputs: tuple[SmoothedInput, ...]
    float_db: float

    def format_table(self) -> str:
        """Number of smoothed inputs with their gains, and why others were left unchanged."""
        smoothed = [entry for entry in self.inputs if not entry.reason]
        lines = [
            f"{len(smoothed)} of {len(self.inputs)} inputs of layers smoothed; "
            f"float model against the one before: {self.float_db:.1f} dB"
        ]
        for entry in smoothed:
            lines.append(f"  {', '.join(entry.read_by)}: {entry.gain_db:.1f} dB less noise")
        lines += list_unchanged((entry.reason, ", ".join(entry.read_by)) for entry in self.inputs)
        return "\n".join(lines)


@without_tf32()
def smooth_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    least_db: float = 3.0,
    mask: Mask | None = None,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
) -> Smoothing:
    """Scale channels of the inputs of layers where it lowers the error of the layers in int8; in place.

    Call it before `swap_modules`, and after `fold_batchnorm` and `equalize_layers`. A smoothed layer computes the same
    from `input * factors`; the factors are a buffer of it. All layers that read a tensor get the same factors. The
    order of the samples matters: each half is judged with the largest values of the other half, so samples of one
    origin belong together.

    Args:
        model: A float model.
        batches: As for `calibrate_model`; they must fit in memory together, with two samples or more.
        least_db: The least gain that is worth a multiplication, in dB.
        mask: What leaves padding out, as for `predictor.predict`.
        include: As for `swap_modules`: layers that it would leave in float are left alone.
        exclude: Likewise.

    Returns:
        The inputs of all layers that `swap_modules` would quantize, and how exactly the float model was preserved.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: Fewer than two samples, or batches that differ in shape.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    require_float_model(model, "smooth_inputs")
    inputs = join_batches(batches)
    if count_samples(inputs) < 2:
        raise DataError(
            "the batches hold one sample.", "give two or more: each half is judged with the other."
        )
    view = OutputView(mask=mask)
    plan = plan_swap(model, inputs, include=include, exclude=exclude)
    groups = _find_groups(model, inputs, plan)
    readers = {name: layer for group in groups for name, layer in group.readers.items()}
    expected = run_flat(model, inputs, view)
    with tqdm(total=len(readers), desc="smooth", unit="layer", disable=None) as progress:
        visit = _Measurement(groups, view.find_mask(inputs), progress)
        visit_products(model, readers, inputs, visit)
    for group in groups:
        group.decide(least_db)
        group.apply()
    float_db = min(list_decibels(expected, run_flat(model, inputs, view)).values())
    if float_db < rounding_db(model):
        for group in groups:
            group.undo(f"undone: it changed the float outputs, SQNR {float_db:.1f} dB")
        float_db = min(list_decibels(expected, run_flat(model, inputs, view)).values())
    return Smoothing(tuple(group.result for group in groups), float_db)


@dataclass(frozen=True)
class _Half:
    """What a layer reads from one half of the samples.

    Args:
        largest: Largest absolute value of each channel, `[C]`.
        patches: Inputs of some positions, `[groups, N, K]`.
    """

    largest: torch.Tensor
    patches: torch.Tensor


@dataclass(frozen=True)
class _Former:
    """What a layer had before it was scaled.

    Args:
        weight: Its weight.
        factors: The factors of an earlier call; None without one.
    """

    weight: torch.Tensor
    factors: torch.Tensor | None


@dataclass(frozen=True)
class _Choice:
    """A way to compute the factors.

    Args:
        exponent: The balance between input and weight; 0 for no factors.
        limit: Upper limit of the factors.
    """

    exponent: float
    limit: float


_UNCHANGED = _Choice(0.0, 1.0)


@dataclass
class _Group:
    """The layers that read one tensor.

    Args:
        readers: The layers by name.
        reason: Why they must stay unchanged, "" if they may be scaled.
        halves: Reader -> what it reads from each half of the samples.
        choice: The choice with the least error.
        gain_db: Its gain.
        largest: Largest absolute value of each channel in all samples.
    """

    readers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    halves: dict[str, tuple[_Half, _Half]] = field(default_factory=dict)
    choice: _Choice = _UNCHANGED
    gain_db: float = 0.0
    largest: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    saved: dict[str, _Former] = field(default_factory=dict)

    @torch.no_grad()
    def judge(self) -> None:
        """Find the best choice; the patches are forgotten."""
        halves = next(iter(self.halves.values()))
        self.largest = torch.maximum(halves[0].largest, halves[1].largest)
        errors = {_UNCHANGED: self._measure(_UNCHANGED)}
        for exponent, limit in combine(_EXPONENTS, _LIMITS):
            choice = _Choice(exponent, limit)
            errors[choice] = self._measure(choice)
        self.choice = min(errors, key=errors.__getitem__)
        if errors[self.choice] > 0:
            self.gain_db = 10 * log10(errors[_UNCHANGED] / errors[self.choice])
        self.halves.clear()

    def _measure(self, choice: _Choice) -> float:
        """Error of the outputs relative to their energy with the best range, each half with maxima of the other."""
        errors = torch.zeros(len(_RANGES))
        for judged in (0, 1):
            largest = next(iter(self.halves.values()))[1 - judged].largest
            factors = self._factors(choice, largest)
            top = (factors * largest).max()
            for name, layer in self.readers.items():
                patches = self.halves[name][judged].patches
                for index, fraction in enumerate(_RANGES):
                    errors[index] += _relative_error(layer, patches, factors, top * fraction)
        return float(errors.min())

    def _factors(self, choice: _Choice, largest: torch.Tensor) -> torch.Tensor:
        """Positive factors `[C]` from the largest values of the channels; 1 where a channel is dead."""
        if choice == _UNCHANGED:
            return torch.ones_like(largest)
        layers = self.readers.values()
        weights = torch.stack([_largest_columns(layer) for layer in layers]).amax(0)
        is_live = (largest > 0) & (weights > 0)
        if not bool(is_live.any()):
            return torch.ones_like(largest)
        raw = weights ** (1 - choice.exponent) / largest.clamp_min(_TINY) ** choice.exponent
        factors = raw / raw[is_live].median()
        factors = factors.clamp(1 / _LARGEST, min(choice.limit, _LARGEST))
        return torch.where(is_live, factors, torch.ones_like(factors))

    def decide(self, least_db: float) -> None:
        """Leave the group unchanged if it gains too little."""
        is_worthwhile = self.choice != _UNCHANGED and self.gain_db >= least_db
        if not self.reason and not is_worthwhile:
            self.reason = f"no factors lower the noise by {least_db:g} dB"

    @torch.no_grad()
    def apply(self) -> None:
        """Scale the inputs of the layers, and divide their weights."""
        if self.reason:
            return
        factors = self._factors(self.choice, self.largest)
        for name, layer in self.readers.items():
            self.saved[name] = _Former(layer.weight.detach().clone(), factors_of(layer))
            layer.weight.div_(_by_column(layer, factors))
            kernel = [1] * (layer.weight.dim() - 2)
            scale_input(layer, factors.reshape(-1, *kernel).to(layer.weight.dtype))

    @torch.no_grad()
    def undo(self, reason: str) -> None:
        """Undo `apply`."""
        for name, former in self.saved.items():
            layer = self.readers[name]
            layer.weight.copy_(former.weight)
            restore_input(layer)
            if former.factors is not None:
                scale_input(layer, former.factors)
            self.reason = reason

    @property
    def result(self) -> SmoothedInput:
        names = tuple(self.readers)
        result = SmoothedInput(names, self.choice.exponent, self.gain_db)
        if self.reason:
            result = replace(result, exponent=0.0, reason=self.reason)
        return result


def _find_groups(model: nn.Module, inputs: Any, plan: SwapPlan) -> list[_Group]:
    """The tensors that the layers read which a plan quantizes, in order."""
    quantized = {module.name for module in plan.of("quantize")}
    trace = trace_forward(model, inputs)
    flow = Dataflow(trace)
    layers = ScalableLayers(model, trace)
    sources = {run.module: run.inputs[0] for run in trace.runs if run.inputs}
    groups: dict[int, _Group] = {}
    for operation in flow.operations:
        layer = layers.find(operation)
        if layer is None or operation.module not in quantized:
            continue
        computed = [value for value in operation.inputs if flow.is_computed(value)]
        if not computed:
            continue
        group = groups.setdefault(sources[operation.module], _Group())
        reason = layers.reason_against(operation, computed, len(flow.shapes[computed[0]]))
        group.readers[operation.module] = layer
        group.reason = group.reason or reason
    for group in groups.values():
        if len({_largest_columns(layer).numel() for layer in group.readers.values()}) > 1:
            group.reason = group.reason or "its layers have different channel axes"
    return list(groups.values())


class _Measurement:
    """Called for the product of each layer; judges a group when all its layers have run.

    Args:
        groups: The groups.
        mask: bool, False at padding.
        progress: Counts the layers.
    """

    def __init__(
        self, groups: list[_Group], mask: torch.Tensor | None, progress: tqdm[Any]
    ) -> None:
        self._group_of = {name: group for group in groups for name in group.readers}
        self._mask = mask
        self._progress = progress

    def __call__(self, name: str, _: nn.Module, product: Product) -> torch.Tensor:
        output = product.compute()
        group = self._group_of[name]
        self._progress.update()
        if group.reason:
            return output
        first = len(output) // 2
        if not first:
            group.reason = f"the input of {name} has no axis of samples"
            return output
        group.halves[name] = self._split(product, output, first)
        if len(group.halves) == len(group.readers):
            group.judge()
        return output

    def _split(self, product: Product, output: torch.Tensor, first: int) -> tuple[_Half, _Half]:
        """What the layer reads from the first samples and from the others."""
        positions = product.list_positions(output, self._mask)
        rows_of_sample = product.rows_of(output[:1]).shape[0]
        is_first = positions < first * rows_of_sample
        x = product.arguments["input"]
        rows = product.rows_of(x)
        counted = product.list_positions(x, self._mask)
        is_first_row = counted < first * product.rows_of(x[:1]).shape[0]
        halves = []
        for chosen, chosen_rows in ((is_first, is_first_row), (~is_first, ~is_first_row)):
            largest = rows[counted[chosen_rows]].abs().amax(0).float()
            drawn = _spread(positions[chosen])
            halves.append(_Half(largest, product.patches_at(drawn, output.shape).float()))
        return halves[0], halves[1]


def _spread(positions: torch.Tensor) -> torch.Tensor:
    """At most `_POSITIONS` positions, at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(positions), generator=generator)[:_POSITIONS]
    return positions[order.to(positions.device)]


def _relative_error(
    layer: Any, patches: torch.Tensor, factors: torch.Tensor, amax: torch.Tensor
) -> float:
    """Squared error of the outputs of a layer in int8, relative to their squares.

    Args:
        layer: A convolution or linear layer.
        patches: Its inputs, `[groups, N, K]`.
        factors: Of the channels of its input, `[C]`.
        amax: The range of the scaled input.
    """
    weight = layer.weight.detach().float()
    scaled_weight = weight / _by_column(layer, factors)
    filter_ranges = scaled_weight.flatten(1).abs().amax(1)
    quantized_weight = fake_quantize(scaled_weight, filter_ranges, axis=0)
    columns = factors.reshape(len(patches), 1, -1, 1)
    kernel_size = patches.shape[-1] // columns.shape[2]
    columns = columns.expand(-1, -1, -1, kernel_size).flatten(2)
    quantized_patches = fake_quantize(patches * columns, amax)
    expected = _multiply(patches, weight)
    error = _multiply(quantized_patches, quantized_weight) - expected
    energy = expected.square().sum().clamp_min(_TINY)
    return float(error.square().sum() / energy)


def _multiply(patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Outputs `[groups, N, filters of a group]` of patches `[groups, N, K]`."""
    filters = weight.reshape(len(patches), -1, patches.shape[-1])
    return patches @ filters.transpose(1, 2)


def _by_column(layer: Any, factors: torch.Tensor) -> torch.Tensor:
    """Factors of the input channels `[C]` in a shape that broadcasts with the weight of a layer."""
    groups = getattr(layer, "groups", 1)
    filters = layer.weight.shape[0] // groups
    kernel = [1] * (layer.weight.dim() - 2)
    columns = factors.reshape(groups, 1, -1).expand(-1, filters, -1)
    by_column: torch.Tensor = columns.reshape(layer.weight.shape[0], -1, *kernel)
    return by_column


def _largest_columns(layer: Any) -> torch.Tensor:
    """The largest weight that reads each input channel, relative to the largest of its filter, `[Cin]`."""
    filters, columns = layer.weight.shape[:2]
    weight = layer.weight.detach().float().reshape(filters, columns, -1).abs().amax(2)
    relative: torch.Tensor = weight / weight.amax(1, keepdim=True).clamp_min(_TINY)
    groups = getattr(layer, "groups", 1)
    return relative.reshape(groups, -1, columns).amax(1).flatten()
