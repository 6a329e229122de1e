"""The candidates of the searches over the bins of a histogram."""

from __future__ import annotations

import logging
from numbers import Integral

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError, ArgumentTypeError

logger = logging.getLogger(__name__)


def candidate_bins(start_bin: int, stride: int, stop: int, least: int) -> npt.NDArray[np.int64]:
    """The bins to try: start_bin, start_bin + stride, ... below `stop`; none, with a warning, if it starts too late.

    Args:
        start_bin: First candidate.
        stride: Step between candidates.
        stop: One past the last candidate.
        least: The smallest `start_bin` that makes sense.

    Raises:
        ArgumentTypeError: A bin that is not an integer.
        ArgumentError: A stride below 1 or a first candidate below `least`.
    """
    for name, value, smallest in (("stride", stride, 1), ("start_bin", start_bin, least)):
        if not isinstance(value, Integral):
            raise ArgumentTypeError(
                f"{name} is {value!r}; it must be an integer.", "bins are counted from 0."
            )
        if value < smallest:
            raise ArgumentError(
                f"{name} is {value}; it must be {smallest} or more.", "1 and 128 are the defaults."
            )
    if start_bin >= stop:
        logger.warning(
            "start_bin=%d is past the last bin to try, %d: the last edge is amax.",
            start_bin,
            stop - 1,
        )
    return np.arange(start_bin, stop, stride)
