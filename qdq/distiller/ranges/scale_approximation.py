"""Scales as an integer multiplier and a shift, as hardware without floating point has them.

For a multiplier of m bits:  k = floor(log2((2^m - 1) / s)),  A = floor(s * 2^k),  s ~ A / 2^k

The relative error is below 2 / (2^m - 1). A negative k is a shift to the left.
"""

from __future__ import annotations

import torch

from qdq.distiller.ranges.number_tensors import Numbers, read_numbers
from qdq.errors import ArgumentError
from qdq.systems.settings import require_bits


def approximate_scale(
    scale: Numbers, num_bits: int, limit: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The multiplier A and the shift k of scales.

    Args:
        scale: Above 0, any shape.
        num_bits: The width m of the multiplier.
        limit: Shift by at most m; then small scales become 0.

    Returns:
        Both in float64, in the shape of the scales.

    Raises:
        ArgumentError: A scale that is not finite and above 0, or no such width.
        ArgumentTypeError: The width is no integer, or a scale is no number.
    """
    require_bits(num_bits, "scale_approx_mult_bits")
    wide = read_numbers(scale, "scale", torch.float64)
    if not bool((wide.isfinite() & (wide > 0)).all()):
        raise ArgumentError(
            f"a scale is {float(wide.min())}; all must be finite and above 0.",
            "calibrate the layer first.",
        )
    shift = ((2**num_bits - 1) / wide).log2().floor()
    if limit:
        shift = shift.clamp(max=num_bits)
    return (wide * 2**shift).floor(), shift


def evaluate_approximation(multiplier: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The scales A / 2^k, in float32.

    Args:
        multiplier: From `approximate_scale`.
        shift: Likewise.
    """
    return (multiplier / 2**shift).float()


def apply_approximation(scale: torch.Tensor, num_bits: int | None) -> torch.Tensor:
    """Scales as their approximations, if they are approximated.

    Args:
        scale: As for `approximate_scale`.
        num_bits: Likewise; None: the scales stay as they are.
    """
    if num_bits is None:
        return scale
    return evaluate_approximation(*approximate_scale(scale, num_bits))
