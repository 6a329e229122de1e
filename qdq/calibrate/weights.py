"""Ranges of weights, read from the weights themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qdq.errors import ArgumentError, CalibrationError
from qdq.formats import Format
from qdq.observers.max import reduce_amax
from qdq.quantize import compute_scale, quantize_codes
from qdq.quantizer import TensorQuantizer

WEIGHT_METHODS = ("max", "mse")
_OCTAVES = 3  # amax is searched from the maximum down to 1/8 of it
_STEPS = 8  # candidates an octave, and again between the best one's neighbours


def require_weight_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ArgumentError: With the known ones.
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
    """The range of a weight, per channel or per tensor as the axis of its quantizer says.

    Args:
        label: What to call it in a message.
        weight: Any shape.
        quantizer: Gives format and axis.
        method: "max", or "mse": the range with the least squared error of the weight, of each channel on its own.

    Returns:
        float32, of the rank of the weight with size 1 on all axes but the kept one; `[]` per tensor.

    Raises:
        CalibrationError: NaN or Inf in the weight.
    """
    amax = reduce_amax(weight, quantizer.axis)
    if not bool(torch.isfinite(amax).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise CalibrationError(
            f"{label} holds {bad} NaN or Inf of {weight.numel()} values.",
            "load other weights: this model was broken before quantization.",
        )
    if method == "max" or not weight.numel():
        return amax
    return _search(weight.float(), amax, quantizer.format)


def _search(weight: torch.Tensor, largest: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The best share of the maximum in each channel: on a grid of 2^(-i/8), then between the best one's neighbours."""
    kept = [dim for dim, size in enumerate(largest.shape) if size > 1]
    others = [dim for dim in range(weight.dim()) if dim not in kept]

    def measure(share: torch.Tensor) -> torch.Tensor:
        scale = compute_scale(largest * share, fmt)
        error = quantize_codes(weight, scale, fmt).mul_(scale).sub_(weight).square_()
        return error.sum(others, keepdim=True).reshape(largest.shape) if others else error

    best = torch.ones_like(largest)
    least = measure(best)
    steps = [-i / _STEPS for i in range(1, _OCTAVES * _STEPS + 1)]
    best, least = _descend(
        measure, best, least, [torch.full_like(best, 2.0**step) for step in steps]
    )
    finer = [i / _STEPS**2 for i in range(1 - _STEPS, _STEPS) if i]
    best, _ = _descend(measure, best, least, [(best * 2.0**step).clamp_max(1) for step in finer])
    return largest * best


def _descend(
    measure: Callable[[torch.Tensor], torch.Tensor],
    best: torch.Tensor,
    least: torch.Tensor,
    shares: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The better of `best` and any of `shares` in each channel, and its error."""
    for share in shares:
        error = measure(share)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best, least
