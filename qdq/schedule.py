"""The length of fine-tuning, and the parameters that each of its steps may change; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from qdq.errors import ArgumentError, ArgumentTypeError

_COUNTS = ("steps", "epochs", "patience")
_POSITIVE = ("lr", "bias_lr", "range_lr", "max_norm")
_FRACTIONS = ("warm_up", "tune_ranges", "tune_batchnorm", "grow")


@dataclass(frozen=True)
class Schedule:
    """Length of fine-tuning, learning rates, and fractions of the length after which something starts or ends.

    The learning rate rises linearly, then falls to 0 along half a cosine (Loshchilov, Hutter, ICLR 2017,
    arXiv 1608.03983). As a rule, fine-tuning takes a tenth of the steps of the training and a hundredth of its rate
    (Wu, Judd, Zhang, Isaev, Micikevicius, arXiv 2004.09602, section 5.2).

    Args:
        steps: Number of optimizer steps; by default the number of batches times `epochs`.
        epochs: Passes over the batches if no steps are given.
        lr: Largest learning rate of weights, for Adam.
        bias_lr: Largest learning rate of parameters with one dimension: biases and the factors of BatchNorm.
        range_lr: Largest learning rate of log2 of learned ranges: a step changes a range by about this fraction.
        warm_up: Fraction of the steps in which the rates rise.
        tune_ranges: Fraction of the steps after which learned and observed ranges are frozen.
        tune_batchnorm: Fraction of the steps after which the statistics of live BatchNorm are frozen.
        grow: Fraction of the steps over which quantization is switched on, layer by layer in the order of the data;
            0: at once.
        max_norm: Gradients with a larger norm are scaled down to it.
        patience: Stop after this number of consecutive measurements without a better metric; None: never.

    Raises:
        ArgumentError: A number out of range.
        ArgumentTypeError: A value that is not a number, or a count that is not an integer.
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
        for name in _COUNTS:
            _require_count(name, getattr(self, name))
        for name in (*_POSITIVE, *_FRACTIONS):
            _require_real(name, getattr(self, name))
        for name in _POSITIVE:
            _require_positive(name, getattr(self, name))
        for name in _FRACTIONS:
            _require_fraction(name, getattr(self, name))

    def count_steps(self, batches: Any) -> int:
        """Number of steps for these batches.

        Raises:
            ArgumentError: `steps` is None, and there is no batch or their number is unknown.
        """
        if self.steps is not None:
            return self.steps
        try:
            num_batches = len(batches)
        except TypeError as error:
            # A DataLoader has the method whether its data have a length or not.
            raise ArgumentError(
                "the batches have no length, so the number of steps in an epoch is unknown.",
                "give Schedule(steps=...).",
            ) from error
        if not num_batches:
            raise ArgumentError("there is no batch to train on.", "give at least one batch.")
        return self.epochs * num_batches

    def rate_at(self, step: int, total: int) -> float:
        """Learning rate of a step as a fraction of the largest one.

        Args:
            step: 0 to total - 1.
            total: Number of steps.

        Returns:
            Above 0, at most 1.
        """
        rising_steps = math.ceil(self.warm_up * total)
        if step < rising_steps:
            return (step + 1) / (rising_steps + 1)
        progress = (step - rising_steps) / (total - rising_steps)
        return (1 + math.cos(math.pi * progress)) / 2


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise ArgumentTypeError(
            f"{name} is {value!r}, a {type(value).__name__}.", "give an integer."
        )
    if value is not None and value < 1:
        raise ArgumentError(f"{name} is {value}; it must be 1 or more.", f"pass a positive {name}.")


def _require_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(
            f"{name} is {value!r}, a {type(value).__name__}.", f"give {name} as a number."
        )


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ArgumentError(
            f"{name} is {value}; it must be above 0 and finite.", f"pass a positive {name}."
        )


def _require_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name} is {value}; it is a fraction of the steps.", "give 0 to 1.")
