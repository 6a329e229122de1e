"""Affine codes: a scale and a zero point, so that real 0 is a code (Jacob et al., CVPR 2018, arXiv 1712.05877).

With codes from L to H, for a range [low, high] that is widened to contain 0:

    S = (high - low) / (H - L),  Z = clamp(round_half_even(H - high / S), L, H);  S = 1, Z = 0 for an empty range
    code = clamp(round_half_even(x / S + Z), L, H),  value = S * (code - Z)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from qdq.errors import ArgumentError
from qdq.systems.arithmetic import require_batch
from qdq.systems.settings import require_bits

Scheme = Literal["unsigned", "signed", "symmetric"]

SCHEMES = ("unsigned", "signed", "symmetric")
MAX_BITS = 16
"""Wider codes are not exact in float32, in which x / S + Z is computed."""


def find_codes(num_bits: int, scheme: Scheme = "unsigned") -> tuple[int, int]:
    """The smallest and the largest code: 0 to 2^b - 1, or from -2^(b-1) to 2^(b-1) - 1.

    Args:
        num_bits: The width b.
        scheme: "unsigned", "signed", or "symmetric", which has signed codes and Z = 0.

    Raises:
        ArgumentError: A width or a scheme that does not exist.
        NumberTypeError: A width that is not an integer.
    """
    require_width(num_bits, scheme, "find_codes")
    if scheme == "unsigned":
        return 0, 2**num_bits - 1
    half = 2 ** (num_bits - 1)
    return -half, half - 1


def solve_affine(
    low: torch.Tensor, high: torch.Tensor, lowest: int, highest: int, *, is_symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale S and zero point Z of ranges.

    Args:
        low: Lower ends, of any shape.
        high: Upper ends.
        lowest: The smallest code L.
        highest: The largest code H.
        is_symmetric: S = max(-low, high) / H and Z = 0 instead.

    Returns:
        Both in float32, of the shape of the ends.

    Raises:
        ArgumentError: Empty or non-finite ends, or no codes.
        NumberTypeError: Not float tensors.
    """
    require_batch(low, "solve_affine, low")
    require_batch(high, "solve_affine, high")
    if lowest >= highest:
        raise ArgumentError(
            f"solve_affine: codes are from {lowest} to {highest}.", "give the smallest one first."
        )
    low = low.double().clamp(max=0)
    high = high.double().clamp(min=0)
    num_steps = highest - lowest
    if is_symmetric:
        high = torch.maximum(-low, high)
        low = torch.zeros_like(low)
        num_steps = highest
    width = high - low
    is_empty = width == 0
    limits = torch.finfo(torch.float32)
    scale = torch.where(is_empty, num_steps, width) / torch.full_like(width, num_steps)
    scale = scale.clamp(limits.tiny, limits.max).float()
    if is_symmetric:
        return scale, torch.zeros_like(scale)
    # H - high / S with one rounding, so that ties are those of exact arithmetic.
    zero_point = highest - high * num_steps / torch.where(is_empty, 1, width)
    zero_point = zero_point.round().clamp(lowest, highest)
    return scale, torch.where(is_empty, max(lowest, 0), zero_point).float()


def cast_like(quantized: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Quantized values in the type of the float values; the largest number of that type instead of infinity.

    Args:
        quantized: In float32 or float64.
        values: A tensor of the type.
    """
    limit = min(torch.finfo(values.dtype).max, torch.finfo(quantized.dtype).max)
    return quantized.clamp(-limit, limit).to(values.dtype)


class FakeQuantize(torch.autograd.Function):
    """`FakeQuantize.apply(x, qparam)`: quantize and dequantize, with the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, qparam: Any) -> torch.Tensor:
        """The values of the codes, in shape and type of the values."""
        return cast_like(qparam.dequantize_tensor(qparam.quantize_tensor(values)), values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The same gradient."""
        return gradient, None


def require_width(num_bits: int | None, scheme: str, layer: str) -> None:
    """Refuse a width or a scheme that does not exist.

    Args:
        num_bits: The width; None: there is none.
        scheme: As for `find_codes`.
        layer: Name of the layer, for the message.

    Raises:
        ArgumentError: The message says which exist.
        NumberTypeError: The width is not an integer.
    """
    if scheme not in SCHEMES:
        raise ArgumentError(
            f"{layer}: scheme is {scheme!r}; known are {', '.join(SCHEMES)}.", "use 'unsigned'."
        )
    if num_bits is not None:
        require_bits(num_bits, layer, 2 if scheme == "symmetric" else 1, MAX_BITS)
