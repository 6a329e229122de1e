"""Quantized tensors as the integers q + zp, on which layers compute."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qdq.distiller.ranges.linear_params import LinearParams


class Integers(NamedTuple):
    """A tensor as integers, q + zp; its values are integers / scale.

    Args:
        integers: In float32 or float64.
        scale: Float32, one element or one for each channel.
        most: A bound of their absolute values, for an input.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    most: int = 0


def round_to_integers(scaled: torch.Tensor, params: LinearParams) -> torch.Tensor:
    """Values on the codes of a tensor, as the integers q + zp; in place.

    Args:
        scaled: The values times the scale, in float32.
        params: The zero point and the codes.
    """
    if params.mode.is_symmetric:
        return scaled.round_().clamp_(params.lowest, params.highest)
    codes = scaled.sub_(params.zero_point).round_().clamp_(params.lowest, params.highest)
    return codes.add_(params.zero_point)
