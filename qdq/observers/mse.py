"""amax with the least squared error of quantization."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.formats import Format
from qdq.observers.search import candidate_bins

_CHUNK = 1 << 15  # elements of one intermediate matrix, which fits the cache of a core
_NOISE = 4e-15  # relative to the sum of squares: errors this close differ only by rounding
Floats = npt.NDArray[np.float64]


def solve_mse(
    counts: npt.NDArray[np.number], width: float, fmt: Format, stride: int = 1, start_bin: int = 128
) -> float:
    """The bin centre with the least squared error for a format; see `solve_mse_levels`.

    Args:
        counts: Occupation of the bins.
        width: Width of a bin.
        fmt: Format whose largest code amax is mapped to.
        stride: Step between candidates.
        start_bin: First candidate.
    """
    levels = np.asarray(fmt.list_magnitudes())
    return solve_mse_levels(counts, width, levels, stride, start_bin)


def solve_mse_levels(
    counts: npt.NDArray[np.number],
    width: float,
    levels: Floats,
    stride: int = 1,
    start_bin: int = 128,
    zero_below: float = 0.0,
) -> float:
    """The bin centre a that minimises sum_j h_j (FQ(c_j; a) - c_j)^2 over the centres c_j; of equal ones, the first.

    FQ rounds |x| to the nearest of the levels L_k, scaled so that the last one is a. For each a, the centres fall into
    as many intervals as there are levels; the k-th starts at s_k. With H and F, the prefix sums of h and h c, and
    summation by parts (u = a / L_last, differences to the previous level, k from 1), the error is

        sum h c^2 - 2 u (L_last F_end - sum (L_k - L_k-1) F(s_k)) + u^2 (L_last^2 H_end - sum (L_k^2 - L_k-1^2) H(s_k))

    which costs two look-ups per level: n x levels operations instead of n x n. If a centre is midway between two
    levels, both give the same error, so it does not matter how FQ breaks ties.

    Args:
        counts: Occupation of the bins.
        width: Width of a bin.
        levels: The values of FQ before scaling, ascending from 0.
        stride: Step between candidates.
        start_bin: First candidate.
        zero_below: FQ is 0 everywhere if a is not above this.
    """
    size = counts.size
    candidates = candidate_bins(start_bin, stride, size, least=0)
    if not candidates.size:
        return size * width
    # In units of the width, in which the prefix sums are exact.
    centres = np.arange(size, dtype=np.float64) + 0.5
    prefix_h, prefix_f = np.zeros((2, size + 1))
    np.cumsum(counts, out=prefix_h[1:])
    np.cumsum(counts * centres, out=prefix_f[1:])
    squares = float(np.sum(counts * centres**2))
    # Formats with more levels than bins have many levels without a centre; they cost time but change nothing.
    rows = max(1, _CHUNK // levels.size)
    parts = []
    for start in range(0, candidates.size, rows):
        amax = centres[candidates[start : start + rows]]
        parts.append(_saved_error(prefix_h, prefix_f, amax, levels))
    saved = np.concatenate(parts)
    saved[centres[candidates] * width <= zero_below] = 0
    first_best = int(np.argmax(saved >= saved.max() - _NOISE * squares))
    return float(centres[candidates[first_best]] * width)


def _saved_error(prefix_h: Floats, prefix_f: Floats, amax: Floats, levels: Floats) -> Floats:
    """The difference between sum h c^2, the error of erasing everything, and the error of each `amax` [n]."""
    unit = amax / levels[-1]
    middles = (levels[1:] + levels[:-1]) / 2
    # Bin j, with its centre at j + 0.5, has reached level k if j + 0.5 >= middle k.
    starts = np.ceil(unit[:, None] * middles - 0.5)
    np.clip(starts, 0, prefix_h.size - 1, out=starts)
    bins = starts.astype(np.intp)
    linear = levels[-1] * prefix_f[-1] - prefix_f[bins] @ np.diff(levels)
    square = levels[-1] ** 2 * prefix_h[-1] - prefix_h[bins] @ np.diff(levels**2)
    saved: Floats = unit * (2 * linear - unit * square)
    return saved
