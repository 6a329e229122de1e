"""Distances between two sets of outputs; plain numpy, so that they also run without torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError

Array = npt.NDArray[np.floating]


def sqnr_db(reference: Array, outputs: Array) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum ref^2 / sum (ref - out)^2).

    Returns:
        `inf` for equal arrays, `-inf` if the reference is all zero and the outputs are not, `nan` if either contains
        one.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    noise = float(np.sum((reference - outputs) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return float("inf")
    if signal == 0:
        return float("-inf")
    return float(10 * np.log10(signal / noise))


def cosine(reference: Array, outputs: Array) -> float:
    """Cosine of the angle between two arrays as vectors; 1 for two all-zero arrays, 0 if only one is.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    norms = float(np.linalg.norm(reference) * np.linalg.norm(outputs))
    if norms == 0:
        return float(np.array_equal(reference, outputs))
    return float(np.vdot(reference, outputs) / norms)


def max_abs_difference(reference: Array, outputs: Array) -> float:
    """Largest absolute difference of any element; 0 for empty arrays.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    return float(np.max(np.abs(reference - outputs), initial=0.0))


def agreement(reference: Array, outputs: Array) -> float:
    """Fraction of rows `[N, classes]` whose largest element is in the same place, 0 to 1.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    return float(np.mean(reference.argmax(-1) == outputs.argmax(-1)))


def top_k(logits: Array, labels: npt.NDArray[np.integer], k: int) -> float:
    """Top-k accuracy: the fraction of rows whose label is among the k largest outputs, 0 to 1.

    Args:
        logits: `[N, classes]`.
        labels: Class of each row, `[N]`.
        k: Limited to the number of classes.
    """
    k = min(k, logits.shape[-1])
    best = np.argpartition(logits, -k, axis=-1)[:, -k:]
    return float(np.mean((best == labels[:, None]).any(-1)))


def _as_pair(reference: Array, outputs: Array) -> tuple[Array, Array]:
    if np.shape(reference) != np.shape(outputs):
        raise ArgumentError(
            f"outputs of different shapes: {np.shape(reference)} and {np.shape(outputs)}.",
            "compare the same output of the same inputs.",
        )
    return np.asarray(reference, np.float64), np.asarray(outputs, np.float64)
