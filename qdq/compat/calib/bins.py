"""Which bin of equal width from 0 a value falls into."""

from __future__ import annotations

import torch


def count_bins(bins: torch.Tensor, num_bins: int) -> torch.Tensor:
    """How often each bin occurs; int64 [num_bins].

    Args:
        bins: Numbers of bins, one dimension.
        num_bins: Number of bins.
    """
    if bins.is_cpu:
        return torch.bincount(bins, minlength=num_bins)
    # `bincount` waits for the device. This is deterministic for integers, and exact in int64.
    return torch.histc(bins.long(), num_bins, 0, num_bins)


def bin_of(values: torch.Tensor, width: torch.Tensor, num_bins: int) -> torch.Tensor:
    """floor(|v| / width); the last edge belongs to the last bin.

    The division is in float64, because the float32 quotient of a value just below an edge may round up to the edge. The
    divisor is a tensor: on a GPU, torch multiplies by the reciprocal of a number, which differs in the last bit.

    Args:
        values: Any shape, float32.
        width: float64 with at least one dimension, on the device of the values; broadcasts.
        num_bins: Number of bins.

    Returns:
        int32, of the shape of `values`.
    """
    return values.double().abs_().div_(width).to(torch.int32).clamp_(max=num_bins - 1)
