"""Fixed point: codes of b bits times a power of two (section 3.1 of Lin, Talathi, Annapureddy, arXiv 1511.06393).

`compute_integral_part` finds the bits before the point, `linear_quantize` rounds. With one bit there is no point: the
values are plus and minus their mean absolute value (Rastegari et al., arXiv 1603.05279, equation 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qdq.errors import ArgumentError
from qdq.formats import AMAX_FLOOR
from qdq.systems.arithmetic import narrow, require_values, round_half_up, sign_of, widen
from qdq.systems.grid import Grid, name_width
from qdq.systems.settings import require_bits, require_number, require_rate

_LEAST = 1e-12  # added to the largest value: the logarithm of 0 is finite, and a power of two gets one more bit
_LOWEST_SF, _HIGHEST_SF = -127, 126  # 2^-sf is a normal float32


def compute_integral_part(values: torch.Tensor, overflow_rate: float = 0.0) -> int:
    """Number of bits before the point: ceil(log2(v + 1e-12)) of the largest |x| that need not saturate.

    Args:
        values: Any shape.
        overflow_rate: Fraction of the elements that may saturate, 0 <= rate < 1.

    Returns:
        -39 if all values are 0.

    Raises:
        ArgumentError: An empty or non-finite tensor, or a rate outside 0 to 1.
        NumberTypeError: Not a float tensor, or a rate that is no number.
    """
    require_values(values, "compute_integral_part")
    require_rate(overflow_rate, "compute_integral_part")
    magnitudes = widen(values, bits=8).abs().flatten()
    count = magnitudes.numel()
    num_saturated = min(int(overflow_rate * count), count - 1)
    largest = magnitudes.max()
    if num_saturated:
        largest = magnitudes.kthvalue(count - num_saturated).values
    return math.ceil(math.log2(float(largest) + _LEAST))


def linear_quantize(
    values: torch.Tensor, sf: int, bits: int, *, alpha: float | None = None
) -> torch.Tensor:
    """Codes clamp(floor(x / D + 0.5), -2^(b-1), 2^(b-1) - 1) times D = 2^-sf.

    Args:
        values: Any shape.
        sf: Number of bits after the point; it may be negative. One bit does not use it.
        bits: Width b of a code.
        alpha: For one bit, as for `sign_quantize`.

    Raises:
        ArgumentError: An empty or non-finite tensor, or bits or sf out of range.
        NumberTypeError: Not a float tensor, or a number of the wrong type.
    """
    require_input(values, bits, alpha, "linear_quantize")
    if bits > 1:
        require_sf(sf, "linear_quantize")
    return quantize_linear(values, sf, bits, alpha)


def require_input(values: Any, bits: Any, alpha: Any, function: str) -> None:
    """Refuse what no function of values and bits takes.

    Args:
        values: The tensor.
        bits: Width of a code.
        alpha: As for `sign_quantize`.
        function: Its name, for messages.

    Raises:
        ArgumentError: An empty or non-finite tensor, bits out of range, or an alpha that is not positive.
        NumberTypeError: Not a float tensor, or a number of the wrong type.
    """
    require_values(values, function)
    require_bits(bits, function)
    if alpha is not None:
        require_number(alpha, "alpha", function, AMAX_FLOOR, math.inf)


def quantize_linear(
    values: torch.Tensor, sf: int, bits: int, alpha: float | None = None
) -> torch.Tensor:
    """`linear_quantize` for arguments that have been checked."""
    return apply_formula(values, bits, alpha, lambda wide: scale_and_round(wide, sf, bits))


def apply_formula(
    values: torch.Tensor,
    bits: int,
    alpha: float | None,
    formula: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The result of a formula in the type of the values; with one bit that of `sign_quantize`.

    Args:
        values: Any shape, checked.
        bits: Width of a code.
        alpha: As for `sign_quantize`.
        formula: A function of the widened values.
    """
    wide = widen(values, bits)
    if bits == 1:
        return narrow(sign_of(wide) * _find_alpha(wide, alpha), values)
    return narrow(formula(wide), values)


def scale_and_round(values: torch.Tensor, sf: int, bits: int) -> torch.Tensor:
    """The formula of `linear_quantize` alone, for widened values; one bit has the codes -1 and 0."""
    half = 2 ** (bits - 1)
    # Powers of two: both products are exact.
    codes = round_half_up(values * 2.0**sf)
    return codes.clamp_(-half, half - 1).mul_(2.0**-sf)


def sign_quantize(values: torch.Tensor, alpha: float | None = None) -> torch.Tensor:
    """The rule for one bit: alpha where x >= 0, otherwise -alpha.

    Args:
        values: Any shape.
        alpha: The value; None: the mean of |x|.

    Raises:
        ArgumentError: An empty or non-finite tensor, or an alpha that is not positive.
        NumberTypeError: Not a float tensor, or an alpha that is no number.
    """
    require_input(values, 1, alpha, "sign_quantize")
    return quantize_linear(values, 0, 1, alpha)


def _find_alpha(wide: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """The value of one bit, in the type of the widened values."""
    if alpha is None:
        # A sum of float32 could overflow.
        return wide.abs().mean(dtype=torch.float64).to(wide.dtype)
    return torch.full((), alpha, dtype=wide.dtype, device=wide.device)


def describe_linear(sf: int, bits: int, device: torch.device | None = None) -> Grid:
    """The grid of `linear_quantize` with two bits or more.

    Args:
        sf: As for `linear_quantize`.
        bits: Likewise.
        device: Device of the grid.
    """
    half = 2 ** (bits - 1)
    scale = torch.full((1,), 2.0**-sf, device=device)
    return Grid(
        system="fixed point",
        scale=scale,
        zero_point=torch.zeros_like(scale),
        lowest=-half,
        highest=half - 1,
        obstacle=name_width(bits),
    )


def describe_sign(values: torch.Tensor, system: str, alpha: float | None = None) -> Grid:
    """The grid of `sign_quantize`: codes -1 and 1, scale alpha.

    Args:
        values: The values before they are quantized.
        system: Name of the number system.
        alpha: As for `sign_quantize`.
    """
    scale = _find_alpha(widen(values, bits=1), alpha).float().reshape(1)
    lowest, highest = (-1, 1) if bool(scale > 0) else (0, 0)
    return Grid(system, scale.clamp(min=AMAX_FLOOR), torch.zeros_like(scale), lowest, highest)


def require_sf(sf: Any, layer: str) -> None:
    """Refuse a number of bits after the point that is no integer or gives no float32.

    Args:
        sf: The number.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        ArgumentError: It is neither.
        NumberTypeError: It is no number.
    """
    require_number(sf, "sf", layer, _LOWEST_SF, _HIGHEST_SF + 1)
    if sf != int(sf):
        raise ArgumentError(
            f"{layer}: sf is {sf}; it must be an integer from {_LOWEST_SF} to {_HIGHEST_SF}.",
            "give bits - 1 - compute_integral_part(values).",
        )
