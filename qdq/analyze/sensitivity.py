"""Measures of outputs against those of the float model, one row per sample, so that samples can be resampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.batch import count_samples, find_labels
from qdq.errors import DataError
from qdq.metrics import combine_db
from qdq.outputs import ALL_OUTPUTS, OutputView, clear_padding, require_fitting

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
        columns: Number of its columns K for one output.
        collect: An output of two models -> columns, each `[N]` or with several values per sample.
        reduce: Sums of the columns `[..., K]` -> values `[...]`.
        combine: Values of all outputs `[..., outputs]` and their weights -> values `[...]`. None: the metric is one of
            class scores, and measured on the first output.
    """

    name: str
    higher_is_better: bool
    columns: int
    collect: Callable[[_Pair], list[torch.Tensor]]
    reduce: Callable[[ErrorSums], ErrorSums]
    combine: Callable[[ErrorSums, Sequence[float] | None], ErrorSums] | None = None

    def count_columns(self, outputs: int) -> int:
        """Number of its columns for several outputs."""
        return self.columns * (1 if self.combine is None else outputs)


@dataclass(frozen=True)
class _Pair:
    """One output of the float model and of another model on the same samples, float64; 0 at padding.

    Args:
        reference: The output of the float model, `[N, D]`.
        outputs: The output of the other model, `[N, D]`.
        reference_scores: The output of the float model, `[M, classes]`.
        scores: The output of the other model, `[M, classes]`.
        counts: 1 for scores that count, 0 for padding, `[M]`.
        labels: Labels of the batch, if it has any.
    """

    reference: torch.Tensor
    outputs: torch.Tensor
    reference_scores: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor
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
    return [divergence * pair.counts, pair.counts]


def _collect_top1(pair: _Pair) -> list[torch.Tensor]:
    if pair.labels is None or pair.labels.shape != pair.scores.shape[:1]:
        raise _lacks_labels()
    labels = pair.labels.to(pair.scores.device, non_blocking=True)
    hits = (pair.scores.argmax(1) == labels).double()
    return [hits * pair.counts, pair.counts]


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


def _combine_cosine(values: ErrorSums, weights: Sequence[float] | None) -> ErrorSums:
    """The lowest cosine, or the weighted mean."""
    if weights is None:
        lowest: ErrorSums = values.min(-1)
        return lowest
    return np.asarray(np.average(values, axis=-1, weights=weights))


SQNR = OutputMetric("sqnr", True, _SQNR_COLUMNS, _collect_sqnr, _reduce_sqnr, combine_db)
METRICS = {
    "sqnr": SQNR,
    "cosine": OutputMetric("cosine", True, 3, _collect_cosine, _reduce_cosine, _combine_cosine),
    "kl": OutputMetric("kl", False, 2, _collect_kl, _reduce_mean),
    "top1": OutputMetric("top1", True, 2, _collect_top1, _reduce_mean),
}


def collect(
    metric: OutputMetric, batch: Any, reference: Any, outputs: Any, view: OutputView = ALL_OUTPUTS
) -> ErrorSums:
    """The result of `collect_on_device` as an array."""
    return collect_on_device(metric, batch, reference, outputs, view).cpu().numpy()


def collect_on_device(
    metric: OutputMetric, batch: Any, reference: Any, outputs: Any, view: OutputView = ALL_OUTPUTS
) -> torch.Tensor:
    """The columns of SQNR, then those of another metric, for the outputs of one batch; on the device of the outputs.

    The columns of each output follow those of the output before it.

    Args:
        metric: The metric.
        batch: The batch, for the number of samples, the labels and the mask.
        reference: Outputs of the float model.
        outputs: Outputs of the model in its current state.
        view: Which outputs count, and where.

    Raises:
        DataError: The metric needs a label for each sample, and the batch has none; or the mask fits no output.
    """
    rows = count_rows(batch, reference, view)
    pairs = _pair_outputs(batch, reference, outputs, view, rows)
    columns = []
    for pair in pairs:
        columns += _collect_sqnr(pair)
    if metric is not SQNR:
        for pair in pairs if metric.combine is not None else pairs[:1]:
            for column in metric.collect(pair):
                columns.append(column.reshape(rows, -1).sum(1))
    return torch.stack(columns, 1)


def _pair_outputs(
    batch: Any, reference: Any, outputs: Any, view: OutputView, rows: int
) -> list[_Pair]:
    """Every output of two models on one batch; arguments as for `collect_on_device`."""
    expected = view.select_floats(reference)
    actual = view.select_floats(outputs)
    mask = view.find_mask(batch)
    if mask is not None:
        require_fitting(mask, expected)
    pairs = []
    for name, target in expected.items():
        first = clear_padding(target.detach().double(), mask)
        second = clear_padding(actual[name].detach().double(), mask)
        counts = clear_padding(torch.ones_like(second), mask)
        pairs.append(
            _Pair(
                reference=first.reshape(rows, -1),
                outputs=second.reshape(rows, -1),
                reference_scores=_scores(first),
                scores=_scores(second),
                counts=_scores(counts)[:, 0],
                labels=_labels_of(batch),
            )
        )
    return pairs


def reduce_rows(
    metric: OutputMetric, rows: ErrorSums, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Compute SQNR in dB and the metric over all samples: of the worst output, or weighted."""
    sums = rows.sum(0)
    sqnr = combine_db(list_decibels(metric, sums), weights)
    return float(sqnr), float(reduce_sums(metric, sums, weights))


def reduce_sums(
    metric: OutputMetric, sums: ErrorSums, weights: Sequence[float] | None = None
) -> ErrorSums:
    """Compute the metric from sums of the columns of `collect`, `[..., columns]` -> `[...]`."""
    outputs = count_outputs(metric, sums.shape[-1])
    if metric is SQNR:
        return combine_db(list_decibels(metric, sums), weights)
    columns = sums[..., _SQNR_COLUMNS * outputs :]
    if metric.combine is None:
        return metric.reduce(columns)
    values = metric.reduce(columns.reshape(*columns.shape[:-1], outputs, metric.columns))
    return metric.combine(values, weights)


def list_decibels(metric: OutputMetric, sums: ErrorSums) -> ErrorSums:
    """SQNR of each output in dB from sums of the columns, `[..., columns]` -> `[..., outputs]`."""
    return SQNR.reduce(split_sqnr(metric, sums))


def split_sqnr(metric: OutputMetric, sums: ErrorSums) -> ErrorSums:
    """Energies of signal and noise of each output, `[..., columns]` -> `[..., outputs, 2]`."""
    outputs = count_outputs(metric, sums.shape[-1])
    columns = sums[..., : _SQNR_COLUMNS * outputs]
    return columns.reshape(*columns.shape[:-1], outputs, _SQNR_COLUMNS)


def share_noise(
    metric: OutputMetric, rows: ErrorSums, weights: Sequence[float] | None = None
) -> list[float]:
    """What the energy of the noise of each output is multiplied with before energies are added; 1 for one output.

    A factor is the signal of the first output over that of the output, so that what is added is relative noise.

    Args:
        metric: The metric.
        rows: Error sums of any state.
        weights: Weight of each output; None: all count the same.
    """
    signal = split_sqnr(metric, rows.sum(0))[:, 0]
    if len(signal) == 1:
        return [1.0]
    unit = signal[signal > 0][:1].sum()  # of the first output that is not always 0
    factors = np.where(signal > 0, unit / np.where(signal > 0, signal, 1.0), 0.0)
    if weights is not None:
        factors = factors * np.asarray(weights) / sum(weights)
    return [float(factor) for factor in factors]


def count_rows(batch: Any, reference: Any, view: OutputView = ALL_OUTPUTS) -> int:
    """Number of rows of `collect`: one per sample, or one if an output of the batch has no sample axis."""
    samples = count_samples(batch)
    for tensor in view.select_floats(reference).values():
        if tensor.dim() == 0 or tensor.shape[0] != samples:
            return 1
    return samples


def count_columns(metric: OutputMetric, outputs: int = 1) -> int:
    """Number of columns of `collect`."""
    sqnr_columns = _SQNR_COLUMNS * outputs
    return sqnr_columns if metric is SQNR else sqnr_columns + metric.count_columns(outputs)


def count_outputs(metric: OutputMetric, columns: int) -> int:
    """Number of outputs that give so many columns."""
    if metric is SQNR:
        return columns // _SQNR_COLUMNS
    if metric.combine is None:
        return (columns - metric.columns) // _SQNR_COLUMNS
    return columns // (_SQNR_COLUMNS + metric.columns)


def draw_sums(rows: ErrorSums) -> ErrorSums:
    """Sum over samples drawn with replacement, `[draws, K]`; the same draws for the same number of samples.

    Bootstrap: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    random = np.random.default_rng(0)
    counts = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_DRAWS)
    sums: ErrorSums = counts @ rows
    return sums


def _scores(output: torch.Tensor) -> torch.Tensor:
    """Scores `[M, classes]` of a float64 output.

    Classes are the last dimension, or the second one of `[B, C, H, W]`.
    """
    scores = output
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
