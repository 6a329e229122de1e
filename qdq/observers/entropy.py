"""amax with the least loss of information: the Kullback-Leibler search of TensorRT.

Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; the details (zeros, ties, outliers) are as in
pytorch-quantization, see `pytorch-quantization-api.md` section 4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.formats import Format
from qdq.observers.search import candidate_bins

_CHUNK = 1 << 15  # elements of one intermediate matrix, which fits the cache of a core
_NOISE = 1e-12  # divergences this close differ only by rounding
Floats = npt.NDArray[np.float64]


def solve_entropy(
    counts: npt.NDArray[np.number], width: float, fmt: Format, stride: int = 1, start_bin: int = 128
) -> float:
    """The edge e_i with the smallest D(p || q); of equal ones, the last.

    For a candidate i, p is the histogram below e_i with everything above added to its last bin. q is that histogram
    with its bins averaged in N = qmax + 1 groups (over the non-empty bins of each). Both are normalised. With G the sum
    and C the number of non-empty bins of a group, the divergence is

        D_i = 1/T (sum_j p_j ln p_j - sum_groups G ln(G/C) - R ln q_last) + ln(S/T)

    with R the counts above e_i, S those below and T = S + R. Prefix sums give every term without a loop over bins.

    Args:
        counts: Occupation of the bins.
        width: Width of a bin.
        fmt: Format whose codes the groups represent.
        stride: Step between candidates.
        start_bin: First candidate.
    """
    hist = counts.astype(np.float64)
    if hist.size > 1:
        hist[0] = hist[1]  # the zeros of a ReLU say nothing about the range
    candidates = candidate_bins(start_bin, stride, hist.size + 1, least=1)
    if not candidates.size or hist.sum() == 0:
        return hist.size * width
    groups = fmt.qmax + 1
    rows = max(1, _CHUNK // min(groups, hist.size))
    parts = []
    for start in range(0, candidates.size, rows):
        parts.append(_divergence(hist, candidates[start : start + rows], groups))
    divergence = np.concatenate(parts)
    last_smallest = np.flatnonzero(divergence <= divergence.min() + _NOISE)[-1]
    return float(candidates[last_smallest] * width)


def _divergence(hist: Floats, candidates: npt.NDArray[np.int64], groups: int) -> Floats:
    """D_i for every candidate [n]; infinite if the last bin of p has counts but the last bin of q has none."""
    mass = np.concatenate([[0.0], np.cumsum(hist)])
    filled = np.concatenate([[0], np.cumsum(hist > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_xlogx(hist))])

    total = mass[-1]
    below = mass[candidates]
    above = total - below
    last = hist[candidates - 1]

    edges = _group_edges(candidates, groups)
    group_mass = np.diff(mass[edges], axis=1)
    group_filled = np.diff(filled[edges], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        group_mean = np.where(group_filled > 0, group_mass / group_filled, 1.0)
        # The last bin is in the last group, and q has it only where h has it.
        q_last = np.where(last > 0, _mean_of_last(mass, filled, candidates, groups), 0.0)
        outliers = np.where(above > 0, above * np.log(q_last), 0.0)
        p_log_p = entropy[candidates - 1] + _xlogx(last + above)
        p_log_q = np.sum(group_mass * np.log(group_mean), axis=1) + outliers
        divergence: Floats = (p_log_p - p_log_q) / total + np.log(below / total)
    divergence[np.isnan(divergence) | ((above > 0) & (last == 0))] = np.inf
    return divergence


def _group_edges(candidates: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.int64]:
    """First bin of every group of every candidate [n, g + 1]; bin j of i belongs to group floor(j N / i)."""
    widest = int(candidates.max())
    if groups >= widest:  # more groups than bins: every bin is a group, those past i are empty
        return np.minimum(np.arange(widest + 1)[None, :], candidates[:, None])
    ks = np.arange(groups + 1)[None, :]
    return -(-ks * candidates[:, None] // groups)


def _mean_of_last(
    mass: Floats, filled: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64], groups: int
) -> Floats:
    """Mean over the non-empty bins of the group that contains bin i - 1."""
    group = (candidates - 1) * groups // candidates
    start = -(-group * candidates // groups)
    mean: Floats = (mass[candidates] - mass[start]) / (filled[candidates] - filled[start])
    return mean


def _xlogx(values: Floats) -> Floats:
    return values * np.log(np.where(values > 0, values, 1.0))
