"""Logarithmic: the sign and the quantized logarithm of the magnitude (Miyashita, Lee, Murmann, arXiv 1603.01025).

One bit is the sign, the others are the magnitude's. 0 stays 0 and has no part in the range. One bit is the sign alone,
as in `fixed_point`; with two bits the magnitude has two levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qdq.formats import AMAX_FLOOR
from qdq.systems.arithmetic import narrow, require_bits, require_values, sign_of, widen
from qdq.systems.fixed_point import (
    compute_integral_part,
    describe_sign,
    require_sf,
    scale_and_round,
    sign_quantize,
)
from qdq.systems.grid import Grid
from qdq.systems.min_max import spread_and_round


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
        ArgumentTypeError: Not a float tensor, or bits that are no integer.
    """
    require_values(values, "log_minmax_quantize")
    require_bits(bits, "log_minmax_quantize")
    if bits == 1:
        return sign_quantize(values, alpha)
    return _quantize_logs(values, bits, lambda logs: spread_and_round(logs, bits - 1))


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
        ArgumentTypeError: Not a float tensor, or bits that are no integer.
    """
    require_values(values, "log_linear_quantize")
    require_bits(bits, "log_linear_quantize")
    if bits == 1:
        return sign_quantize(values, alpha)
    require_sf(sf, "log_linear_quantize")
    return _quantize_logs(values, bits, lambda logs: scale_and_round(logs, sf, bits - 1))


def compute_log_sf(values: torch.Tensor, bits: int, overflow_rate: float = 0.0) -> int:
    """The sf of the logarithms: b - 2 - ip(ln |x|) over the elements that are not 0.

    The logarithm has b - 1 bits, one of which is its sign.

    Args:
        values: Any shape; if all are 0, their logarithms count as 0.
        bits: Width b of a code.
        overflow_rate: As for `compute_integral_part`.
    """
    wide = widen(values, bits)
    logs = wide[wide != 0].abs().log()
    if logs.numel() == 0:
        logs = wide.new_zeros(1)
    return bits - 2 - compute_integral_part(logs, overflow_rate)


def _quantize_logs(
    values: torch.Tensor, bits: int, quantize: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    wide = widen(values, bits)
    is_nonzero = wide != 0
    nonzero = wide[is_nonzero]
    if nonzero.numel() == 0:
        return values.detach().clone()
    result = torch.zeros_like(wide)
    result[is_nonzero] = sign_of(nonzero) * quantize(nonzero.abs().log()).exp()
    return narrow(result, values)


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
