"""Fine-tuning (QAT): recovers the accuracy that quantization lost, with or without labels; export stays the same.

The forward pass is fake-quantized, and the gradient passes straight through (see `qdq.quantize`). By default the
calibrated ranges stay fixed and the float model teaches the quantized one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qdq.batch import count_samples, require_batches, tensors_of
from qdq.calibrate.collect import digest_tensors
from qdq.corrections import Snapshot, copy_ranges, forget_passes
from qdq.device import find_device, without_tf32
from qdq.distributed import failing_together, find_rank, gather_bytes, joining_processes
from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.files import to_jsonable, write_json
from qdq.forward import require_data, require_model
from qdq.metrics import Outputs, decide_db, pair_arrays, sqnr_db
from qdq.outputs import ALL_OUTPUTS, OutputView
from qdq.patterns import Pattern
from qdq.predictor import predict
from qdq.qat.checkpoint import keeping_random_state, load_tuned, save_tuned
from qdq.qat.epochs import digest_first_batch, find_generators, iterate_epochs, read_held_out
from qdq.qat.losses import Distillation, Loss, Objective, cross_entropy, run_with_loss
from qdq.qat.ranges import require_ranges
from qdq.qat.record import Measurement, Record
from qdq.qat.trainer import MakeOptimizer, Trainer, copy_float, digest_weights
from qdq.qat.watch import BadRange, Oscillation, find_bad_ranges
from qdq.quantizer import named_quantizers
from qdq.run import require_seed
from qdq.schedule import Schedule

__all__ = [
    "Distillation",
    "Schedule",
    "Tuning",
    "cross_entropy",
    "finetune",
    "load_tuned",
    "save_tuned",
]

logger = logging.getLogger(__name__)

SUMMARY_FILE = "tuning.json"
_PERSISTENT = (
    "persistent_workers carry their random numbers from epoch to epoch, and these cannot be saved: if the data "
    "is drawn at random, a resumed run sees other data; leave persistent_workers out to get the same losses"
)
_FLOAT_ROUNDING_DB = 90.0  # an output that is not quantized has about this SQNR, or more
_MEASUREMENTS = 10  # of the metric in a run, unless measure_every says otherwise


@dataclass(frozen=True)
class Tuning:
    """Result of `finetune`.

    Args:
        losses: Loss of each step.
        curve: The metric before, during and after training; empty without a metric.
        best_step: The step whose weights the model has now.
        stopped: Why training ended before the last step, "" if it did not.
        oscillating: Layers whose weights went back and forth between two codes, see `OscillationWatch`.
        bad_ranges: Ranges that do not fit the values that they quantize.
        seconds: Time of all steps, without measurements.
    """

    losses: tuple[float, ...]
    curve: tuple[Measurement, ...]
    best_step: int
    stopped: str
    oscillating: tuple[Oscillation, ...]
    bad_ranges: tuple[BadRange, ...]
    seconds: float

    def format_table(self) -> str:
        """The curve, then oscillating weights and ranges that do not fit."""
        num_steps = len(self.losses)
        seconds = self.seconds / max(num_steps, 1)
        title = f"{num_steps} steps, {seconds:.2f} s per step; the model is that of step {self.best_step}"
        if self.stopped:
            title += f"; {self.stopped}"
        lines = [title, "   step   metric     loss        lr"]
        for point in self.curve:
            loss = "       -" if point.loss is None else f"{point.loss:8.5f}"
            lines.append(f"  {point.step:5d}  {point.metric:7.2f}  {loss}  {point.lr:8.1e}")
        for layer in self.oscillating:
            lines.append(
                f"  {layer.layer}: {layer.share:.1%} of its weights oscillate between two codes"
            )
        for bad_range in self.bad_ranges:
            lines.append(f"  {bad_range.quantizer}: {bad_range.reason}")
        return "\n".join(lines)


def finetune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    distillation: Distillation | None = Distillation(),  # noqa: B008  # frozen
    teacher: nn.Module | None = None,
    schedule: Schedule = Schedule(),  # noqa: B008  # frozen
    ranges: str = "frozen",
    train: str = "all",
    layers: Iterable[Pattern] | None = None,
    held: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    measure_every: int | None = None,
    folder: Path | str | None = None,
    tensorboard: bool = False,
    amp: bool = False,
    seed: int = 0,
    optimizer: MakeOptimizer | None = None,
) -> Tuning:
    """Train a calibrated model with its quantizers on, in place.

    The model stays in evaluation mode (no dropout), except that BatchNorm is live at first. Under `torchrun` every
    process passes the same model and batches and takes its part of the samples of each batch. The gradients are the
    mean over all samples, so the result is that of one process. Only the first process reads and writes files, and its
    metric counts. The call joins the process group, unless torch.distributed has one already.

    With `folder`, a killed run resumes when it is called again in the same way, and gives the same losses. A run that
    ends with an error or Ctrl-C loses no step.

    Args:
        model: A calibrated model, on its device. At the end it has the weights with the best metric, or the last ones.
            What the accuracy passes fitted is then part of the model and is not fitted again. If no step was better
            than the start, or none was taken, the model is that of before the call, with its passes.
        batches: The inputs of the model (see `forward.call_model`), a list or a DataLoader: every epoch iterates over
            it. The seed and the number of the epoch seed the random numbers that it shuffles with, and the `generator`
            of a DataLoader and of its samplers. If a sampler has `set_epoch(epoch)`, it is called.
        loss: `(outputs, batch) -> scalar`, the mean over the samples: `cross_entropy`, or the loss of a detector.
            "own": the loss that the model itself returns in training mode, see `losses.run_with_loss`. None:
            distillation alone, which needs no labels.
        distillation: The distance to the teacher; None leaves it out.
        teacher: The float model; None: the model at this call, with its quantizers off.
        schedule: Length and learning rates.
        ranges: "frozen", "lsq", "pact", "ema" or "none", see `RangeTuning`.
        train: "all", "ranges" (learned ranges only) or "batchnorm" (only the statistics of live BatchNorm, no range).
            Parameters with `requires_grad=False` do not change.
        layers: Patterns (see `qdq.patterns`) of modules. Only these are trained, with their ranges and the statistics
            of their BatchNorm. None: everything.
        held: Held-out batches, which are not trained on. They are read once, with the random numbers of `seed`. The
            metric follows the training goal: with `loss` it is minus that loss, so the batches need the same labels;
            otherwise it is the SQNR of the outputs against the teacher's, in dB; of several, that of the worst, or of
            all with the weights of `distillation`. Without weights, a state in which an output is worse than before
            training is never the best.
        metric: `model -> number`, higher is better; replaces the metric on `held`.
        measure_every: Steps between two measurements; None: a tenth of all steps.
        folder: For the state of the run, the best and the last model and a summary. A finished run is read back. For
            `loss`, `metric` and patterns that are functions, only the names are compared with those of an earlier run.
        tensorboard: Write loss, metric, learning rate and ranges as scalars into `folder`/tensorboard.
        amp: Compute in bfloat16 where torch.autocast does so; weights and quantizers stay in float32.
        seed: Seed of the order of the data.
        optimizer: Makes the optimizer of groups of parameters with learning rates, which follow the schedule:
            `functools.partial(torch.optim.SGD, momentum=0.9)`. None: Adam.

    Returns:
        Losses, the curve of the metric, and warnings about weights and ranges.

    Raises:
        ArgumentError: Options that contradict each other, have no effect or are out of range; a loss that depends on
            nothing that is trained; weights in float16; a folder that cannot be written to, or that holds a run of
            another model or with other settings.
        ArgumentTypeError: One tensor or dictionary instead of batches; a number of another type.
        DataError: No batch to train or to measure on; an iterator that ran out; a batch that cannot be split among the
            processes, or that has no labels; a damaged file in the folder.
        DependencyError: `tensorboard` is set, but the package is not installed.
        StateError: A quantizer has no range; the loss or a gradient is NaN or Inf (the message names the layer where it
            starts); the processes do not start in the same state, or another process failed. The model then has its
            best weights, or its last good ones.
    """
    require_model(model)
    require_data(model)
    device = find_device(model)
    with joining_processes(device), ExitStack() as exits:
        exits.enter_context(keeping_random_state(find_generators(batches), device))
        with failing_together(StateError):
            require_batches(batches)
            require_ranges(model)
            options = _Options(
                schedule=schedule,
                ranges=ranges,
                train=train,
                layers=layers,
                measure_every=measure_every,
                folder=None if folder is None else Path(folder),
                tensorboard=tensorboard,
                amp=amp,
                seed=seed,
                optimizer=optimizer,
            )
            is_measured = metric is not None or held is not None
            _require_useful(options, teacher, distillation, is_measured)
            task = _Task(model, teacher, loss, distillation, metric)
            start = _Start(model)
            exits.callback(start.restore_if_best)  # after the trainer has ended
            trainer, record = _prepare(task, batches, held, options, exits)
            start.record = record
        _require_alike(record.settings | {"folder": folder is not None})
        stopped, last_batch = _run(trainer, record, batches, options)
        best_step = record.finish()
        if last_batch is None:  # the run in the folder was finished before
            last_batch = next(iter(batches), None)
        trainer.finish()
        tuning = Tuning(
            losses=tuple(record.losses),
            curve=tuple(record.curve),
            best_step=best_step,
            stopped=stopped,
            oscillating=trainer.watch.find() if trainer.watch else (),
            bad_ranges=_find_bad_ranges(trainer, last_batch),
            seconds=record.seconds,
        )
        if options.folder is not None and find_rank()[0] == 0:
            write_json(options.folder / SUMMARY_FILE, tuning)
    return tuning


@dataclass(frozen=True)
class _Options:
    """How to train; the fields are the parameters of `finetune` of the same names.

    Raises:
        ArgumentError: A number out of range.
        ArgumentTypeError: A value that is not an integer.
    """

    schedule: Schedule
    ranges: str
    train: str
    layers: Iterable[Pattern] | None
    measure_every: int | None
    folder: Path | None
    tensorboard: bool
    amp: bool
    seed: int
    optimizer: MakeOptimizer | None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        value = self.measure_every
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ArgumentTypeError(
                f"measure_every is {value!r}, a {type(value).__name__}.", "give an integer."
            )
        if self.measure_every is not None and self.measure_every < 1:
            raise ArgumentError(
                f"measure_every is {self.measure_every}; it must be 1 or more.", "leave it out."
            )


class _Start:
    """The model before training, with its accuracy passes.

    Args:
        model: The model.

    Attributes:
        record: The record of its training; None before there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.record: Record | None = None
        self._model = model
        self._passes = Snapshot(model)
        quantizers = [quantizer for _, quantizer in named_quantizers(model)]
        self._ranges = copy_ranges(
            quantizer for quantizer in quantizers if quantizer.amax is not None
        )

    def restore_if_best(self) -> None:
        """However training ended: if no step was better, give the model its ranges and passes again.

        Its weights are those of the start then. Learned ranges have been rounded by their logarithm.
        """
        if self.record is not None:
            self.record.restore_best()
            if not self.record.is_at_start:
                return
        for quantizer, amax in self._ranges:
            quantizer.amax = amax
        self._passes.restore(self._model)


@dataclass(frozen=True)
class _Task:
    """What to train, and the goal; the fields are the parameters of `finetune` of the same names."""

    model: nn.Module
    teacher: nn.Module | None
    loss: Loss | None
    distillation: Distillation | None
    metric: Callable[[nn.Module], float] | None


def _require_useful(
    options: _Options,
    teacher: nn.Module | None,
    distillation: Distillation | None,
    is_measured: bool,
) -> None:
    """Refuse options that would have no effect.

    Raises:
        ArgumentError: The message names the option and what it needs.
    """
    if teacher is not None and distillation is None:
        raise ArgumentError(
            "there is a teacher, but no distillation.",
            "leave the teacher out, or pass a Distillation.",
        )
    if options.schedule.patience is not None and not is_measured:
        raise ArgumentError(
            "patience waits for a better metric, but there is no metric.",
            "give held, or a metric.",
        )
    if options.measure_every is not None and not is_measured:
        raise ArgumentError(
            "measure_every is given, but there is no metric.",
            "give held or a metric, or leave it out.",
        )


def _prepare(
    task: _Task,
    batches: Iterable[Any],
    held: Iterable[Any] | None,
    options: _Options,
    exits: ExitStack,
) -> tuple[Trainer, Record]:
    """The trainer of a model and the record of its run; `exits` undoes what they change.

    Raises:
        ArgumentError: As for `finetune`.
        DataError: As for `finetune`.
        DependencyError: As for `finetune`.
    """
    num_steps = options.schedule.count_steps(batches)
    settings = _describe_settings(task, batches, options, num_steps)
    teacher = task.teacher
    if teacher is None and task.distillation is not None:
        teacher = copy_float(task.model)
    forget_passes(task.model)  # training changes what they fitted
    trainer = Trainer(
        task.model,
        Objective(task.model, teacher, task.loss, task.distillation),
        options.schedule,
        num_steps,
        ranges=options.ranges,
        train=options.train,
        layers=options.layers,
        amp=options.amp,
        optimizer=options.optimizer,
    )
    exits.callback(trainer.finish)
    settings["layers"] = trainer.digest_trained()
    if options.optimizer is not None:
        settings["optimizer"] = trainer.describe_optimizer()

    measure_every = options.measure_every or max(num_steps // _MEASUREMENTS, 1)
    settings["measure_every"] = measure_every
    metric = task.metric
    if metric is None and held is not None:
        held_batches = read_held_out(held, options.seed, trainer.device)
        held_out = [trainer.place(batch) for batch in held_batches]
        settings["held"] = digest_tensors(tensors_of(held_out))
        view = task.distillation.view if task.distillation else ALL_OUTPUTS
        metric = _make_metric(task.loss, task.model, teacher, held_out, view)
    record = Record(
        trainer,
        metric,
        measure_every,
        options.folder,
        to_jsonable(settings),
        options.tensorboard,
    )
    exits.callback(record.close)
    return trainer, record


def _describe_settings(
    task: _Task, batches: Iterable[Any], options: _Options, num_steps: int
) -> dict[str, Any]:
    """Everything that a run depends on: a folder is for one such description, and all processes must agree on it."""
    settings: dict[str, Any] = {
        "weights": digest_weights(task.model),
        "schedule": asdict(options.schedule),
        "steps": num_steps,
        "ranges": options.ranges,
        "train": options.train,
        "distillation": _describe_distillation(task.distillation),
        "teacher": "" if task.teacher is None else digest_weights(task.teacher),
        "loss": _name(task.loss),
        "metric": _name(task.metric),
        "amp": options.amp,
        "seed": options.seed,
    }
    is_compared = options.folder is not None or find_rank()[1] > 1
    if is_compared:
        settings["data"] = digest_first_batch(batches, options.seed, find_device(task.model))
    if options.folder is not None and getattr(batches, "persistent_workers", False):
        logger.warning(_PERSISTENT)
    return settings


def _require_alike(facts: dict[str, Any]) -> None:
    """Refuse processes that do not start with the same facts; the error is raised in all of them.

    Raises:
        StateError: The message names the facts that differ.
    """
    contents = gather_bytes(json.dumps(facts).encode())
    facts_of_processes = [json.loads(content) for content in contents]
    first = facts_of_processes[0]
    different: list[str] = []
    for facts_of_process in facts_of_processes[1:]:
        for name in first | facts_of_process:
            if facts_of_process.get(name) != first.get(name) and name not in different:
                different.append(name)
    if different:
        raise StateError(
            f"the processes do not start in the same state: {', '.join(different)} differ.",
            "give each the same model (weights, ranges, formats, layers in float), options and "
            "batches; each process takes its part of every batch itself.",
        )


def _run(
    trainer: Trainer, record: Record, batches: Iterable[Any], options: _Options
) -> tuple[str, Any]:
    """Take all steps that are left.

    Returns:
        Why they ended early ("" if they did not), and the last batch (None if there was no step left).
    """
    random_state = record.resume()
    if not record.losses:
        record.measure()
    batch = None
    patience = options.schedule.patience
    stopped = _reason_to_stop(record, patience)
    stream = iterate_epochs(batches, options.seed, record.epoch, random_state, trainer.device)
    progress = tqdm(
        total=trainer.total,
        initial=trainer.step,
        desc="fine-tune",
        unit="step",
        disable=True if find_rank()[0] else None,
    )
    with progress:
        while trainer.step < trainer.total and not stopped:
            try:
                with trainer.failing_together():
                    record.save_when_due()
                    batch, epoch = next(stream)
                start = time.perf_counter()
                loss = trainer.run_step(batch)
            except BaseException:  # Ctrl-C too
                record.abandon()
                raise
            record.add_step(loss, epoch, time.perf_counter() - start)
            progress.update()
            progress.set_postfix_str(_describe(record), refresh=False)
            stopped = _reason_to_stop(record, patience)
    return stopped, batch


def _describe(record: Record) -> str:
    text = f"loss {record.losses[-1]:.4g}"
    if record.curve:
        text += f", metric {record.curve[-1].metric:.2f}"
    return text


def _reason_to_stop(record: Record, patience: int | None) -> str:
    if patience is None or record.count_without_gain() < patience:
        return ""
    return f"stopped: {patience} measurements in a row were not better"


def _find_bad_ranges(trainer: Trainer, batch: Any) -> tuple[BadRange, ...]:
    if batch is None:
        return ()
    with without_tf32():
        return find_bad_ranges(trainer.model, trainer.place(batch))


def _describe_distillation(distillation: Distillation | None) -> Any:
    """Weights and layers as values that are the same in every process."""
    if distillation is None:
        return None
    patterns: Any = distillation.layers
    if isinstance(patterns, str | type) or callable(patterns):
        patterns = [patterns]
    layers = [pattern if isinstance(pattern, str) else _name(pattern) for pattern in patterns]
    facts: dict[str, Any] = {
        "mse": distillation.mse,
        "kl": distillation.kl,
        "features": distillation.features,
        "layers": layers,
    }
    if distillation.temperature != 1:
        facts["temperature"] = distillation.temperature
    if distillation.view != ALL_OUTPUTS:
        facts["outputs"] = distillation.view.describe()
        facts["output weights"] = distillation.weights
    return facts


def _name(function: Any) -> str:
    """Name of a function, a class or a callable object, "" for None. Its code is not compared."""
    if function is None:
        return ""
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _make_metric(
    loss: Loss | None,
    model: nn.Module,
    teacher: nn.Module | None,
    held_out: list[Any],
    view: OutputView,
) -> Callable[[nn.Module], float]:
    """The metric that fits the training goal, on batches that are not trained on; higher is better."""
    if loss is not None:
        return _LossMetric(loss, held_out)
    assert teacher is not None  # noqa: S101  # without a loss there must be distillation
    return _DistanceMetric(model, teacher, held_out, view)


class _DistanceMetric:
    """SQNR of the outputs against the teacher's, in dB: weighted, or of the worst output.

    Without weights, what an output has lost since the start is subtracted from the worst one's SQNR at the start. So
    the start itself is better than a state that gains in one output what it loses in another.

    Args:
        model: The model before training.
        teacher: The float model.
        held_out: Batches that are not trained on.
        view: The outputs that count.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, held_out: list[Any], view: OutputView
    ) -> None:
        self._batches = held_out
        self._view = view
        with without_tf32():  # as the metric is measured
            self._expected = self._predict(teacher)
            self._start = self._measure(model)

    def __call__(self, model: nn.Module) -> float:
        decibels = self._measure(model)
        weights = self._view.weigh(list(decibels))
        if weights is None and len(decibels) > 1:
            loss = max(_find_loss(self._start[name], decibels[name]) for name in decibels)
            if loss > 0:
                return decide_db(self._start) - loss
        return decide_db(decibels, weights)

    def _measure(self, model: nn.Module) -> dict[str, float]:
        """SQNR of each output in dB."""
        pairs = pair_arrays(self._expected, self._predict(model))
        return {name: sqnr_db(*pair) for name, pair in pairs.items()}

    def _predict(self, model: nn.Module) -> Outputs:
        outputs: Outputs = predict(
            model, self._batches, outputs=self._view.outputs, mask=self._view.mask
        )
        return outputs


def _find_loss(before: float, after: float) -> float:
    """How much worse an SQNR has become, in dB; above that of float rounding, it does not count."""
    return min(before, _FLOAT_ROUNDING_DB) - min(after, _FLOAT_ROUNDING_DB)


class _LossMetric:
    """Minus the loss of the task, averaged over the samples."""

    def __init__(self, loss: Loss, held_out: list[Any]) -> None:
        self._loss: Loss = loss
        self._batches = held_out
        self._sizes = [count_samples(batch) for batch in held_out]

    def __call__(self, model: nn.Module) -> float:
        losses = []
        for batch in self._batches:
            _, loss = run_with_loss(model, self._loss, batch)
            losses.append(loss)
        return -float(np.average(torch.stack(losses).tolist(), weights=self._sizes))
