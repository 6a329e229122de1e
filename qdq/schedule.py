"""How long fine-tuning lasts, and what each of its steps may change; without torch, for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from qdq.errors import ArgumentError, ArgumentTypeError

_SHARES = ("warm_up", "tune_ranges", "tune_batchnorm", "grow")


@dataclass(frozen=True)
class Schedule:
    """Length, learning rates, and the shares of the length in which some things happen.

    The learning rate rises linearly, then falls to 0 along half a cosine (Loshchilov, Hutter, ICLR 2017,
    arXiv 1608.03983). As a rule fine-tuning takes a tenth of the steps of the training and a hundredth of its rate (Wu,
    Judd, Zhang, Isaev, Micikevicius, arXiv 2004.09602, section 5.2).

    Args:
        steps: Number of optimizer steps; left out: as many as the epochs have.
        epochs: Passes over the batches where no steps are given.
        lr: Largest learning rate of weights, for Adam.
        bias_lr: That of parameters with one dimension: biases, which no code holds in place, and factors of BatchNorm.
        range_lr: That of log2 of learned ranges: a step changes a range by about this share of itself.
        warm_up: Share of the steps in which the rates rise.
        tune_ranges: Share of the steps after which learned and observed ranges stay as they are.
        tune_batchnorm: Share of the steps after which live BatchNorm keeps its statistics.
        grow: Share of the steps over which quantization is switched on, layer by layer as the data flows; 0: at once.
        max_norm: Gradients with a larger norm are scaled down to it.
        patience: Stop after so many measurements of the metric in a row without a better one; left out: never.

    Raises:
        ArgumentError: A number that cannot be meant.
        ArgumentTypeError: No number, or none that counts.
    """

    steps: int | None = None
    epochs: int = 8
    lr: float = 1e-5
    bias_lr: float = 1e-4
    range_lr: float = 1e-3
    warm_up: float = 0.05
    tune_ranges: float = 0.8
    tune_batchnorm: float = 0.5
    grow: float = 0.0
    max_norm: float = 1.0
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ArgumentTypeError(
                    f"{name} is {value!r}, a {type(value).__name__}.", "give an integer."
                )
            if value is not None and value < 1:
                raise ArgumentError(
                    f"{name} is {value}; it must be 1 or more.", f"pass a positive {name}."
                )
        for name in ("lr", "bias_lr", "range_lr", "max_norm", *_SHARES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ArgumentTypeError(
                    f"{name} is {value!r}, a {type(value).__name__}.", f"give {name} as a number."
                )
        for name in ("lr", "bias_lr", "range_lr", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                number = getattr(self, name)
                raise ArgumentError(
                    f"{name} is {number}; it must be above 0 and finite.",
                    f"pass a positive {name}.",
                )
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(
                    f"{name} is {getattr(self, name)}; it is a share of the steps.", "give 0 to 1."
                )

    def count_steps(self, batches: Any) -> int:
        """Number of steps for these batches.

        Raises:
            ArgumentError: `steps` is None and the batches have no length, or none is there.
        """
        if self.steps is not None:
            return self.steps
        try:
            count = len(batches)
        except (
            TypeError
        ) as error:  # a DataLoader has the method whether its data have a length or not
            found = "the batches have no length, so epochs say nothing."
            raise ArgumentError(found, "give Schedule(steps=...).") from error
        if not count:
            raise ArgumentError("there is no batch to train on.", "give at least one batch.")
        return self.epochs * count

    def rate_at(self, step: int, total: int) -> float:
        """Share of the largest learning rate in step 0 ... total - 1: above 0, at most 1."""
        rising = math.ceil(self.warm_up * total)
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
