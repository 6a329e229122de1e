"""How layers are ranked and chosen: the arguments of `analyze_layers`, refused where they cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qdq.analyze.cost import find_gpu, read_profile
from qdq.analyze.sensitivity import METRICS, SQNR, OutputMetric
from qdq.errors import ArgumentError

MODES = ("one-at-a-time", "leave-one-out")
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class ChosenMetric:
    """What ranks: a measure of the outputs, or a function of the model.

    Args:
        name: For people.
        higher_is_better: Its direction.
        outputs: The measure of the outputs; that of a function is SQNR, which is measured in any case.
        function: The function, if it is one.
    """

    name: str
    higher_is_better: bool
    outputs: OutputMetric
    function: Metric | None = None

    @property
    def is_sqnr(self) -> bool:
        """Whether SQNR ranks."""
        return self.function is None and self.outputs is SQNR


@dataclass(frozen=True)
class Options:
    """What `analyze_layers` can be told beside model, data and patterns; see there.

    Raises:
        ArgumentError: An unknown name, a target for a metric that is not given, a number out of range, or options that
            contradict each other.
        DataError: The profile cannot be read.
    """

    mode: str = MODES[0]
    metric: str | Metric | None = None
    higher_is_better: bool | None = None
    confirm: int | None = None
    target_sqnr: float | None = None
    target_metric: float | None = None
    target_drop: float | None = None
    max_float_layers: int = 0
    max_float_share: float | None = None
    budget: float | None = None
    gpu: str | None = None
    profile: Path | str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(
                f"mode is {self.mode!r}; known are {', '.join(MODES)}.", "use 'one-at-a-time'."
            )
        self._check_targets()
        self._check_limits()
        self._check_costs()

    @property
    def chosen_metric(self) -> ChosenMetric:
        """What ranks.

        Raises:
            ArgumentError: An unknown name, or another direction than the metric has.
        """
        if callable(self.metric):
            name = getattr(self.metric, "__qualname__", type(self.metric).__qualname__)
            return ChosenMetric(name, self.higher_is_better is not False, SQNR, self.metric)
        known = METRICS.get("sqnr" if self.metric is None else self.metric)
        if known is None:
            raise ArgumentError(
                f"metric is {self.metric!r}; known are {', '.join(METRICS)}.",
                "or pass a function of the model.",
            )
        if self.higher_is_better is not None and self.higher_is_better != known.higher_is_better:
            raise ArgumentError(
                f"higher_is_better is {self.higher_is_better} for {known.name}.",
                "leave it out: it is known.",
            )
        return ChosenMetric(known.name, known.higher_is_better, known)

    def _check_targets(self) -> None:
        is_sqnr = self.chosen_metric.is_sqnr
        for name in ("target_metric", "target_drop"):
            if getattr(self, name) is not None and is_sqnr:
                raise ArgumentError(
                    f"{name} is given, but no metric.",
                    "choose a metric as well, or use target_sqnr.",
                )
        for name in ("target_sqnr", "target_metric", "target_drop"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ArgumentError(f"{name} is {value}.", "give a finite number.")
        if self.target_drop is not None and self.target_drop < 0:
            raise ArgumentError(
                f"target_drop is {self.target_drop}.", "give how much worse it may be, 0 or more."
            )

    def _check_limits(self) -> None:
        if type(self.max_float_layers) is not int or self.max_float_layers < 0:
            raise ArgumentError(
                f"max_float_layers is {self.max_float_layers}.",
                "give a whole number, 0 (rank only) or more.",
            )
        if self.confirm is not None and (type(self.confirm) is not int or self.confirm < 0):
            raise ArgumentError(
                f"confirm is {self.confirm}.", "give the number of layers to measure, 0 or more."
            )
        if self.max_float_share is not None and not 0 <= self.max_float_share <= 1:
            raise ArgumentError(
                f"max_float_share is {self.max_float_share}.", "give a share, 0 to 1."
            )
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ArgumentError(
                f"budget is {self.budget} seconds.", "give more than 0, or leave it out."
            )
        ends_search = ("target_sqnr", "target_metric", "target_drop", "max_float_share")
        given = [name for name in ends_search if getattr(self, name) is not None]
        if given and not self.max_float_layers:
            raise ArgumentError(
                f"{given[0]} is given, but max_float_layers is 0: no layer may be left in float.",
                "give max_float_layers as well, the most that may be.",
            )

    def _check_costs(self) -> None:
        if self.gpu is not None and self.profile is not None:
            raise ArgumentError(
                "both gpu and profile are given.",
                "give one: the times of a profile need no roofline.",
            )
        if self.gpu is not None:
            find_gpu(self.gpu)
        if self.profile is not None:
            read_profile(Path(self.profile))
