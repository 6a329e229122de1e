"""How far two sets of outputs lie apart; plain numpy, so that it also runs where there is no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError

Array = npt.NDArray[np.floating]


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum ref^2 / sum (ref - other)^2).

    Returns:
        `inf` for equal arrays, `-inf` if the reference is all zero and the other is not, `nan` if either holds one.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, other = _as_pair(reference, other)
    noise = float(np.sum((reference - other) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


def cosine(reference: Array, other: Array) -> float:
    """Cosine of the angle between the two arrays seen as vectors; 1 for two all-zero arrays."""
    reference, other = _as_pair(reference, other)
    norms = float(np.linalg.norm(reference) * np.linalg.norm(other))
    if norms == 0:
        return float(np.array_equal(reference, other))
    return float(np.vdot(reference, other) / norms)


def max_abs_difference(reference: Array, other: Array) -> float:
    """Largest absolute difference of any element."""
    reference, other = _as_pair(reference, other)
    return float(np.max(np.abs(reference - other), initial=0.0))


def agreement(reference: Array, other: Array) -> float:
    """Share of rows `[N, classes]` whose largest element stands in the same place, 0..1."""
    reference, other = _as_pair(reference, other)
    return float(np.mean(reference.argmax(-1) == other.argmax(-1)))


def top_k(logits: Array, labels: npt.NDArray[np.integer], k: int) -> float:
    """Share of rows `[N, classes]` whose label `[N]` is among the k largest, 0..1."""
    k = min(k, logits.shape[-1])
    best = np.argpartition(logits, -k, axis=-1)[:, -k:]
    return float(np.mean((best == labels[:, None]).any(-1)))


def _as_pair(reference: Array, other: Array) -> tuple[Array, Array]:
    if np.shape(reference) != np.shape(other):
        raise ArgumentError(
            f"outputs of different shapes: {np.shape(reference)} and {np.shape(other)}.",
            "compare the same output of the same inputs.",
        )
    return np.asarray(reference, np.float64), np.asarray(other, np.float64)
