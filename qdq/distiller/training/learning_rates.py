"""How a file changes the learning rate: its section `lr_schedulers`, with classes of torch.optim.lr_scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from qdq.distiller.settings.values import as_number, describe_value, is_whole
from qdq.distiller.training.policies import Policy
from qdq.errors import ArgumentError, ArgumentTypeError, DataError
from qdq.schedule import Schedule

LR_SCHEDULERS = (
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "PolynomialLR",
    "StepLR",
)
"""The classes of torch.optim.lr_scheduler that a file can name: those whose rate depends on the epoch alone."""


_REPLACEMENTS = {
    "MultiStepMultiGammaLR": "write a MultiStepLR, with a policy, for each gamma and its milestone: they multiply.",
}
"""What to use for classes that Distiller has and torch has not."""

_FIX = "see docs/distiller.md for the form of the file."


@dataclass(frozen=True)
class LRScheduler:
    """A scheduler of the learning rate in a file.

    Args:
        class_name: One of `LR_SCHEDULERS`.
        arguments: Its arguments, apart from the optimizer.
        place: Where it stands, for messages.
    """

    class_name: str
    arguments: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class EpochRates(Schedule):
    """A schedule with one learning rate in each epoch.

    Args:
        rates: The rates, as fractions of that of the optimizer.
    """

    rates: tuple[float, ...] = ()

    def rate_at(self, step: int, total: int) -> float:
        """The fraction of the epoch of a step.

        Args:
            step: 0 to total - 1.
            total: Number of steps.
        """
        return self.rates[step * len(self.rates) // total]


def read_lr_schedulers(section: Any, label: str) -> dict[str, LRScheduler]:
    """The schedulers of the learning rate of a file, by name.

    Args:
        section: Content of the section `lr_schedulers`.
        label: Name of the file, for messages.

    Raises:
        ArgumentError: An unknown class.
        ArgumentTypeError: An unknown argument.
        DataError: Another form.
    """
    if not isinstance(section, Mapping):
        raise DataError(
            f"{label}: lr_schedulers is {describe_value(section)}; expected names.", _FIX
        )
    schedulers = {}
    for name, entry in section.items():
        schedulers[name] = _read_lr_scheduler(entry, f"{label}: lr_schedulers.{name}")
    return schedulers


def _read_lr_scheduler(entry: Any, place: str) -> LRScheduler:
    arguments = dict(entry) if isinstance(entry, Mapping) else {}
    class_name = arguments.pop("class", None)
    if class_name not in LR_SCHEDULERS:
        raise ArgumentError(
            f"{place}: class is {describe_value(class_name)}; expected {', '.join(LR_SCHEDULERS)}.",
            _REPLACEMENTS.get(str(class_name), "name one: the rate may depend on the epoch alone."),
        )
    parameters = inspect.signature(getattr(lr_scheduler, class_name)).parameters
    allowed = [name for name in parameters if name not in ("optimizer", "last_epoch", "verbose")]
    for key in arguments:
        if key not in allowed:
            raise ArgumentTypeError(
                f"{place}: {describe_value(key)} is unknown; expected {', '.join(allowed)}.",
                "correct or remove it.",
            )
        arguments[key] = _read_argument(arguments[key])
    _require_milestones(arguments.get("milestones", []), place)
    return LRScheduler(class_name, arguments, place)


def _read_argument(value: Any) -> Any:
    """A value, with a number in the place of text that YAML makes of some, such as 9e-1."""
    if not isinstance(value, str):
        return value
    number = as_number(value)
    return value if math.isnan(number) else number


def _require_milestones(milestones: Any, place: str) -> None:
    """Refuse milestones that no epoch is; torch would never come to them.

    Raises:
        ArgumentError: Not a list of whole numbers above 0.
    """
    is_list = isinstance(milestones, list)
    if not is_list or not all(is_whole(epoch) and epoch > 0 for epoch in milestones):
        raise ArgumentError(
            f"{place}: milestones is {describe_value(milestones)}; expected a list of epochs, from 1 on.",
            "write for example milestones: [30, 60].",
        )


def find_rates(
    schedulers: Mapping[str, LRScheduler], policies: Sequence[Policy], lr: float, epochs: int
) -> tuple[float, ...]:
    """The learning rate of each epoch, as a fraction of that of the optimizer.

    A scheduler begins with the first epoch of its policy, and steps after each epoch in which the policy acts.

    Args:
        schedulers: By name.
        policies: Those of schedulers.
        lr: The rate of the optimizer.
        epochs: Number of epochs.

    Raises:
        ArgumentError: torch refuses the arguments of a scheduler, or a rate is negative or not finite.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    running: dict[str, Any] = {}
    rates = []
    for epoch in range(epochs):
        for policy in policies:
            if policy.starting_epoch == epoch:
                scheduler = schedulers[policy.instance_name]
                running[policy.instance_name] = _build(scheduler, optimizer)
        rates.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()  # torch expects it before a step of a scheduler
        for policy in policies:
            if policy.acts_in(epoch):
                _step(running[policy.instance_name], schedulers[policy.instance_name])
    if not all(rate >= 0 and math.isfinite(rate) for rate in rates):
        raise ArgumentError(
            f"the learning rates of the epochs are {rates}, times {lr}; they must be finite and at least 0.",
            "correct lr_schedulers.",
        )
    return tuple(rates)


def _build(scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of torch.

    Raises:
        ArgumentError: torch refuses the arguments.
    """
    try:
        return getattr(lr_scheduler, scheduler.class_name)(optimizer, **scheduler.arguments)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{scheduler.place}: {error}.", "correct the arguments.") from error


def _step(running: Any, scheduler: LRScheduler) -> None:
    """The end of an epoch.

    Raises:
        ArgumentError: torch cannot compute a rate with the arguments.
    """
    try:
        running.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ArgumentError(f"{scheduler.place}: {error}.", "correct the arguments.") from error
