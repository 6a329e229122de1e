"""Logarithmic: the sign and the quantized logarithm of the magnitude (Miyashita, Lee, Murmann, arXiv 1603.01025).

One bit is the sign, the others are the magnitude's. 0 stays 0 and has no part in the range. One bit is the sign alone,
as in `fixed_point`; with two bits the magnitude has two levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qdq.formats import AMAX_FLOOR
from qdq.systems.arithmetic import require_values, sign_of, widen
from qdq.systems.fixed_point import (
    apply_formula,
    compute_integral_part,
    describe_sign,
    require_input,
    require_sf,
    scale_and_round,
)
from qdq.systems.grid import Grid
from qdq.systems.min_max import spread_and_round
from qdq.systems.settings import require_bits, require_rate


def log_minmax_quantize(
    values: torch.Tensor, bits: int, *, alpha: float | None = None
) -> torch.Tensor:
    """sgn(x) * exp(minmax(ln |x|, b - 1)), with the range of the elements that are not 0.

    Args:
        values: Any shape.
        bits: Width b of a code.
        alpha: For one bit, as for `fixed_point.sign_quantize`.

    Raises:
        ArgumentError: An empty or non-finite tensor, or bits out of range.
        NumberTypeError: Not a float tensor, or a number of the wrong type.
    """
    require_input(values, bits, alpha, "log_minmax_quantize")
    return apply_formula(
        values, bits, alpha, _of_logs(lambda logs: spread_and_round(logs, bits - 1))
    )


def log_linear_quantize(
    values: torch.Tensor, sf: int, bits: int, *, alpha: float | None = None
) -> torch.Tensor:
    """sgn(x) * exp(linear(ln |x|, sf, b - 1)).

    Args:
        values: Any shape.
        sf: Number of bits after the point of the logarithm, as `compute_log_sf` gives it.
        bits: Width b of a code.
        alpha: For one bit, as for `fixed_point.sign_quantize`.

    Raises:
        ArgumentError: An empty or non-finite tensor, or bits or sf out of range.
        NumberTypeError: Not a float tensor, or a number of the wrong type.
    """
    require_input(values, bits, alpha, "log_linear_quantize")
    if bits > 1:
        require_sf(sf, "log_linear_quantize")
    return quantize_log_linear(values, sf, bits, alpha)


def quantize_log_linear(
    values: torch.Tensor, sf: int, bits: int, alpha: float | None = None
) -> torch.Tensor:
    """`log_linear_quantize` for arguments that have been checked."""
    return apply_formula(
        values, bits, alpha, _of_logs(lambda logs: scale_and_round(logs, sf, bits - 1))
    )


def compute_log_sf(values: torch.Tensor, bits: int, overflow_rate: float = 0.0) -> int:
    """The sf of the logarithms: b - 2 - ip(ln |x|) over the elements that are not 0.

    The logarithm has b - 1 bits, one of which is its sign.

    Args:
        values: Any shape; if all are 0, their logarithms count as 0.
        bits: Width b of a code.
        overflow_rate: As for `compute_integral_part`.

    Raises:
        ArgumentError: As for `compute_integral_part`, or bits out of range.
        NumberTypeError: Likewise.
    """
    require_values(values, "compute_log_sf")
    require_bits(bits, "compute_log_sf")
    require_rate(overflow_rate, "compute_log_sf")
    wide = widen(values, bits)
    logs = wide[wide != 0].abs().log()
    if logs.numel() == 0:
        logs = wide.new_zeros(1)
    return bits - 2 - compute_integral_part(logs, overflow_rate)


def _of_logs(
    formula: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """sgn(x) * exp(formula(ln |x|)), and 0 for 0."""

    def quantize(wide: torch.Tensor) -> torch.Tensor:
        is_nonzero = wide != 0
        magnitudes = wide.abs()
        # Not an index of those that are not 0, for which the host would wait: zeros become the largest one, which is in
        # the range already.
        largest = magnitudes.max()
        largest = torch.where(largest > 0, largest, 1.0)
        logs = torch.where(is_nonzero, magnitudes, largest).log()
        return torch.where(is_nonzero, sign_of(wide) * formula(logs).exp(), 0.0)

    return quantize


def describe_log(values: torch.Tensor | None, bits: int) -> Grid:
    """The grid, which no int8 has, except with one bit.

    Args:
        values: The values before they are quantized; None for an activation.
        bits: Width of a code.
    """
    return describe_curved("logarithmic", "exponentials of equally spaced values", values, bits)


def describe_curved(system: str, nature: str, values: torch.Tensor | None, bits: int) -> Grid:
    """The grid of a system whose values are not equally spaced.

    Args:
        system: Its name.
        nature: What its values are.
        values: The values before they are quantized; None for an activation.
        bits: Width of a code.
    """
    if values is not None and bits == 1:
        return describe_sign(values, system)
    amax = torch.ones(1) if values is None else widen(values, bits).abs().max().float().reshape(1)
    half = 2 ** (bits - 1)
    scale = amax.clamp(min=AMAX_FLOOR) / half
    return Grid(
        system=system,
        scale=scale,
        zero_point=torch.zeros_like(scale),
        lowest=-half,
        highest=half,
        obstacle=f"{nature}, not multiples of a scale",
    )
