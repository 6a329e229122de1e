"""`train_compressed`: a training as the file of `--compress` describes it, by `qdq.finetune`.

It has up to three phases: in float, quantized, and quantized with a teacher, in the order that the file and the options
say. Each is a run of `finetune`, so that a killed training resumes with identical losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.distiller.training.compress_file import CompressPlan
from qdq.distiller.training.distillation import KnowledgeDistillation, WeightedCrossEntropy
from qdq.distiller.training.learning_rates import EpochRates
from qdq.errors import ArgumentError
from qdq.qat import Tuning, cross_entropy, finetune
from qdq.qat.trainer import MakeOptimizer
from qdq.systems.moving_range import moving_ranges

_NO_CLIPPING = 1e30  # of gradients


@dataclass(frozen=True)
class _Phase:
    """Epochs in which nothing changes: from `first` on, before `end`."""

    number: int
    first: int
    end: int
    teaching: KnowledgeDistillation | None


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained; all but `epochs`, `teaching` and `begin_phase` are parameters of `qdq.finetune`.

    Args:
        epochs: Number of epochs.
        teaching: A teacher; None: the labels alone.
        metric: `model -> number`, higher is better. It is measured after each epoch, and the network gets the weights
            of the best one of the last phase.
        begin_phase: Is called with the number of the first epoch of each phase.
        folder: For the state of each phase.
        seed: Seed of the first phase; each later one has the next number.

    Raises:
        ArgumentError: Fewer than one epoch.
    """

    epochs: int
    teaching: KnowledgeDistillation | None = None
    metric: Callable[[nn.Module], float] | None = None
    begin_phase: Callable[[int], None] | None = None
    folder: Path | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ArgumentError(f"epochs is {self.epochs}; it must be 1 or more.", "give a number.")


def train_compressed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    plan: CompressPlan,
    options: TrainOptions,
    dummy_input: Any = None,
) -> tuple[Tuning, ...]:
    """Train a classifier as a file says, in place; BatchNorm is live in all epochs, and there is no dropout.

    Args:
        model: A float model, on its device.
        optimizer: Of its parameters; each phase has one of the same class and settings.
        batches: Images and labels, of known number, see `finetune`.
        plan: From `read_compress_file`.
        options: How long, with what teacher, and where its files are.
        dummy_input: As for `TrainingQuantizer.prepare_model`.

    Returns:
        The result of each phase.

    Raises:
        ArgumentError: The file and the options do not fit; otherwise as for `finetune` and the quantizer.
    """
    lr = float(optimizer.param_groups[0]["lr"])
    start = plan.find_start(options.epochs)
    rates = plan.find_rates(lr, options.epochs)
    tunings = []
    for phase in _split(options, start):
        if options.begin_phase is not None:
            options.begin_phase(phase.first)
        if phase.first == start and plan.quantizer is not None:
            plan.quantizer.build(model, optimizer=optimizer).prepare_model(dummy_input)
        schedule = EpochRates(
            epochs=phase.end - phase.first,
            lr=lr,
            bias_lr=lr,
            tune_batchnorm=1.0,
            max_norm=_NO_CLIPPING,
            rates=rates[phase.first : phase.end],
        )
        tunings.append(_tune(model, optimizer, batches, schedule, options, phase))
    return tuple(tunings)


def _split(options: TrainOptions, start: int) -> list[_Phase]:
    """The phases of a training.

    Args:
        options: Its length and its teacher.
        start: The epoch before which the network becomes a quantized one.
    """
    teaching = options.teaching
    taught_from = options.epochs if teaching is None else teaching.start_epoch
    borders = {0, start, taught_from, options.epochs}
    inside = sorted(border for border in borders if border <= options.epochs)
    phases = []
    for number, (first, end) in enumerate(pairwise(inside)):
        phases.append(_Phase(number, first, end, teaching if first >= taught_from else None))
    return phases


def _tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    schedule: EpochRates,
    options: TrainOptions,
    phase: _Phase,
) -> Tuning:
    """One phase."""
    folder = None if options.folder is None else Path(options.folder) / f"phase-{phase.number}"
    teaching = phase.teaching
    with moving_ranges(model):
        return finetune(
            model,
            batches,
            loss=cross_entropy if teaching is None else WeightedCrossEntropy(teaching.student_wt),
            distillation=None if teaching is None else teaching.make_distance(),
            teacher=None if teaching is None else teaching.teacher,
            schedule=schedule,
            ranges="none",
            metric=options.metric,
            measure_every=None if options.metric is None else len(batches),
            folder=folder,
            seed=options.seed + phase.number,
            optimizer=_recreate(optimizer),
        )


def _recreate(optimizer: torch.optim.Optimizer) -> MakeOptimizer:
    """What makes an optimizer like another one, with its settings for each parameter."""
    kind: Any = type(optimizer)
    names = inspect.signature(kind).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in names}

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        trained = {parameter for group in groups for parameter in group["params"]}
        renewed = []
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in trained]
            if parameters:
                renewed.append({**group, "params": parameters, "largest_lr": group["lr"]})
        optimized: torch.optim.Optimizer = kind(renewed, **defaults)
        return optimized

    return make
