"""amax as a percentile of |x|."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError
from qdq.observers.methods import DEFAULT_PERCENTILE

logger = logging.getLogger(__name__)


def solve_percentile(counts: npt.NDArray[np.number], width: float, percentile: float) -> float:
    """The left edge of the first bin at which the cumulative fraction reaches `percentile` percent.

    100 gives the last edge. If bin 0 is chosen (most values are zero), its right edge is used instead of 0, because an
    amax of 0 would erase the tensor.

    Args:
        counts: Occupation of the bins, not all zero.
        width: Width of a bin.
        percentile: 0 to 100.

    Raises:
        ArgumentError: Percentile outside 0..100.
    """
    if not 0 <= percentile <= 100:
        raise ArgumentError(
            f"Invalid percentile. Must be in range 0 <= percentile <= 100, found {percentile}.",
            f"{DEFAULT_PERCENTILE} is the usual choice.",
        )
    if percentile == 100:
        return counts.size * width
    cumulative = np.cumsum(counts) / counts.sum()
    chosen = int(np.searchsorted(cumulative, percentile / 100))
    if chosen == 0:
        logger.warning(
            "percentile %s falls into the bin of the smallest values; its right edge is used. Method 'max' or 'mse' "
            "keeps more of a tensor that is mostly zeros (in qdq.compat also skip_zeros=True).",
            percentile,
        )
        chosen = 1
    return chosen * width
