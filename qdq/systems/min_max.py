"""Min-max: 2^b equally spaced values from the smallest to the largest element; 0 need not be one of them."""

from __future__ import annotations

import torch

from qdq.systems.arithmetic import narrow, require_values, round_half_up, widen
from qdq.systems.grid import Grid, name_width
from qdq.systems.settings import require_bits

MIN_MAX = "min-max affine"
"""Name of the system in verdicts."""


def min_max_quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """floor((x - lo) / (hi - lo) * n + 0.5) / n * (hi - lo) + lo, with n = 2^b - 1 and lo, hi the extrema of x.

    Args:
        values: Any shape; equal values stay as they are.
        bits: Width b of a code; with one bit the values are lo and hi.

    Raises:
        ArgumentError: An empty or non-finite tensor, or bits out of range.
        NumberTypeError: Not a float tensor, or bits that are no integer.
    """
    require_values(values, "min_max_quantize")
    require_bits(bits, "min_max_quantize")
    return narrow(spread_and_round(widen(values, bits), bits), values)


def spread_and_round(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The formula of `min_max_quantize` alone, for widened values."""
    return round_between(values, bits, *values.aminmax())


def quantize_between(
    values: torch.Tensor, bits: int, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """`min_max_quantize` with another range, to which the values are clamped; for arguments that have been checked.

    Args:
        values: Any shape.
        bits: Width of a code.
        low: Lower end of the range.
        high: Upper end.
    """
    wide = widen(values, bits)
    low, high = low.to(wide.dtype), high.to(wide.dtype)
    return narrow(round_between(wide.clamp(low, high), bits, low, high), values)


def round_between(
    values: torch.Tensor, bits: int, lowest: torch.Tensor, highest: torch.Tensor
) -> torch.Tensor:
    """Widened values of a range at one of 2^b equally spaced places; those of an empty range stay as they are."""
    # Half the range: the whole one may be beyond float32.
    half_range = highest / 2 - lowest / 2
    is_empty = half_range <= 0
    # A tensor: on a GPU, torch divides by a Python number with another rounding.
    num_steps = torch.full_like(half_range, 2**bits - 1)
    fraction = (values / 2 - lowest / 2) / torch.where(is_empty, 1.0, half_range)
    fraction = round_half_up(fraction * num_steps) / num_steps
    return torch.where(is_empty, values, fraction * highest + (1 - fraction) * lowest)


def describe_min_max(values: torch.Tensor, bits: int) -> Grid:
    """The grid of a constant tensor, such as a weight.

    Its zero point is rounded: 0 lies between two codes in general. One that rounds to 0 is not rounded, so that it does
    not look symmetric.

    Args:
        values: The values before they are quantized.
        bits: As for `min_max_quantize`.
    """
    lowest, highest = widen(values, bits).double().aminmax()
    if bool(lowest == highest):
        return _describe_constant(lowest)
    scale = (highest - lowest) / (2**bits - 1)
    exact = -lowest / scale
    zero_point = exact.round()
    if bool(zero_point == 0):
        zero_point = exact
    return Grid(
        system=MIN_MAX,
        scale=scale.float().reshape(1),
        zero_point=zero_point.float().reshape(1),
        lowest=0,
        highest=2**bits - 1,
        obstacle=name_width(bits),
        amax=torch.maximum(lowest.abs(), highest.abs()).float().reshape(1),
    )


def _describe_constant(value: torch.Tensor) -> Grid:
    """The grid of a tensor whose elements are equal: one code, -1, 0 or 1."""
    code = int(value.sign())
    scale = value.abs().float().reshape(1) if code else torch.ones_like(value).float().reshape(1)
    return Grid(MIN_MAX, scale, torch.zeros_like(scale), code, code)
