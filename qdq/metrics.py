"""Distances between two sets of outputs; plain numpy, so that they also run without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError

Array = npt.NDArray[np.floating]
Batches = Array | list[Array]
"""One output on all samples: `[N, ...]`, or one array a batch if their sizes differ in more than the samples."""
Outputs = Batches | Mapping[str, Batches]
"""One output, or several by name."""

_SINGLE = "output"


def sqnr_db(reference: Batches, outputs: Batches) -> float:
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


def cosine(reference: Batches, outputs: Batches) -> float:
    """Cosine of the angle between two arrays as vectors; 1 for two all-zero arrays, 0 if only one is.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    norms = float(np.linalg.norm(reference) * np.linalg.norm(outputs))
    if norms == 0:
        return float(np.array_equal(reference, outputs))
    return float(np.vdot(reference, outputs) / norms)


def max_abs_difference(reference: Batches, outputs: Batches) -> float:
    """Largest absolute difference of any element; 0 for empty arrays.

    Raises:
        ArgumentError: Different shapes.
    """
    reference, outputs = _as_pair(reference, outputs)
    return float(np.max(np.abs(reference - outputs), initial=0.0))


def agreement(reference: Batches, outputs: Batches) -> float:
    """Fraction of rows `[N, classes]` whose largest element is in the same place, 0 to 1.

    Raises:
        ArgumentError: Different shapes.
    """
    _require_same_shapes(reference, outputs)
    hits = []
    for first, second in zip(list_batches(reference), list_batches(outputs), strict=True):
        hits.append((np.asarray(first).argmax(-1) == np.asarray(second).argmax(-1)).ravel())
    return float(np.mean(np.concatenate(hits)))


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


def list_batches(outputs: Batches) -> list[Array]:
    """The arrays of an output: one, or one a batch."""
    return outputs if _is_ragged(outputs) else [np.asarray(outputs)]


def count_rows(outputs: Batches) -> int:
    """Number of samples of an output."""
    return sum(len(batch) for batch in list_batches(outputs))


def name_arrays(outputs: Outputs) -> dict[str, Batches]:
    """Outputs by name; a single one is "output".

    Args:
        outputs: As `predictor.predict` returns them.
    """
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return {_SINGLE: outputs}


def pair_arrays(reference: Outputs, outputs: Outputs) -> dict[str, tuple[Batches, Batches]]:
    """The floating-point outputs of two models side by side, by the names of the first.

    They are paired by name, or by position if the names differ. Whole numbers, such as classes, follow from the other
    outputs and have no SQNR. They are left out unless there is nothing else.

    Args:
        reference: Outputs of the first model.
        outputs: Outputs of the second one on the same inputs.

    Raises:
        ArgumentError: Different numbers of outputs, or none.
    """
    first, second = name_arrays(reference), name_arrays(outputs)
    if len(first) != len(second) or not first:
        raise ArgumentError(
            f"outputs that cannot be compared: {list(first)} and {list(second)}.",
            "compare the same outputs: select them with outputs= in predict.",
        )
    if first.keys() != second.keys():
        second = dict(zip(first, second.values(), strict=True))
    pairs = {name: (batches, second[name]) for name, batches in first.items()}
    floats = {name: pair for name, pair in pairs.items() if _is_float(pair[0])}
    return floats or pairs


def has_classes(outputs: Batches) -> bool:
    """Whether an output has the shape of class scores, `[N, classes]`: its largest element may be an answer."""
    return all(np.ndim(batch) == 2 for batch in list_batches(outputs))


def decide_db(decibels: Mapping[str, float], weights: Sequence[float] | None = None) -> float:
    """One figure from the SQNR of several outputs: that of the worst, or of their weighted relative noise.

    An output that is always 0 in the reference has no scale to compare its noise with; it counts only if all are.

    Args:
        decibels: SQNR of each output in dB.
        weights: Weight of each output. None: the worst decides.

    Returns:
        `nan` if one of them is.
    """
    return float(combine_db(np.array([*decibels.values()], np.float64), weights))


def combine_db(
    decibels: npt.NDArray[np.float64], weights: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """`decide_db` of many states at once.

    Args:
        decibels: SQNR in dB, `[..., outputs]`.
        weights: As for `decide_db`.

    Returns:
        `[...]`.
    """
    factors = np.ones(decibels.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    has_weight = np.broadcast_to(factors > 0, decibels.shape)
    has_scale = has_weight & (decibels != -np.inf)
    counts = np.where(has_scale.any(-1, keepdims=True), has_scale, has_weight)
    if weights is None or len(factors) == 1:
        combined = np.where(counts, decibels, np.inf).min(-1)
    else:
        with np.errstate(divide="ignore", over="ignore"):
            noise = np.where(counts, factors * 10 ** (-decibels / 10), 0.0).sum(-1)
            combined = -10 * np.log10(noise / np.where(counts, factors, 0.0).sum(-1))
    return np.where(np.isnan(decibels).any(-1), np.nan, combined)


def _is_float(outputs: Batches) -> bool:
    return all(np.issubdtype(batch.dtype, np.floating) for batch in list_batches(outputs))


def _is_ragged(outputs: Batches) -> TypeGuard[list[Array]]:
    """Whether an output is a list with one array a batch."""
    return isinstance(outputs, list) and all(isinstance(batch, np.ndarray) for batch in outputs)


def _as_pair(reference: Batches, outputs: Batches) -> tuple[Array, Array]:
    """Two outputs as float64 arrays; with one array a batch, all of them in a row."""
    _require_same_shapes(reference, outputs)
    first, second = _join(reference), _join(outputs)
    return np.asarray(first, np.float64), np.asarray(second, np.float64)


def _join(outputs: Batches) -> Array:
    if _is_ragged(outputs):
        return np.concatenate([batch.ravel() for batch in outputs])
    return np.asarray(outputs)


def _require_same_shapes(reference: Batches, outputs: Batches) -> None:
    shapes = _list_shapes(reference)
    other_shapes = _list_shapes(outputs)
    if shapes != other_shapes:
        raise ArgumentError(
            f"outputs of different shapes: {_format_shapes(shapes)} and {_format_shapes(other_shapes)}.",
            "compare the same output of the same inputs.",
        )


def _list_shapes(outputs: Batches) -> list[tuple[int, ...]]:
    return [np.shape(batch) for batch in list_batches(outputs)]


def _format_shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes[:3]))
