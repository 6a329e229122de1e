"""Fine-tuning (QAT): win back what quantization lost, with labels or without, and export as before.

The forward is fake-quantized as ever, and the gradient passes straight through (see `qdq.quantizer`). By default the
ranges of calibration stay and the float model teaches the quantized one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qdq.calibrate.collect import digest_tensors
from qdq.distributed import failing_together, find_rank, gather_bytes, joining_processes
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, StateError
from qdq.evaluate import predict
from qdq.files import to_jsonable, write_json
from qdq.forward import find_device, require_batches, require_model, tensors_of
from qdq.metrics import sqnr_db
from qdq.patterns import Pattern
from qdq.qat.checkpoint import keeping_random_state, load_tuned, save_tuned, unpack_random
from qdq.qat.losses import Distillation, Loss, Objective, cross_entropy, run_with_loss
from qdq.qat.ranges import require_ranges
from qdq.qat.record import Measurement, Record
from qdq.qat.trainer import Trainer, copy_float, digest_weights
from qdq.qat.watch import BadRange, Oscillation, find_bad_ranges
from qdq.run import set_seed
from qdq.samples import count_samples
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
    "the random numbers of persistent_workers go on from epoch to epoch and cannot be saved: where data draws some, "
    "a run that is resumed sees other data; leave persistent_workers out for the same losses"
)
_MEASUREMENTS = 10  # of the metric, where nothing else is said


@dataclass(frozen=True)
class Tuning:
    """Result of `finetune`.

    Args:
        losses: Loss of each step.
        curve: The metric before, between and after; empty where there is none.
        best_step: The step whose weights the model has now.
        stopped: Why it ended before the last step, "" if it did not.
        oscillating: Layers whose weights went back and forth between two codes, see `OscillationWatch`.
        bad_ranges: Ranges that do not fit what they quantize.
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
        """The curve, then what does not look right."""
        steps = len(self.losses)
        lines = [
            f"{steps} steps, {self.seconds / max(steps, 1):.2f} s a step; the model is that of step {self.best_step}"
            + (f"; {self.stopped}" if self.stopped else ""),
            "   step   metric     loss        lr",
        ]
        for m in self.curve:
            loss = "       -" if m.loss is None else f"{m.loss:8.5f}"
            lines.append(f"  {m.step:5d}  {m.metric:7.2f}  {loss}  {m.lr:8.1e}")
        for each in self.oscillating:
            lines.append(
                f"  {each.layer}: {each.share:.1%} of its weights oscillate between two codes"
            )
        return "\n".join(lines + [f"  {each.quantizer}: {each.reason}" for each in self.bad_ranges])


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
) -> Tuning:
    """Train a calibrated model with its quantizers on, in place.

    The model stays in evaluation mode (no dropout), but for live BatchNorm at first. Under `torchrun` every process
    passes the same model and batches and takes its share of the samples of each; the gradients are the mean over all
    samples, so that the result is that of one process. The first process alone reads and writes files, and its metric
    counts. The group of the processes is joined for the call, unless torch.distributed has one already.

    With `folder`, a run that was killed goes on where it was when it is called again in the same way, with the same
    losses; one that an error or Ctrl-C ends has lost no step.

    Args:
        model: A calibrated model, on its device. At the end it has the weights with the best metric, or the last ones.
        batches: What the model is called with (see `trace.call_model`), iterated over again in every epoch: a
            DataLoader, a list. The seed and the number of the epoch seed the random numbers that it shuffles with, and
            the `generator` of a DataLoader or its samplers; `set_epoch(epoch)` of them is called where there is one.
        loss: `(outputs, batch) -> scalar`, the mean over the samples: `cross_entropy`, or that of a detector. "own":
            what the model itself gives in training mode, see `losses.run_with_loss`. None: distillation alone, which
            needs no labels.
        distillation: The distance to the teacher; None leaves it out.
        teacher: The float model; None: the model as it is now, with its quantizers off.
        schedule: Length and learning rates.
        ranges: "frozen", "lsq", "pact" or "ema", see `RangeTuning`.
        train: "all", "ranges" (learned ranges only) or "batchnorm" (the statistics of live BatchNorm only, no range).
            Parameters with `requires_grad=False` stay as they are.
        layers: Patterns (see `qdq.patterns`) of modules; only what is in them is trained, their ranges and the
            statistics of their BatchNorm too. None: everything.
        held: Batches that are not trained on; read once, with the random numbers of `seed`. The metric is what is
            trained for: with `loss` minus that loss, so they need what it needs; else the SQNR of the first output
            against the teacher's, in dB.
        metric: `model -> number`, higher is better, instead.
        measure_every: Steps between two measurements; None: a tenth of all.
        folder: Keeps the state of the run, the best and the last model and a summary; a run that is finished is read.
            Of `loss`, `metric` and patterns that are functions the names are compared, not what they compute.
        tensorboard: Write loss, metric, learning rate and ranges as scalars into `folder`/tensorboard.
        amp: Compute in bfloat16 where torch.autocast does so; weights and quantizers stay in float32.
        seed: Of the order of the data.

    Returns:
        Losses, the curve of the metric, and what did not look right.

    Raises:
        ArgumentError: Options that do not go together, have nothing to act on or are out of range; a loss that depends
            on nothing that is trained; weights in float16; a folder that cannot be written to, or that holds a run of
            another model or with other settings.
        ArgumentTypeError: One tensor or dictionary instead of batches; a number of another kind.
        DataError: No batch, or none any more, or none to measure on; a batch that cannot be shared among processes, or
            has no labels; a damaged file in the folder.
        DependencyError: `tensorboard` without the package.
        StateError: A quantizer has no range; the loss or a gradient is NaN or Inf, with the layer in which it began;
            the processes do not begin alike, or another one failed. The model then has its best, or else its last
            good weights.
    """
    require_model(model)
    with joining_processes(find_device(model)), ExitStack() as exits:
        exits.enter_context(keeping_random_state(_find_generators(batches)))
        with failing_together(StateError):
            require_batches(batches)
            require_ranges(model)
            _require_numbers(seed, measure_every)
            _require_useful(
                teacher,
                distillation,
                schedule,
                measure_every,
                metric is not None or held is not None,
            )
            taught_by = "" if teacher is None else digest_weights(teacher)
            if teacher is None and distillation is not None:
                teacher = copy_float(model)
            total = schedule.count_steps(batches)
            settings: dict[str, Any] = {
                "weights": digest_weights(model),
                "schedule": asdict(schedule),
                "steps": total,
                "ranges": ranges,
                "train": train,
                "distillation": _describe_distillation(distillation),
                "teacher": taught_by,
                "loss": _name(loss),
                "metric": _name(metric),
                "amp": amp,
                "seed": seed,
            }
            if folder is not None and getattr(batches, "persistent_workers", False):
                logger.warning(_PERSISTENT)
            if folder is not None or find_rank()[1] > 1:
                settings["data"] = _digest_first(batches, seed)
            objective = Objective(model, teacher, loss, distillation)
            trainer = Trainer(
                model,
                objective,
                schedule,
                total,
                ranges=ranges,
                train=train,
                layers=layers,
                amp=amp,
            )
            exits.callback(trainer.finish)
            settings["layers"] = trainer.digest_trained()
            every = settings["measure_every"] = measure_every or max(total // _MEASUREMENTS, 1)
            if metric is None and held is not None:
                kept = [trainer.place(batch) for batch in _read_held(held, seed)]
                settings["held"] = digest_tensors(tensors_of(kept))
                metric = _measure_loss(loss, kept) if loss else _measure_distance(teacher, kept)
            settings = to_jsonable(settings)
            record = Record(
                trainer,
                metric,
                every,
                None if folder is None else Path(folder),
                settings,
                tensorboard,
            )
            exits.callback(record.close)
        _require_alike(settings | {"folder": folder is not None})
        stopped, batch = _run(trainer, record, batches, seed, schedule.patience)
        best_step = record.finish()
        if batch is None:  # the run in the folder was finished before
            batch = next(iter(batches), None)
        trainer.finish()
        oscillating = trainer.watch.find() if trainer.watch else ()
        bad_ranges = () if batch is None else find_bad_ranges(model, trainer.place(batch))
        tuning = Tuning(
            tuple(record.losses),
            tuple(record.curve),
            best_step,
            stopped,
            oscillating,
            bad_ranges,
            record.seconds,
        )
        if folder is not None and find_rank()[0] == 0:
            write_json(Path(folder) / SUMMARY_FILE, tuning)
    return tuning


def _require_numbers(seed: int, measure_every: int | None) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        ArgumentError: With the one.
        ArgumentTypeError: No integer.
    """
    for name, value in (("seed", seed), ("measure_every", measure_every)):
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ArgumentTypeError(
                f"{name} is {value!r}, a {type(value).__name__}.", "give an integer."
            )
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"seed is {seed}; it must be 0 to {2**32 - 1}.", "choose another seed.")
    if measure_every is not None and measure_every < 1:
        raise ArgumentError(
            f"measure_every is {measure_every}; it must be 1 or more.", "leave it out."
        )


def _require_useful(
    teacher: nn.Module | None,
    distillation: Distillation | None,
    schedule: Schedule,
    measure_every: int | None,
    is_measured: bool,
) -> None:
    """Refuse what would change nothing.

    Raises:
        ArgumentError: With the option, and what it needs.
    """
    if teacher is not None and distillation is None:
        raise ArgumentError(
            "there is a teacher, but no distillation.",
            "leave the teacher out, or pass a Distillation.",
        )
    if schedule.patience is not None and not is_measured:
        raise ArgumentError(
            "patience waits for a better metric, and there is none.", "give held, or a metric."
        )
    if measure_every is not None and not is_measured:
        raise ArgumentError(
            "measure_every is given, and there is no metric.",
            "give held or a metric, or leave it out.",
        )


def _require_alike(facts: dict[str, Any]) -> None:
    """Refuse processes that do not begin with the same facts; all of them end then.

    Raises:
        StateError: With the names of those that differ.
    """
    first, *others = [json.loads(content) for content in gather_bytes(json.dumps(facts).encode())]
    names = dict.fromkeys(name for each in (first, *others) for name in each)
    if different := [
        name for name in names if any(other.get(name) != first.get(name) for other in others)
    ]:
        raise StateError(
            f"the processes do not begin alike: {', '.join(different)} differ.",
            "give all of them the same model (weights, ranges, formats, layers in float), options and "
            "batches; each takes its share of every batch by itself.",
        )


def _run(
    trainer: Trainer, record: Record, batches: Iterable[Any], seed: int, patience: int | None
) -> tuple[str, Any]:
    """All steps that are left; why they ended early ("" if they did not), and the last batch."""
    random_state = record.resume()
    if not record.losses:
        record.measure()
    stopped, batch = _reason_to_stop(record, patience), None
    stream = _iterate(batches, seed, record.epoch, random_state)
    hidden = True if find_rank()[0] else None
    with tqdm(
        total=trainer.total, initial=trainer.step, desc="fine-tune", unit="step", disable=hidden
    ) as progress:
        while trainer.step < trainer.total and not stopped:
            try:
                with trainer.failing_together():
                    record.save_when_due()
                    batch, epoch = next(stream)
                began = time.perf_counter()
                loss = trainer.run_step(batch)
            except BaseException:  # Ctrl-C too
                record.abandon()
                raise
            record.add_step(loss, epoch, time.perf_counter() - began)
            progress.update()
            progress.set_postfix_str(_describe(record), refresh=False)
            stopped = _reason_to_stop(record, patience)
    return stopped, batch


def _describe(record: Record) -> str:
    metric = f", metric {record.curve[-1].metric:.2f}" if record.curve else ""
    return f"loss {record.losses[-1]:.4g}{metric}"


def _reason_to_stop(record: Record, patience: int | None) -> str:
    if patience is None or record.count_without_gain() < patience:
        return ""
    return f"stopped: {patience} measurements in a row were not better"


def _iterate(
    batches: Iterable[Any],
    seed: int,
    begin: tuple[int, int],
    random_state: Mapping[str, torch.Tensor],
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Batches without end, each with its epoch and how many of that epoch have been taken with it.

    Each epoch seeds all random numbers by itself, so that it can be begun anew and skipped to where a run was.

    Raises:
        DataError: An epoch without a batch.
    """
    epoch, skipped = begin
    while True:
        _begin_epoch(batches, seed, epoch)
        taken = 0
        for taken, batch in enumerate(batches, 1):
            if taken <= skipped:
                if taken == skipped and random_state:
                    unpack_random(random_state)
                continue
            yield batch, (epoch, taken)
        if not taken:
            found = (
                "the batches ran out: an iterator gives them once"
                if epoch
                else "there is no batch to train on"
            )
            raise DataError(
                f"{found}.", "give batches that can be iterated over again, a list or a DataLoader."
            )
        epoch, skipped, random_state = epoch + 1, 0, {}


def _describe_distillation(distillation: Distillation | None) -> Any:
    """Weights and layers, in the same words in every process."""
    if distillation is None:
        return None
    layers = distillation.layers
    patterns = [layers] if isinstance(layers, str | type) or callable(layers) else layers
    return {
        **vars(distillation),
        "layers": [each if isinstance(each, str) else _name(each) for each in patterns],
    }


def _name(function: Any) -> str:
    """Of a function, a class or an object that is called; "" of None. What it computes is not compared."""
    if function is None:
        return ""
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _digest_first(batches: Iterable[Any], seed: int) -> str:
    """What tells one training set from another: the first batch, labels too; "" where looking would use it up."""
    if iter(batches) is batches:
        return ""
    with keeping_random_state():
        _begin_epoch(batches, seed, 0)
        return next((digest_tensors(tensors_of(batch)) for batch in batches), "")


def _read_held(held: Iterable[Any], seed: int) -> list[Any]:
    """The batches to measure on; where they are drawn at random, the same for a seed.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: There is none.
    """
    require_batches(held)
    with keeping_random_state(_find_generators(held)):
        _begin_epoch(held, seed, 0)
        kept = list(held)
    if not kept:
        raise DataError(
            "there is no batch to measure on.", "give held at least one batch, or leave it out."
        )
    return kept


def _begin_epoch(batches: Any, seed: int, epoch: int) -> None:
    """Seed the global random numbers and the generators of the batches, and tell samplers the epoch."""
    common, own = (
        int(number) for number in np.random.SeedSequence([seed, epoch]).generate_state(2)
    )
    set_seed(common)
    for generator in _find_generators(batches):
        generator.manual_seed(own)
    for owner in _find_samplers(batches):
        if set_epoch := getattr(owner, "set_epoch", None):
            set_epoch(epoch)


def _find_generators(batches: Any) -> list[torch.Generator]:
    """Random numbers that a DataLoader or its samplers have for themselves."""
    owned = [getattr(owner, "generator", None) for owner in _find_samplers(batches)]
    return [generator for generator in owned if isinstance(generator, torch.Generator)]


def _find_samplers(batches: Any) -> list[Any]:
    """The batches themselves, and what a DataLoader draws its order from."""
    drawn = getattr(batches, "batch_sampler", None)
    found = [batches, drawn, getattr(batches, "sampler", None), getattr(drawn, "sampler", None)]
    return list({id(owner): owner for owner in found}.values())


def _measure_distance(teacher: nn.Module | None, held: list[Any]) -> Callable[[nn.Module], float]:
    """SQNR of the first output against the teacher's, in dB."""
    assert teacher is not None  # noqa: S101  # without a loss there is distillation
    expected = predict(teacher, held)
    return lambda model: sqnr_db(expected, predict(model, held))


def _measure_loss(loss: Loss, held: list[Any]) -> Callable[[nn.Module], float]:
    """Minus the loss of the task, the mean over the samples."""
    sizes = [count_samples(batch) for batch in held]

    def measure(model: nn.Module) -> float:
        losses = [float(run_with_loss(model, loss, batch)[1]) for batch in held]
        return -float(np.average(losses, weights=sizes))

    return measure
