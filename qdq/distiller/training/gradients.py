"""Gradients of quantizers with ends."""

from __future__ import annotations

import torch

from qdq.systems.affine import cast_like
from qdq.systems.arithmetic import pass_gradient


def pass_inside(
    values: torch.Tensor,
    quantized: torch.Tensor,
    low: torch.Tensor | float,
    high: torch.Tensor | float,
) -> torch.Tensor:
    """Quantized values, in the type of the values, with their gradient where low <= value <= high.

    Args:
        values: Any float type.
        quantized: In float32.
        low: The lower end.
        high: The upper end.
    """
    wide = values.float()
    is_inside = (wide >= low) & (wide <= high)
    # Not torch.clamp, whose gradient at the ends is 0, 1/2 or 1.
    passed = torch.where(is_inside, wide, wide.detach())
    return cast_like(pass_gradient(passed, quantized), values)
