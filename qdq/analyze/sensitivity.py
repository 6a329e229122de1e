"""Measures of outputs against the float model's, kept apart for each sample, so that they can be drawn anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.errors import DataError
from qdq.forward import floats_of
from qdq.samples import count_samples

ErrorSums = npt.NDArray[np.float64]
"""One row a sample, or one for a batch whose outputs do not tell its samples apart; the columns can be summed."""
_DRAWS = 1000


@dataclass(frozen=True)
class OutputMetric:
    """A measure that is a function of sums over samples.

    Args:
        name: "sqnr", "cosine", "kl" or "top1".
        higher_is_better: Its direction.
        perfect: Its value where the outputs are those of the float model; None: it has to be measured.
        collect: Reference `[N, D]`, outputs `[N, D]`, scores `[N, C]` of both and labels `[N]` -> columns.
        reduce: Sums of the columns `[..., K]` -> values `[...]`.
    """

    name: str
    higher_is_better: bool
    perfect: float | None
    collect: Callable[[_Pair], list[torch.Tensor]]
    reduce: Callable[[ErrorSums], ErrorSums]


@dataclass(frozen=True)
class _Pair:
    """Outputs of the float model and of another on the same samples, float64."""

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
    expected, found = pair.reference_scores.log_softmax(1), pair.scores.log_softmax(1)
    divergence = (expected.exp() * (expected - found)).sum(1)
    return [divergence, torch.ones_like(divergence)]


def _collect_top1(pair: _Pair) -> list[torch.Tensor]:
    if pair.labels is None or pair.labels.shape != pair.scores.shape[:1]:
        raise _lacks_labels()
    hits = (pair.scores.argmax(1) == pair.labels.to(pair.scores.device)).double()
    return [hits, torch.ones_like(hits)]


def _lacks_labels() -> DataError:
    return DataError(
        "the metric 'top1' needs a label for each sample.",
        "give batches of (images, labels), or use 'kl', which needs none.",
    )


def require_labels(metric: OutputMetric, batch: Any) -> None:
    """Refuse a batch without labels if the metric needs them, before the work.

    Raises:
        DataError: It has none.
    """
    if metric is METRICS["top1"] and _labels_of(batch) is None:
        raise _lacks_labels()


def _reduce_sqnr(sums: ErrorSums) -> ErrorSums:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 10 * np.log10(sums[..., 0] / sums[..., 1])
    return np.where(sums[..., 1] == 0, np.inf, value)


def _reduce_cosine(sums: ErrorSums) -> ErrorSums:
    norms = np.sqrt(sums[..., 1] * sums[..., 2])
    both_zero = sums[..., 1] + sums[..., 2] == 0
    return np.where(both_zero, 1.0, sums[..., 0] / np.where(norms == 0, 1.0, norms))


def _reduce_mean(sums: ErrorSums) -> ErrorSums:
    return sums[..., 0] / sums[..., 1]


SQNR = OutputMetric("sqnr", True, math.inf, _collect_sqnr, _reduce_sqnr)
METRICS = {
    "sqnr": SQNR,
    "cosine": OutputMetric("cosine", True, 1.0, _collect_cosine, _reduce_cosine),
    "kl": OutputMetric("kl", False, 0.0, _collect_kl, _reduce_mean),
    "top1": OutputMetric("top1", True, None, _collect_top1, _reduce_mean),
}


def collect(metric: OutputMetric, batch: Any, reference: Any, outputs: Any) -> ErrorSums:
    """The columns of SQNR, then those of a metric, for the outputs of one batch.

    Args:
        metric: The metric.
        batch: The batch, for the number of samples and the labels.
        reference: Outputs of the float model.
        outputs: Outputs of the model as it is.
    """
    rows = find_rows(batch, reference)
    expected, found = floats_of(reference), floats_of(outputs)
    pair = _Pair(
        _as_rows(expected, rows),
        _as_rows(found, rows),
        _scores(expected[0]),
        _scores(found[0]),
        _labels_of(batch),
    )
    columns = _collect_sqnr(pair)
    if metric is not SQNR:
        own = metric.collect(pair)
        columns += [column.reshape(rows, -1).sum(1) for column in own]
    return torch.stack(columns, 1).cpu().numpy()


def reduce_rows(metric: OutputMetric, rows: ErrorSums) -> tuple[float, float]:
    """SQNR in dB and the metric, over all samples."""
    sums = rows.sum(0)
    own = SQNR.reduce(sums) if metric is SQNR else metric.reduce(sums[2:])
    return float(SQNR.reduce(sums)), float(own)


def find_rows(batch: Any, reference: Any) -> int:
    """Rows that `collect` gives: one a sample, or one where the outputs do not tell the samples apart."""
    rows = count_samples(batch)
    return (
        rows
        if all(tensor.dim() and tensor.shape[0] == rows for tensor in floats_of(reference))
        else 1
    )


def count_columns(metric: OutputMetric) -> int:
    """How many columns `collect` gives."""
    own = {"sqnr": 0, "cosine": 3, "kl": 2, "top1": 2}
    return 2 + own[metric.name]


def draw_sums(rows: ErrorSums) -> ErrorSums:
    """Sums over samples drawn with replacement, `[draws, K]`; the same draws for the same number of samples.

    Bootstrap: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    random = np.random.default_rng(0)
    counts = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_DRAWS)
    sums: ErrorSums = counts @ rows
    return sums


def _as_rows(tensors: list[torch.Tensor], rows: int) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(rows, -1) for tensor in tensors], 1)


def _scores(output: torch.Tensor) -> torch.Tensor:
    """Scores `[N, classes]` of the first output; classes are its last dimension, of `[B, C, H, W]` the second."""
    scores = output.detach().double()
    if scores.dim() > 3:
        scores = scores.movedim(1, -1)
    return scores.reshape(-1, scores.shape[-1]) if scores.dim() else scores.reshape(1, 1)


def _labels_of(batch: Any) -> torch.Tensor | None:
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None
