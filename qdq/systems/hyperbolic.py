"""Tanh: 2^b equally spaced values of tanh(x), so that small values have the finest steps."""

from __future__ import annotations

import torch

from qdq.systems.arithmetic import round_half_up
from qdq.systems.fixed_point import apply_formula, require_input
from qdq.systems.grid import Grid
from qdq.systems.logarithmic import describe_curved


def tanh_quantize(values: torch.Tensor, bits: int, *, alpha: float | None = None) -> torch.Tensor:
    """atanh(2k/n - 1) with k = floor((tanh(x) + 1) / 2 * n + 0.5) and n = 2^b - 1.

    The first and the last code stand for minus and plus 1 - 1/(2n), the middle of the last half step, because atanh(1)
    is infinite.

    Args:
        values: Any shape.
        bits: Width b of a code.
        alpha: For one bit, as for `fixed_point.sign_quantize`.

    Raises:
        ArgumentError: An empty or non-finite tensor, or bits out of range.
        NumberTypeError: Not a float tensor, or a number of the wrong type.
    """
    require_input(values, bits, alpha, "tanh_quantize")
    return apply_formula(values, bits, alpha, lambda wide: _round_tanh(wide, bits))


def _round_tanh(wide: torch.Tensor, bits: int) -> torch.Tensor:
    """The formula of `tanh_quantize` alone."""
    last = 2**bits - 1
    # A tensor: on a GPU, torch divides by a Python number with another rounding.
    num_steps = torch.full((), last, dtype=wide.dtype, device=wide.device)
    codes = round_half_up((wide.tanh() + 1) / 2 * num_steps)
    end = 1 - 1 / (2 * last)
    return (2 * codes / num_steps - 1).clamp(-end, end).atanh()


def describe_tanh(values: torch.Tensor | None, bits: int) -> Grid:
    """The grid, which no int8 has, except with one bit.

    Args:
        values: The values before they are quantized; None for an activation.
        bits: Width of a code.
    """
    return describe_curved("tanh", "inverse hyperbolic tangents", values, bits)
