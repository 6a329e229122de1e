"""In which type sums of products of integers are exact."""

from __future__ import annotations

import torch

_EXACT_FLOAT32 = 2**24  # float32 has all integers up to this
_TF32_BITS = 10  # a GPU may round the factors of float32 products to these


def choose_type(largest_sum: float, most: int, weight_bits: int) -> torch.dtype:
    """Float32, or float64 if float32 may not have all sums exactly.

    Args:
        largest_sum: The largest sum of the absolute integers of one factor, for an output.
        most: A bound of the absolute integers of the other factor.
        weight_bits: Width of the codes of the first factor.
    """
    has_short_factors = max(most.bit_length() - 1, weight_bits) <= _TF32_BITS
    is_exact = largest_sum * most < _EXACT_FLOAT32 and has_short_factors
    return torch.float32 if is_exact else torch.float64
