"""amax with the least squared error of quantization."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from qdq.formats import Format

logger = logging.getLogger(__name__)
_CHUNK = 1 << 22  # elements of one intermediate matrix: 32 MB


def solve_mse(
    counts: npt.NDArray[np.integer], width: float, fmt: Format, stride: int = 1, start_bin: int = 128
) -> float:
    """Bin centre a that minimises sum_j h_j (FQ(c_j; a) - c_j)^2 over the centres c_j; the first smallest wins.

    FQ rounds |x| to multiples of a / qmax and clips at a, so for one a the centres fall into qmax + 1 intervals,
    one a code. With prefix sums of h, h c and h c^2 each interval costs three subtractions, whatever its
    length: n x qmax operations instead of n x n.

    Args:
        counts: Occupation of the bins.
        width: Width of a bin.
        fmt: Format whose largest code amax is mapped to.
        stride: Step between candidates.
        start_bin: First candidate.
    """
    size = counts.size
    if start_bin >= size:
        logger.warning("only %d bins, start_bin is %d: the last edge is used as amax.", size, start_bin)
        return size * width
    centres = np.arange(size, dtype=np.float64) + 0.5  # in units of the width
    weights = counts.astype(np.float64)
    prefix = np.zeros((3, size + 1))
    for row, values in zip(prefix, (weights, weights * centres, weights * centres**2), strict=True):
        np.cumsum(values, out=row[1:])

    candidates = np.arange(start_bin, size, stride)
    # Wide formats have more codes than bins; codes that hold no centre cost memory but change nothing.
    rows = max(1, _CHUNK // (fmt.qmax + 1))
    errors = np.concatenate(
        [_errors(prefix, centres[candidates[at : at + rows]], fmt.qmax) for at in range(0, candidates.size, rows)]
    )
    return float(centres[candidates[int(np.argmin(errors))]] * width)


def _errors(prefix: npt.NDArray[np.float64], amax: npt.NDArray[np.float64], qmax: int) -> npt.NDArray[np.float64]:
    """Squared error for each candidate `amax` [n], in units of the bin width."""
    size = prefix.shape[1] - 1
    step = amax[:, None] / qmax
    codes = np.arange(qmax + 1)
    # Centre j + 0.5 has code k where (k - 0.5) step <= j + 0.5 < (k + 0.5) step; all beyond belong to qmax.
    starts = np.clip(np.ceil((codes - 0.5) * step - 0.5), 0, size).astype(np.int64)
    ends = np.concatenate([starts[:, 1:], np.full((amax.size, 1), size)], axis=1)
    count, first, second = (row[ends] - row[starts] for row in prefix)
    values = codes * step
    errors: npt.NDArray[np.float64] = np.sum(second - 2 * values * first + values**2 * count, axis=1)
    return errors
