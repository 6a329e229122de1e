"""A table of the accuracy of models on the same samples, and what rounding ties alone leave between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qdq.batch import require_batches
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.forward import require_model
from qdq.graph.tensors import list_data_files
from qdq.metrics import (
    Outputs,
    agreement,
    count_rows,
    decide_db,
    has_classes,
    list_batches,
    name_arrays,
    pair_arrays,
    sqnr_db,
    top_k,
)
from qdq.outputs import Mask, Selection
from qdq.predictor import predict
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.text import printable

# Of the input of a quantizer, to look for ties: how much another order of summation in float32 changes it, and how much
# rounding to the 16 bit type does.
_NUDGES = {"fp32": 2**-22, "fp16": 2**-12, "bf16": 2**-9}
_SAME = 2**-20  # of the largest value: what float rounding alone may leave between samples


@dataclass(frozen=True)
class OutputFigures:
    """One of several outputs of a candidate.

    Args:
        name: Name of the output.
        top1: As for `Candidate`; None for an output without labels.
        top5: Likewise.
        agreement: As for `Candidate`; None for an output without labels, because its largest element need not be an
            answer.
        sqnr_db: As for `Candidate`.
    """

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Args:
        name: Name of the model.
        top1: Fraction of images whose label is the largest output, 0 to 1; None without labels.
        top5: Fraction of images whose label is among the five largest, 0 to 1; None without labels.
        agreement: Fraction of images with the same largest output as the reference, 0 to 1; None if the output is not
            `[N, classes]`, or if there are several.
        sqnr_db: SQNR of the outputs against the reference, in dB; infinite for the reference itself. Of several
            outputs, that of the worst.
        megabytes: Size of its file, or of its parameters; None if it was not requested.
        outputs: Figures of each output if there are several.
        scores: Name of a metric of the task -> its value; empty without one.
    """

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float
    megabytes: float | None
    outputs: tuple[OutputFigures, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_outputs`.

    Args:
        images: Number of samples.
        candidates: The rows, the reference first.
        constant_outputs: Outputs of the reference that are the same for all samples: their SQNR says nothing.
    """

    images: int
    candidates: tuple[Candidate, ...]
    constant_outputs: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of the task."""
        return list(self.candidates[0].scores)

    def format_table(self) -> str:
        """The table as text; metrics of the task are its last columns."""
        title = f"on {self.images} samples"
        labels = [candidate.name for candidate in self.candidates]
        for candidate in self.candidates:
            labels += [f"  {figures.name}" for figures in candidate.outputs]
        width = max(len(title), *map(len, labels))
        header = f"{title:{width}}   top-1   top-5  agreement  SQNR dB       MB"
        lines = ["  ".join([header, *map(_format_metric, self.metrics)])]
        for candidate in self.candidates:
            row = _format_row(candidate.name, width, candidate, candidate.megabytes)
            scores = map(_format_score, candidate.scores, candidate.scores.values())
            lines.append("  ".join([row, *scores]))
            for figures in candidate.outputs:
                lines.append(_format_row(f"  {figures.name}", width, figures, None))
        for name in self.constant_outputs:
            lines.append(
                f"{printable(name)} is the same for all {self.images} samples: its figures say nothing"
            )
        return "\n".join(lines)


_SCORE_WIDTH = 7


def _format_metric(name: str) -> str:
    """The title of the column of a metric."""
    return f"{name:>{_SCORE_WIDTH}}"


def _format_score(name: str, score: float) -> str:
    """A value of a metric, as wide as its title."""
    width = max(_SCORE_WIDTH, len(name))
    return f"{score:{width}.4f}"


def _format_row(
    label: str, width: int, figures: Candidate | OutputFigures, megabytes: float | None
) -> str:
    """A row of the table, whose first column has `width` characters."""
    cells = [
        f"{label:{width}}",
        _format_percent(figures.top1),
        _format_percent(figures.top5),
        f"   {_format_percent(figures.agreement)}",
        _format_number(figures.sqnr_db),
        _format_number(megabytes),
    ]
    return "  ".join(cells)


def measure_tie_floor(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    expected: Outputs | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
    precision: str = "fp32",
) -> float | dict[str, float]:
    """SQNR in dB that rounding ties alone leave between two correct runs of a quantized model.

    The model is run twice more, without TF32. The input of every quantizer is larger by 2^-22 of itself in one run and
    smaller in the other, about as much as another order of summation in float32 changes it. Small inputs of FP8
    quantizers change by 2^-22 of the root mean square of the tensor. A float model hardly changes. A quantized one
    does, because values next to a tie round to the other code, and later layers propagate the difference. The lower
    SQNR of the two runs counts. That of another runtime may be a little above or below this figure, but not far below.

    Args:
        model: A calibrated model.
        batches: As for `predict`, and all that the file is compared on: other samples have other ties.
        expected: What `predict` returned for the model on these batches, with which the file is compared. It saves a
            run, and other samples are refused.
        outputs: As for `predict`.
        mask: As for `predict`.
        precision: Type of the float part of the file: "fp32", "fp16" or "bf16". In 16 bit the inputs are changed by
            half of a rounding, 2^-12 or 2^-9.

    Returns:
        The SQNR, for several outputs that of each by name; infinite if no value was next to a tie.

    Raises:
        ArgumentError: `expected` is of other samples or outputs; an unknown precision.
        DataError: No batch.
    """
    require_model(model)
    require_batches(batches)
    if precision not in _NUDGES:
        raise ArgumentError(
            f"precision is {precision!r}; known are {', '.join(_NUDGES)}.", "pass that of the file."
        )
    batches = list(batches)
    run = partial(predict, model, batches, outputs=outputs, mask=mask)
    if expected is None:
        expected = run()
    floors: dict[str, float] = {}
    for direction in (1, -1):
        with _nudging(model, direction * _NUDGES[precision]):
            nudged = run()
        for name, pair in pair_arrays(expected, nudged).items():
            floors[name] = min(floors.get(name, math.inf), sqnr_db(*pair))
    if isinstance(expected, Mapping):
        return floors
    (floor,) = floors.values()
    return floor


@contextmanager
def _nudging(model: nn.Module, fraction: float) -> Iterator[None]:
    """Enlarge the input of every activation quantizer by a fraction of itself in the block.

    The steps of FP8 are relative, also near 0, but a sum of products is rounded relative to its terms. So in float32 a
    small input of an FP8 quantizer is enlarged by that fraction of the root mean square of the tensor.
    """

    def nudge(quantizer: TensorQuantizer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0]
        if not quantizer.format.is_float or abs(fraction) != _NUDGES["fp32"]:
            return (values * (1 + fraction), *inputs[1:])
        sizes = values.abs().clamp_min(values.square().mean().sqrt())
        return (values + fraction * values.sign() * sizes, *inputs[1:])

    with ExitStack() as hooks:
        for name, quantizer in named_quantizers(model):
            if not name.endswith("_weight_quantizer"):
                hooks.callback(quantizer.register_forward_pre_hook(nudge).remove)
        yield


def evaluate_outputs(
    outputs: Mapping[str, Outputs],
    labels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    files: Mapping[str, Path | str | nn.Module] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    num_samples: int | None = None,
) -> Evaluation:
    """Compare outputs of the same samples; the first entry is the reference.

    Args:
        outputs: Name -> logits `[N, classes]`, or whatever `predict` returned. Of several outputs, each gets a line.
        labels: Class of each image `[N]`, None if unknown. For several outputs, name -> the classes of those that are
            scores.
        files: Name -> file, or module whose parameters are counted, for the sizes.
        scores: Name -> metrics of the task by name, such as `{"mAP": 0.41}`; the same metrics for every name.
        num_samples: Number of samples, if it is not the first size of the outputs.

    Raises:
        ArgumentError: Nothing to compare, different shapes, outputs or metrics, or labels that do not belong to an
            output.
        ArgumentTypeError: Outputs without names, or labels that are not a sequence.
    """
    if not isinstance(outputs, Mapping):
        raise ArgumentTypeError(
            f"outputs is of type {type(outputs).__name__}; expected names with arrays.",
            "pass {'float': outputs}.",
        )
    if not outputs:
        raise ArgumentError("there are no outputs to evaluate.", "pass at least the reference.")
    reference = next(iter(outputs.values()))
    classes = _name_labels(labels, reference)
    metrics = _require_same_metrics(outputs, scores or {})
    candidates = []
    for name, predicted in outputs.items():
        figures = _compare_outputs(reference, predicted, classes)
        is_single = not isinstance(reference, Mapping)
        candidates.append(
            Candidate(
                name=name,
                top1=figures[0].top1 if is_single else None,
                top5=figures[0].top5 if is_single else None,
                agreement=figures[0].agreement if is_single else None,
                sqnr_db=decide_db({entry.name: entry.sqnr_db for entry in figures}),
                megabytes=_measure_size((files or {}).get(name)),
                outputs=() if is_single else figures,
                scores=metrics[name],
            )
        )
    if num_samples is None:
        num_samples = min(map(count_rows, name_arrays(reference).values()))  # padding adds rows
    return Evaluation(num_samples, tuple(candidates), _list_constant(reference))


def _list_constant(reference: Outputs) -> tuple[str, ...]:
    """Names of the floating-point outputs that do not depend on the sample; none if there is one sample."""
    constant = []
    for name, (batches, _) in pair_arrays(reference, reference).items():
        samples = [sample for batch in list_batches(batches) for sample in batch]
        if len(samples) > 1 and all(_is_same(samples[0], sample) for sample in samples[1:]):
            constant.append(name)
    return tuple(constant)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two samples of an output differ by float rounding at most; not if they are empty."""
    if np.shape(first) != np.shape(second) or not np.size(first):
        return False
    difference = np.abs(np.subtract(first, second, dtype=np.float64)).max()
    return bool(difference <= _SAME * np.abs(first).max())


def _require_same_metrics(
    names: Iterable[str], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """The metrics of the task of every candidate; none at all if there are no scores.

    Raises:
        ArgumentError: A candidate without scores, or with other metrics.
    """
    if not any(scores.values()):
        return {name: {} for name in names}
    metrics: dict[str, dict[str, float]] = {}
    expected = list(next(iter(scores.values())))
    for name in names:
        if list(scores.get(name, {})) != expected:
            raise ArgumentError(
                f"{name} has the metrics {list(scores.get(name, {}))}, and the first one {expected}.",
                "measure the same metrics of every model.",
            )
        metrics[name] = dict(scores[name])
    return metrics


def _name_labels(labels: Any, reference: Outputs) -> dict[str, Sequence[int] | None]:
    """The labels of each output that has class scores, None if they are unknown.

    Raises:
        ArgumentError: Labels without the name of one of several outputs, or of one that does not exist.
        ArgumentTypeError: Labels that are not a sequence.
    """
    arrays = name_arrays(reference)
    if not isinstance(labels, Mapping):
        if not isinstance(reference, Mapping):
            return dict.fromkeys(arrays, _require_sequence(labels))
        if labels is None:
            return {}
    named: dict[str, Any] = dict(labels) if isinstance(labels, Mapping) else {"": labels}
    unknown = [name for name in named if name not in arrays]
    if unknown:
        raise ArgumentError(
            f"labels are of {unknown[0] or 'no output'!r}, and the outputs are {list(arrays)}.",
            "pass {NAME: labels} with one of these names.",
        )
    return {name: _require_sequence(classes) for name, classes in named.items()}


def _require_sequence(labels: Any) -> Any:
    if labels is not None and (isinstance(labels, str) or not hasattr(labels, "__len__")):
        raise ArgumentTypeError(
            f"labels is of type {type(labels).__name__}.", "pass a class for each image, or None."
        )
    return labels


def _compare_outputs(
    reference: Outputs, outputs: Outputs, labels: Mapping[str, Sequence[int] | None]
) -> tuple[OutputFigures, ...]:
    """Figures of every output of one candidate; arguments as for `evaluate_outputs`."""
    figures = []
    for name, (expected, actual) in pair_arrays(reference, outputs).items():
        top1, top5 = _measure_accuracy(name, actual, labels.get(name))
        has_answers = name in labels and has_classes(expected)
        answers = agreement(expected, actual) if has_answers else None
        figures.append(OutputFigures(name, top1, top5, answers, sqnr_db(expected, actual)))
    return tuple(figures)


def _measure_accuracy(
    name: str, logits: Any, labels: Sequence[int] | None
) -> tuple[float | None, float | None]:
    """Top-1 and top-5 accuracy; None without labels.

    Raises:
        ArgumentError: Labels of an output that has no class scores, or of other samples.
    """
    if labels is None:
        return None, None
    classes = np.asarray(labels)
    shapes = [np.shape(batch) for batch in list_batches(logits)]
    if len(shapes) > 1 or not has_classes(logits) or classes.shape != shapes[0][:1]:
        described = ", ".join(map(str, shapes[:3]))
        raise ArgumentError(
            f"labels {classes.shape} of the output {name}, which is {described}; expected [N] and [N, classes].",
            "give the class of each row; a mask turns [N, T, classes] into such rows.",
        )
    return top_k(logits, classes, 1), top_k(logits, classes, 5)


def _measure_size(source: Path | str | nn.Module | None) -> float | None:
    """Megabytes of a file with its external data, or of the parameters of a module."""
    if source is None:
        return None
    if isinstance(source, str | Path):
        path = Path(source)
        files = [path, *list_data_files(path)]
        return sum(file.stat().st_size for file in files) / 1e6
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in source.parameters())
    return num_bytes / 1e6


def _format_percent(fraction: float | None) -> str:
    if fraction is None:
        return "     -"
    return f"{100 * fraction:5.1f}%"


def _format_number(value: float | None) -> str:
    if value is None or np.isinf(value):
        return "      -"
    return f"{value:7.2f}"
