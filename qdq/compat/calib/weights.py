"""Ranges of weights, computed from the weights themselves."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from qdq.compat.calib.bins import bin_of
from qdq.compat.calib.histogram import HistogramCalibrator
from qdq.errors import ArgumentTypeError, CalibrationError
from qdq.observers.finite import require_finite
from qdq.observers.methods import DEFAULT_PERCENTILE

logger = logging.getLogger(__name__)

_METHODS = ("percentile", "mse", "entropy", "max")
_CHUNK = 1 << 22  # elements, and counts, that are handled at a time


@torch.no_grad()
def calibrate_weights(
    model: nn.Module,
    method: str = "percentile",
    perchannel: bool = True,
    percentile: float = DEFAULT_PERCENTILE,
    num_bins: int = 2048,
) -> None:
    """Give every weight quantizer of a model its range, without data.

    Each channel (axis 1 of transposed convolutions, else 0) has its own histogram on 0 .. max|w|. The result is that of
    a `HistogramCalibrator` that collects the channel; 0 where all weights are 0.

    Args:
        model: Its modules with a `weight` and a `weight_quantizer` are calibrated.
        method: "percentile", "mse", "entropy" or "max".
        perchannel: One range for each channel, shape keep-dims; else one for the weight, 0-D.
        percentile: 0 to 100, for "percentile".
        num_bins: Bins of each histogram.

    Raises:
        TypeError: Unknown method.
        ValueError: Percentile outside 0..100.
        CalibrationError: NaN or Inf in a weight.
    """
    if method not in _METHODS:
        raise ArgumentTypeError(
            f"Unsupported calibration method {method!r}.", f"use one of {', '.join(_METHODS)}."
        )
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        quantizer = getattr(module, "weight_quantizer", None)
        if not isinstance(weight, torch.Tensor) or not weight.numel() or quantizer is None:
            continue
        shape = [1] * weight.dim()
        channels = weight.detach().float()
        if perchannel:
            axis = 1 if isinstance(module, _ConvTransposeNd) else 0
            shape[axis] = weight.shape[axis]
            channels = channels.movedim(axis, 0).flatten(1)
        else:
            channels = channels.reshape(1, -1)
        try:
            amax = _channel_amax(channels, quantizer, method, percentile, num_bins)
        except CalibrationError as error:
            raise CalibrationError(
                f"{name or 'the model'}.weight: {error.message}", error.fix
            ) from None
        _store(quantizer, amax.reshape(shape))
        logger.info("%s.weight: %s range of %d channels", name or "the model", method, amax.numel())


def _channel_amax(
    channels: torch.Tensor, quantizer: Any, method: str, percentile: float, num_bins: int
) -> torch.Tensor:
    """Ranges [K] of the rows of a float32 matrix [K, M]."""
    maxima = channels.abs().amax(1)
    require_finite(maxima, channels)
    if method == "max":
        return maxima
    solver = HistogramCalibrator(quantizer._num_bits, None, quantizer._unsigned, num_bins)
    # Divided on the CPU, in float64: the same widths as `HistogramCalibrator`, which divides in Python.
    widths = maxima.cpu().double() / num_bins
    amax = torch.zeros(len(widths))
    rows = max(1, _CHUNK // max(num_bins, channels.shape[1]))
    for start in range(0, len(widths), rows):
        chunk = slice(start, start + rows)
        counts = _histograms(channels[chunk], widths[chunk], num_bins).cpu().numpy()
        for channel, width in enumerate(widths[chunk].tolist()):
            if width > 0:  # else all weights are 0
                solver._width = width
                amax[start + channel] = solver._solve(counts[channel], method, 1, 128, percentile)
    return amax.to(channels.device)


def _histograms(channels: torch.Tensor, widths: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Counts [K, num_bins] of the rows of [K, M], all in one pass."""
    divisors = torch.where(widths > 0, widths, torch.ones_like(widths)).to(channels.device)
    offsets = torch.arange(len(widths), device=channels.device) * num_bins
    bins = bin_of(channels, divisors[:, None], num_bins) + offsets[:, None]
    return torch.bincount(bins.flatten(), minlength=len(widths) * num_bins).reshape(-1, num_bins)


def _store(quantizer: Any, amax: torch.Tensor) -> None:
    """Set the range of a quantizer, on the device of the weight; one element is 0-D."""
    if amax.numel() == 1:
        amax = amax.reshape(())
    quantizer.amax = amax.cpu().numpy()
    if quantizer.amax.device != amax.device:
        quantizer._amax = quantizer._amax.to(amax.device)
