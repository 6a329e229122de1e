"""amax from the maximum of every batch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def average_maxima(maxima: npt.NDArray[np.float64]) -> float:
    """Mean of the maxima of the batches.

    Args:
        maxima: `[B]`, at least one.
    """
    return math.fsum(maxima) / len(maxima)


def moving_average(maxima: npt.NDArray[np.float64], weight: float) -> float:
    """m_0 = max_0, m_i = (1 - weight) m_{i-1} + weight max_i: later batches count more.

    Args:
        maxima: `[B]` in the order of the batches, at least one.
        weight: Weight of the current batch, above 0 and at most 1.
    """
    average = float(maxima[0])
    for maximum in maxima[1:].tolist():
        average += weight * (maximum - average)
    return average
