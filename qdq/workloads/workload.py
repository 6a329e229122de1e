"""What a recipe needs to know of a task, whatever the task is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qdq.batch import take_samples
from qdq.errors import ArgumentError, DataError, QdqError
from qdq.outputs import Mask, Selection
from qdq.predictor import Predict, make_predictor
from qdq.workloads.user_errors import describe_user_error

Score = Callable[[Predict], float | Mapping[str, float]]
"""A metric of a task: gets a function inputs -> outputs, returns one number or several by name."""

CALIBRATION_BATCHES = 8
"""Default number of batches to calibrate on."""

EVALUATION_SAMPLES = 500
"""Default number of samples to evaluate on."""

_EXAMPLE_SAMPLES = 2
_MOST_HELD_OUT = 32  # of the calibration samples, to judge quantization on
_MOST_HELD_OUT_OF_TRAINING = 128  # likewise, to judge the steps of fine-tuning on, too
_HELD_OUT_PART = 4  # one of so many training samples is held out at most


class Samples(Protocol):
    """Batches with what the report says of them: `SampleBatches`, or the images of a classifier."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...

    def subset(self, n: int, /) -> Samples:
        """The first `n` samples."""

    def hold_out(self, n: int, /) -> tuple[Samples, Samples]:
        """Samples to fit on, and about `n` others to judge on; no photograph or other source is in both."""

    def by_source(self) -> Samples:
        """The same samples; crops of one photograph follow each other, for passes that hold out the last ones."""

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches."""

    @property
    def num_sources(self) -> int:
        """Number of different photographs if the samples are crops, else of samples."""

    @property
    def labels(self) -> list[int] | None:
        """Class index of each sample; None if there are none."""

    @property
    def description(self) -> str:
        """Source, number and seed."""

    @property
    def label_note(self) -> str:
        """Source of the labels, or why there are none."""


class TrainingSamples(Protocol):
    """Batches to fine-tune on; a pass may give other ones than the last."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...

    def without_first(self, n: int, /) -> TrainingSamples:
        """All samples but the first `n`; of crops, those of all photographs but the first `n`."""

    @property
    def num_samples(self) -> int:
        """Number of different samples; photographs if the samples are crops."""

    @property
    def labels(self) -> list[int] | None:
        """Class index of each sample; None if there are none."""


@dataclass(frozen=True)
class WorkloadOptions:
    """Which model, data and metric, and how much data; the same for every task.

    Args:
        model: Name of the model; its form decides the task (`load_workload`).
        weights: "DEFAULT", another name of trained weights, "random", or the path of a checkpoint.
        data: A folder, a file, or FILE.py:FUNCTION; None for the data that the task brings itself.
        metric: FILE.py:FUNCTION; None for the metric of the task.
        calib_batches: Number of batches to calibrate on.
        eval_samples: Number of samples to evaluate on.
        batch_size: Samples per batch.
        image_size: Side of the images that the model gets, in pixels; None for that of the model.
        seed: Seed of random weights and of the choice of samples.
        outputs: The parts of the outputs that count; None for those that the task names, or all.
        mask: The input that is 0 at padding; None for the one that the task names, or none.
        output_weights: Weight of each output where one figure decides; None: the worst output decides.

    Raises:
        ArgumentError: `image_size` is below 1.
    """

    model: str
    weights: str = "DEFAULT"
    data: str | Path | None = None
    metric: str | None = None
    calib_batches: int = CALIBRATION_BATCHES
    eval_samples: int = EVALUATION_SAMPLES
    batch_size: int = 16
    image_size: int | None = None
    seed: int = 0
    outputs: Selection | None = None
    mask: str | None = None
    output_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ArgumentError(
                f"image_size is {self.image_size} pixels; it must be 1 or more.",
                "pass --image-size PIXELS, or leave it out.",
            )


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its data and its metric.

    Args:
        name: The model, as on the command line.
        weights: Where its weights come from, in words.
        module: The network that is quantized and exported, in evaluation mode. A detector is without NMS.
        calibration: Samples to calibrate on, and to choose on.
        evaluation: Other samples, to evaluate on.
        load_training: Returns batches to fine-tune on. No sample is in `evaluation`; `without_first(n)` leaves out the
            first `n` sources of `calibration`: its samples, or the photographs that these are crops of.
        score: The metric of the task; None if accuracy by labels, or nothing, is measured.
        outputs: The parts of the outputs that count, as for `qdq.predict`; None for all.
        mask: What leaves padding out, as for `qdq.predict`.
        output_weights: Weight of each output where one figure decides; None: the worst output decides.
    """

    name: str
    weights: str
    module: nn.Module
    calibration: Samples
    evaluation: Samples
    load_training: Callable[[], TrainingSamples] = field(repr=False)
    score: Score | None = None
    outputs: Selection | None = None
    mask: Mask | None = None
    output_weights: Mapping[str, float] | None = None

    @property
    def example(self) -> Any:
        """A small batch for stages that only trace the model."""
        return take_samples(next(iter(self.calibration)), _EXAMPLE_SAMPLES)

    @property
    def num_held_out(self) -> int:
        """How many calibration samples judge quantization: at most 32, and at most half."""
        return min(_MOST_HELD_OUT, max(self.calibration.num_samples // 2, 1))

    def hold_out(self) -> tuple[Samples, Samples]:
        """Calibration samples to fit on, and others to judge on; a single sample is both."""
        return self._hold_out(self.num_held_out)

    def split_training(self) -> tuple[TrainingSamples, Samples, Samples]:
        """Batches to fine-tune on, calibration samples to fit passes on, and others to judge both on.

        No photograph or other source of those that judge is among the others. They are up to 128, but at most half of
        the calibration samples and a quarter of the training samples, and not fewer than `hold_out` holds out: the SQNR
        of 32 samples can vary by more than the weights of two steps differ in. Crops are held out by photograph, as
        `hold_out` does.
        """
        training = self.load_training()
        half = self.calibration.num_samples // 2
        part = training.num_samples // _HELD_OUT_PART
        most = min(_MOST_HELD_OUT_OF_TRAINING, half, part)
        fitted, held_out = self._hold_out(max(most, self.num_held_out))
        return training.without_first(held_out.num_sources), fitted, held_out

    def _hold_out(self, n: int) -> tuple[Samples, Samples]:
        if self.calibration.num_samples == 1:
            return self.calibration, self.calibration
        return self.calibration.hold_out(n)

    @property
    def view(self) -> dict[str, Any]:
        """The arguments `outputs` and `mask` of `qdq.predict`, `measure_tie_floor` and `analyze_layers`."""
        return {"outputs": self.outputs, "mask": self.mask}

    def measure(self, model: nn.Module | Path | str) -> dict[str, float]:
        """The metrics of the task by name; empty without one.

        Args:
            model: The module, or the path of an ONNX file made from it.

        Raises:
            DataError: The metric fails, or does not return numbers.
        """
        if self.score is None:
            return {}
        try:
            result = self.score(make_predictor(model))
        except QdqError:
            raise
        except Exception as error:  # code of the user
            name = _name_score(self.score)
            raise DataError(
                f"the metric {name} fails: {describe_user_error(error)}.",
                "call it in python to see the whole error, or pass -v.",
            ) from error
        scores = dict(result) if isinstance(result, Mapping) else {_name_score(self.score): result}
        return {str(name): _require_number(name, value) for name, value in scores.items()}


def _name_score(score: Score) -> str:
    """The name of a metric that returns one number: that of its function."""
    return getattr(score, "__name__", "score").strip("_")


def _require_number(name: object, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"the metric {name} is of type {type(value).__name__}; expected a number.",
            "return a float, or a dictionary of floats by name.",
        ) from None
    if number != number:
        raise DataError(
            f"the metric {name} is not a number (NaN).", "check it on the float model alone."
        )
    return number
