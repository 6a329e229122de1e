"""Finds silent faults of a run: oscillating weights, ranges that do not fit, and the layer where NaN starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qdq.batch import floats_of
from qdq.calibrate.collect import Collection, WeightSite
from qdq.forward import call_model, evaluating
from qdq.quantize import quantize_codes
from qdq.quantizer import TensorQuantizer, named_quantizers

_MIN_REVERSALS = 2  # a code oscillates if it reversed at least this often
_MIN_OSCILLATING = 0.01  # a layer is reported if more than this fraction of its weights oscillates
_MAX_CLIPPED = 0.5  # a range is reported if it clips more than this fraction of the values
_MIN_USED = 1 / 8  # a range is reported if the values use less of it: 3 bits are lost


@dataclass(frozen=True)
class Oscillation:
    """The weights of a layer that went back and forth between two codes.

    Args:
        layer: Dotted name.
        share: Fraction of its weights, 0..1.
    """

    layer: str
    share: float


@dataclass(frozen=True)
class BadRange:
    """A range that does not fit the values that it quantizes.

    Args:
        quantizer: Dotted name.
        reason: The problem.
    """

    quantizer: str
    reason: str


class OscillationWatch:
    """Counts how often the code of each weight changed back (Nagel et al., ICML 2022, arXiv 2203.11086, section 3.2).

    Args:
        model: A calibrated model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = _list_weights(model)
        self._codes = [weight.quantize() for weight in self._weights]
        self._direction = [torch.zeros_like(codes, dtype=torch.int8) for codes in self._codes]
        self._reversals = [torch.zeros_like(codes, dtype=torch.uint8) for codes in self._codes]

    def after_step(self) -> None:
        """Compare the codes with those before the step."""
        for index, weight in enumerate(self._weights):
            codes = weight.quantize()
            moved = (codes - self._codes[index]).sign().to(torch.int8)
            is_reversed = (moved != 0) & (moved == -self._direction[index])
            is_countable = self._reversals[index] < 255
            self._reversals[index] += is_reversed & is_countable
            self._direction[index] = torch.where(moved != 0, moved, self._direction[index])
            self._codes[index] = codes

    def pack(self) -> dict[str, torch.Tensor]:
        """The counts so far, as tensors from which `unpack` continues."""
        packed = {}
        for index in range(len(self._weights)):
            packed[f"codes//{index}"] = self._codes[index]
            packed[f"direction//{index}"] = self._direction[index]
            packed[f"reversals//{index}"] = self._reversals[index]
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from the counts that another watch of the same model packed."""
        for name, tensor in self.pack().items():
            tensor.copy_(tensors[name])

    def find(self) -> tuple[Oscillation, ...]:
        """The layers in which more than 1 % of the weights oscillated, worst first."""
        if not self._weights:
            return ()
        means = [(reversals >= _MIN_REVERSALS).float().mean() for reversals in self._reversals]
        shares = torch.stack(means).tolist()
        oscillations = []
        for weight, share in zip(self._weights, shares, strict=True):
            if share > _MIN_OSCILLATING:
                oscillations.append(Oscillation(weight.site.layer_name, share))
        oscillations.sort(key=lambda oscillation: -oscillation.share)
        return tuple(oscillations)


@dataclass(frozen=True)
class _QuantizedWeight:
    """A weight and its quantizer.

    Args:
        site: The parameter in its layer.
        quantizer_name: Dotted name of the quantizer.
        quantizer: The quantizer.
    """

    site: WeightSite
    quantizer_name: str
    quantizer: TensorQuantizer

    @property
    def value(self) -> torch.Tensor:
        """The current weight, without its gradient."""
        return self.site.weight.detach()

    @torch.no_grad()
    def quantize(self) -> torch.Tensor:
        """Its codes, int16, of its shape; those of FP8 are numbered from the smallest to the largest."""
        scale = self.quantizer.scale
        if self.quantizer.axis is not None:
            scale = scale.flatten()
        axis = _positive(self.quantizer.range_axis, self.value)
        codes = quantize_codes(self.value.float(), scale, self.quantizer.format, axis)
        if self.quantizer.format.is_float:
            return _number_fp8_codes(codes)
        return codes.short()


def _number_fp8_codes(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of FP8 codes, int16, -126 to 126 in ascending order: their bytes without the sign, times the sign."""
    magnitudes = codes.abs().to(torch.float8_e4m3fn).view(torch.uint8).short()
    return magnitudes * codes.sign().short()


def _list_weights(model: nn.Module) -> list[_QuantizedWeight]:
    quantizers = dict(named_quantizers(model))
    weights = []
    for name, site in Collection(model, may_be_empty=True).weights.items():
        weights.append(_QuantizedWeight(site, name, quantizers[name]))
    return weights


def _positive(axis: int | None, tensor: torch.Tensor) -> int | None:
    if axis is None:
        return None
    return axis % tensor.dim()


def find_bad_ranges(model: nn.Module, batch: Any) -> tuple[BadRange, ...]:
    """The ranges that are far too small or too large: most values are clipped, or most codes are unused.

    Ranges of inputs are compared with a batch, ranges of weights with the weights, without channels of zeros.

    Args:
        model: A calibrated model.
        batch: As for `forward.call_model`.
    """
    fits: list[_Fit] = []

    def measure_input(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, TensorQuantizer)  # noqa: S101
        _add_fit(fits, name, module, inputs[0], may_be_zero=False)

    with ExitStack() as hooks:
        for name in Collection(model, may_be_empty=True).collecting:
            quantizer = model.get_submodule(name)
            hook = quantizer.register_forward_pre_hook(partial(measure_input, name))
            hooks.callback(hook.remove)
        with evaluating(model):
            call_model(model, batch)
    for weight in _list_weights(model):
        _add_fit(fits, weight.quantizer_name, weight.quantizer, weight.value, may_be_zero=True)
    return _judge(fits)


@dataclass(frozen=True)
class _Fit:
    """How the ranges of a quantizer fit the values that it quantizes.

    Args:
        quantizer: Dotted name.
        num_ranges: Number of its ranges.
        figures: `[5]`: the largest fraction of clipped values, the least fraction of a range that is used, and how many
            ranges clip too much, have no code but 0, and are used too little.
    """

    quantizer: str
    num_ranges: int
    figures: torch.Tensor


def _add_fit(
    fits: list[_Fit],
    name: str,
    quantizer: TensorQuantizer,
    values: torch.Tensor,
    *,
    may_be_zero: bool,
) -> None:
    """Measure the ranges of a quantizer; not if it has none, or if there are no values."""
    if quantizer.amax is None or not values.numel():
        return
    amax = quantizer.amax.detach().flatten()
    rows = _as_rows(values.float().abs(), _positive(quantizer.range_axis, values))
    largest = rows.amax(1)
    used = largest / amax.clamp_min(1e-30)
    # A value that is less than half a step behind the end loses no more than by rounding: the zeros of a centered
    # ReLU6 lie at the end of its range.
    ends = amax * (1 + 0.5 / quantizer.format.qmax)
    clipped = (rows > ends[:, None]).float().mean(1)
    is_judged = torch.ones_like(largest, dtype=torch.bool)
    if may_be_zero:
        is_judged = largest > 0
    faults = [clipped > _MAX_CLIPPED, used * quantizer.format.qmax < 0.5, used < _MIN_USED]
    counts = [(is_bad & is_judged).sum().float() for is_bad in faults]
    fits.append(_Fit(name, len(amax), torch.stack([clipped.max(), used.min(), *counts])))


def _judge(fits: Sequence[_Fit]) -> tuple[BadRange, ...]:
    """The ranges that do not fit; all figures are read from a GPU at once."""
    if not fits:
        return ()
    rows = torch.stack([fit.figures for fit in fits]).tolist()
    bad_ranges = []
    for fit, row in zip(fits, rows, strict=True):
        reason = _reason_against(fit.num_ranges, *row)
        if reason:
            bad_ranges.append(BadRange(fit.quantizer, reason))
    return tuple(bad_ranges)


def _reason_against(
    num_ranges: int,
    clipped: float,
    used: float,
    num_clipping: float,
    num_zero: float,
    num_unused: float,
) -> str:
    """The problem of some ranges of a quantizer; "" if there is none. The numbers are those of `_Fit`."""
    faults = (
        (num_clipping, f"{clipped:.0%} of the values are clipped"),
        (num_zero, "every code is 0"),
        (num_unused, f"the largest value uses {used:.1%} of the range"),
    )
    for count, reason in faults:
        if count and num_ranges == 1:
            return reason
        if count:
            return f"in {count:.0f} of {num_ranges} channels {reason}"
    return ""


def _as_rows(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """`[channels, values]`; one row without an axis."""
    if axis is None:
        return values.reshape(1, -1)
    return values.movedim(axis, 0).flatten(1)


def find_nonfinite(model: nn.Module, batch: Any) -> str:
    """Dotted name of the first module that returns NaN or Inf for finite inputs; "" if none does."""
    sources: list[str] = []

    def compare(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not sources and _is_finite(inputs) and not _is_finite(output):
            sources.append(name or "the model")

    _run_with_hooks(model, batch, compare)
    return sources[0] if sources else ""


def order_modules(model: nn.Module, batch: Any) -> list[str]:
    """Dotted names of the modules in the order in which their calls return for a batch."""
    names: list[str] = []

    def append_name(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        names.append(name)

    _run_with_hooks(model, batch, append_name)
    return names


def _run_with_hooks(
    model: nn.Module, batch: Any, hook: Callable[[str, nn.Module, Any, Any], None]
) -> None:
    """Call a model with a hook on every module, which also gets the name of the module."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(partial(hook, name))
            hooks.callback(handle.remove)
        with evaluating(model):
            call_model(model, batch)


def _is_finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats_of(tree))
