"""Ranges of weights, read from the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qdq.calibrate.collect import WeightSite
from qdq.device import copy_to_host
from qdq.errors import ArgumentError, CalibrationError
from qdq.formats import FP8_AMAX_FLOOR, Format
from qdq.observers.max import reduce_amax
from qdq.quantize import compute_scale, quantize_codes
from qdq.quantizer import TensorQuantizer

KEEP = "keep"
WEIGHT_METHODS = ("max", "mse", KEEP)
_OCTAVES = 3  # amax is searched from the maximum down to 1/8 of it
_STEPS = 8  # candidates per octave; then as many again on either side of the best one


def require_weight_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ArgumentError: The message names the known methods.
    """
    if method not in WEIGHT_METHODS:
        raise ArgumentError(
            f"unknown weight method {method!r}; known are {', '.join(WEIGHT_METHODS)}.",
            "use 'max'.",
        )


@torch.no_grad()
def solve_weight(
    label: str, weight: torch.Tensor, quantizer: TensorQuantizer, method: str
) -> torch.Tensor:
    """Compute the range of a weight, per channel or per tensor, depending on the axis of its quantizer.

    Args:
        label: The name of the weight in messages.
        weight: Any shape.
        quantizer: The quantizer, for its format and axis.
        method: "max", or "mse": the range with the least squared error, for each channel separately. "keep": the range
            that the quantizer has; "max" if it has none.

    Returns:
        float32, of the rank of the weight with size 1 on all axes but the kept one; `[]` per tensor.

    Raises:
        CalibrationError: NaN or Inf in the weight.
    """
    amax = reduce_amax(weight, quantizer.axis)
    _require_finite(label, weight, amax)
    return _search(weight, amax, quantizer, method)


@torch.no_grad()
def solve_weights(
    sites: Mapping[str, WeightSite], quantizers: Mapping[str, TensorQuantizer], method: str
) -> dict[str, torch.Tensor]:
    """Compute the ranges of weights; each device is waited for once.

    Args:
        sites: Name of the quantizer -> its weight.
        quantizers: Name -> quantizer.
        method: As for `solve_weight`.

    Returns:
        Name of the quantizer -> as `solve_weight`, on the CPU.

    Raises:
        CalibrationError: NaN or Inf in a weight.
    """
    maxima = {}
    amaxes = {}
    for name, site in sites.items():
        maxima[name] = reduce_amax(site.weight, quantizers[name].axis)
        amaxes[name] = _search(site.weight, maxima[name], quantizers[name], method)
    on_host = copy_to_host([*maxima.values(), *amaxes.values()])
    for site, amax in zip(sites.values(), on_host, strict=False):
        _require_finite(site.label, site.weight, amax)
    return dict(zip(amaxes, on_host[len(maxima) :], strict=True))


def _require_finite(label: str, weight: torch.Tensor, amax: torch.Tensor) -> None:
    """Refuse a weight whose maximum of |x| is NaN or Inf.

    Raises:
        CalibrationError: The message says how many values are not finite.
    """
    if bool(torch.isfinite(amax).all()):
        return
    num_defects = int((~torch.isfinite(weight)).sum())
    raise CalibrationError(
        f"{label} holds {num_defects} NaN or Inf of {weight.numel()} values.",
        "load other weights: this model was broken before quantization.",
    )


def _search(
    weight: torch.Tensor, amax: torch.Tensor, quantizer: TensorQuantizer, method: str
) -> torch.Tensor:
    """The range by a method, from the maximum of |x|."""
    if method == KEEP and quantizer.amax is not None:
        return quantizer.amax
    if method == "mse" and weight.numel():
        amax = _Search(weight.float(), amax, quantizer.format).run()
    return amax.clamp_min(FP8_AMAX_FLOOR) if quantizer.format.is_float else amax


class _Search:
    """Finds the best fraction of the maximum for each channel.

    A grid of 2^(-i/8) comes first, then a finer one between the neighbours of its best candidate.

    Args:
        weight: float32, any shape.
        largest: The maximum of each channel, as from `reduce_amax`.
        fmt: The format.
    """

    def __init__(self, weight: torch.Tensor, largest: torch.Tensor, fmt: Format) -> None:
        self._weight = weight
        self._largest = largest
        self._format = fmt
        self._reduced_axes = []
        for dim in range(weight.dim()):
            if dim >= largest.dim() or largest.shape[dim] == 1:
                self._reduced_axes.append(dim)
        self._best = torch.ones_like(largest)
        self._least_error = self._measure(self._best)

    def run(self) -> torch.Tensor:
        """The best range of each channel."""
        for step in range(1, _OCTAVES * _STEPS + 1):
            self._try(torch.full_like(self._best, 2.0 ** (-step / _STEPS)))

        coarse_best = self._best
        for step in range(1 - _STEPS, _STEPS):
            if step:
                factor = 2.0 ** (step / _STEPS**2)
                self._try((coarse_best * factor).clamp_max(1))
        return self._largest * self._best

    def _try(self, fraction: torch.Tensor) -> None:
        """Keep a candidate in the channels where it is better than the best so far."""
        error = self._measure(fraction)
        self._best = torch.where(error < self._least_error, fraction, self._best)
        self._least_error = torch.minimum(error, self._least_error)

    def _measure(self, fraction: torch.Tensor) -> torch.Tensor:
        """The squared error of each channel, of the shape of `largest`."""
        scale = compute_scale(self._largest * fraction, self._format)
        codes = quantize_codes(self._weight, scale, self._format)
        error = codes.mul_(scale).sub_(self._weight).square_()
        if not self._reduced_axes:
            return error
        return error.sum(self._reduced_axes, keepdim=True).reshape(self._largest.shape)
