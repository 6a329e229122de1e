"""Measures of outputs against those of the float model, one row per sample, so that samples can be resampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.batch import count_samples, find_labels, floats_of
from qdq.errors import DataError

ErrorSums = npt.NDArray[np.float64]
"""One row per sample, or one per batch if its outputs have no sample axis; the columns can be summed."""
_DRAWS = 1000
_SQNR_COLUMNS = 2


@dataclass(frozen=True)
class OutputMetric:
    """A measure that is a function of sums over samples.

    Args:
        name: "sqnr", "cosine", "kl" or "top1".
        higher_is_better: Its direction.
        columns: Number of its columns K.
        collect: Outputs of two models -> columns, each `[N]` or with several values per sample.
        reduce: Sums of the columns `[..., K]` -> values `[...]`.
    """

    name: str
    higher_is_better: bool
    columns: int
    collect: Callable[[_Pair], list[torch.Tensor]]
    reduce: Callable[[ErrorSums], ErrorSums]


@dataclass(frozen=True)
class _Pair:
    """Outputs of the float model and of another model on the same samples, float64.

    Args:
        reference: All outputs of the float model, `[N, D]`.
        outputs: All outputs of the other model, `[N, D]`.
        reference_scores: First output of the float model, `[M, classes]`.
        scores: First output of the other model, `[M, classes]`.
        labels: Labels of the batch, if it has any.
    """

    reference: torch.Tensor
    outputs: torch.Tensor
    reference_scores: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor | None


def _collect_sqnr(pair: _Pair) -> list[torch.Tensor]:
    return [pair.reference.square().sum(1), (pair.reference - pair.outputs).square().sum(1)]


def _collect_cosine(pair: _Pair) -> list[torch.Tensor]:
    return [
        (pair.reference * pair.outputs).sum(1),
        pair.reference.square().sum(1),
        pair.outputs.square().sum(1),
    ]


def _collect_kl(pair: _Pair) -> list[torch.Tensor]:
    expected = pair.reference_scores.log_softmax(1)
    actual = pair.scores.log_softmax(1)
    divergence = (expected.exp() * (expected - actual)).sum(1)
    return [divergence, torch.ones_like(divergence)]


def _collect_top1(pair: _Pair) -> list[torch.Tensor]:
    if pair.labels is None or pair.labels.shape != pair.scores.shape[:1]:
        raise _lacks_labels()
    labels = pair.labels.to(pair.scores.device, non_blocking=True)
    hits = (pair.scores.argmax(1) == labels).double()
    return [hits, torch.ones_like(hits)]


def _lacks_labels() -> DataError:
    return DataError(
        "the metric 'top1' needs a label for each sample.",
        "give batches of (images, labels), or use 'kl', which needs none.",
    )


def require_labels(metric: OutputMetric, batch: Any) -> None:
    """Refuse a batch without labels if the metric needs them, before the work.

    Raises:
        DataError: The batch has no labels.
    """
    if metric is METRICS["top1"] and _labels_of(batch) is None:
        raise _lacks_labels()


def _reduce_sqnr(sums: ErrorSums) -> ErrorSums:
    """Energy of the reference over that of the error, in dB; infinite without an error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 10 * np.log10(sums[..., 0] / sums[..., 1])
    return np.where(sums[..., 1] == 0, np.inf, value)


def _reduce_cosine(sums: ErrorSums) -> ErrorSums:
    """Cosine of the angle between two vectors; 1 if both are zero, 0 if only one is."""
    norms = np.sqrt(sums[..., 1] * sums[..., 2])
    both_zero = sums[..., 1] + sums[..., 2] == 0
    return np.where(both_zero, 1.0, sums[..., 0] / np.where(norms == 0, 1.0, norms))


def _reduce_mean(sums: ErrorSums) -> ErrorSums:
    return sums[..., 0] / sums[..., 1]


SQNR = OutputMetric("sqnr", True, _SQNR_COLUMNS, _collect_sqnr, _reduce_sqnr)
METRICS = {
    "sqnr": SQNR,
    "cosine": OutputMetric("cosine", True, 3, _collect_cosine, _reduce_cosine),
    "kl": OutputMetric("kl", False, 2, _collect_kl, _reduce_mean),
    "top1": OutputMetric("top1", True, 2, _collect_top1, _reduce_mean),
}


def collect(metric: OutputMetric, batch: Any, reference: Any, outputs: Any) -> ErrorSums:
    """The result of `collect_on_device` as an array."""
    return collect_on_device(metric, batch, reference, outputs).cpu().numpy()


def collect_on_device(
    metric: OutputMetric, batch: Any, reference: Any, outputs: Any
) -> torch.Tensor:
    """The columns of SQNR, then those of another metric, for the outputs of one batch; on the device of the outputs.

    Args:
        metric: The metric.
        batch: The batch, for the number of samples and the labels.
        reference: Outputs of the float model.
        outputs: Outputs of the model in its current state.

    Raises:
        DataError: The metric needs a label for each sample, and the batch has none.
    """
    rows = count_rows(batch, reference)
    expected = floats_of(reference)
    actual = floats_of(outputs)
    pair = _Pair(
        reference=_as_rows(expected, rows),
        outputs=_as_rows(actual, rows),
        reference_scores=_scores(expected[0]),
        scores=_scores(actual[0]),
        labels=_labels_of(batch),
    )
    columns = _collect_sqnr(pair)
    if metric is not SQNR:
        for column in metric.collect(pair):
            columns.append(column.reshape(rows, -1).sum(1))
    return torch.stack(columns, 1)


def reduce_rows(metric: OutputMetric, rows: ErrorSums) -> tuple[float, float]:
    """Compute SQNR in dB and the metric over all samples."""
    sums = rows.sum(0)
    return float(SQNR.reduce(sums)), float(reduce_sums(metric, sums))


def reduce_sums(metric: OutputMetric, sums: ErrorSums) -> ErrorSums:
    """Compute the metric from sums of the columns of `collect`, `[..., columns]` -> `[...]`."""
    if metric is SQNR:
        return metric.reduce(sums[..., :_SQNR_COLUMNS])
    return metric.reduce(sums[..., _SQNR_COLUMNS:])


def count_rows(batch: Any, reference: Any) -> int:
    """Number of rows of `collect`: one per sample, or one if an output of the batch has no sample axis."""
    samples = count_samples(batch)
    for tensor in floats_of(reference):
        if tensor.dim() == 0 or tensor.shape[0] != samples:
            return 1
    return samples


def count_columns(metric: OutputMetric) -> int:
    """Number of columns of `collect`."""
    return _SQNR_COLUMNS if metric is SQNR else _SQNR_COLUMNS + metric.columns


def draw_sums(rows: ErrorSums) -> ErrorSums:
    """Sum over samples drawn with replacement, `[draws, K]`; the same draws for the same number of samples.

    Bootstrap: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    random = np.random.default_rng(0)
    counts = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_DRAWS)
    sums: ErrorSums = counts @ rows
    return sums


def _as_rows(tensors: list[torch.Tensor], rows: int) -> torch.Tensor:
    """All values of some tensors, float64 `[rows, D]`."""
    return torch.cat([tensor.detach().double().reshape(rows, -1) for tensor in tensors], 1)


def _scores(output: torch.Tensor) -> torch.Tensor:
    """Scores `[M, classes]` of an output.

    Classes are the last dimension, or the second one of `[B, C, H, W]`.
    """
    scores = output.detach().double()
    if scores.dim() == 0:
        return scores.reshape(1, 1)

    if scores.dim() > 3:
        scores = scores.movedim(1, -1)
    return scores.reshape(-1, scores.shape[-1])


def _labels_of(batch: Any) -> torch.Tensor | None:
    """The labels of a batch `(images, labels, ...)`: whole numbers in a tensor; None if there are none."""
    labels = find_labels(batch)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    return labels
