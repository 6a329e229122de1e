"""The arguments of `analyze_layers`: how layers are ranked and chosen. Invalid ones are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qdq.analyze.cost import read_profile
from qdq.analyze.sensitivity import METRICS, SQNR, OutputMetric
from qdq.errors import ArgumentError
from qdq.outputs import ALL_OUTPUTS, OutputView
from qdq.roofline import find_gpu

MODES = ("one-at-a-time", "leave-one-out")
Metric = Callable[[nn.Module], float]
_METRIC_TARGETS = ("target_metric", "target_drop")
_TARGETS = ("target_sqnr", *_METRIC_TARGETS)
DEFAULT_FLOAT_SHARE = 0.1
"""Fraction of the int8 MACs that a search moves to float at most, unless max_float_share says how much may be in float.

A fraction of all MACs would leave nothing in int8 where most of the work is in float anyway.
"""

SCREENED_FROM = 200
"""Units from which on only those are measured that an estimate puts first, unless `confirm` says how many.

The time of the exact analysis grows with the square of the units, that of the estimate with their number.
"""
_MEASURED_WHEN_SCREENED = 32


@dataclass(frozen=True)
class ChosenMetric:
    """The metric that ranks: a measure of the outputs, or a function of the model.

    Args:
        name: Name in tables and messages.
        higher_is_better: Its direction.
        outputs: The measure of the outputs; SQNR for a function, because SQNR is always measured.
        function: The function; None for a measure of the outputs.
        view: The outputs that are measured.
    """

    name: str
    higher_is_better: bool
    outputs: OutputMetric
    function: Metric | None = None
    view: OutputView = ALL_OUTPUTS

    @property
    def is_sqnr(self) -> bool:
        """Whether SQNR ranks the units."""
        return self.function is None and self.outputs is SQNR

    @property
    def sign(self) -> int:
        """1 if higher is better, -1 if lower is better."""
        return 1 if self.higher_is_better else -1


@dataclass(frozen=True)
class Options:
    """Options of `analyze_layers` other than model, data and patterns; see there.

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
    view: OutputView = ALL_OUTPUTS

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(
                f"mode is {self.mode!r}; expected one of {', '.join(MODES)}.",
                "use 'one-at-a-time'.",
            )
        self._check_targets()
        self._check_limits()
        self._check_ends_of_search()
        self._check_costs()

    @property
    def is_alone(self) -> bool:
        """Whether each unit is measured alone in int8 ("one-at-a-time")."""
        return self.mode == "one-at-a-time"

    def limit_float_share(self, initial: float) -> float:
        """Upper limit on the fraction of all MACs in float, 0 to 1.

        Args:
            initial: The fraction that is in float before the search.
        """
        if self.max_float_share is not None:
            return self.max_float_share
        return initial + DEFAULT_FLOAT_SHARE * (1 - initial)

    def limit_measured(self, num_units: int, *, has_gradients: bool) -> int | None:
        """How many units are measured exactly; None for all of them.

        Args:
            num_units: The units to rank.
            has_gradients: Whether the estimate, which needs them, is possible.
        """
        if self.confirm is not None:
            return self.confirm
        if num_units < SCREENED_FROM or not has_gradients:
            return None
        return max(_MEASURED_WHEN_SCREENED, 2 * self.max_float_layers)

    @property
    def chosen_metric(self) -> ChosenMetric:
        """The metric that ranks: SQNR by default.

        Raises:
            ArgumentError: An unknown name, or a direction that contradicts the metric.
        """
        if callable(self.metric):
            name = getattr(self.metric, "__qualname__", type(self.metric).__qualname__)
            is_higher_better = self.higher_is_better is not False
            return ChosenMetric(name, is_higher_better, SQNR, self.metric, self.view)

        measure = METRICS.get("sqnr" if self.metric is None else self.metric)
        if measure is None:
            raise ArgumentError(
                f"metric is {self.metric!r}; expected one of {', '.join(METRICS)}.",
                "use one of these, or pass a function of the model.",
            )

        if self.higher_is_better not in (None, measure.higher_is_better):
            raise ArgumentError(
                f"higher_is_better is {self.higher_is_better} for {measure.name}, "
                f"which has {measure.higher_is_better}.",
                "leave it out: it is needed only for a function.",
            )
        return ChosenMetric(measure.name, measure.higher_is_better, measure, view=self.view)

    def _check_targets(self) -> None:
        """Refuse targets without their metric, and targets that no number can reach."""
        if self.chosen_metric.is_sqnr:
            self._check_metric_is_given()
        for name in _TARGETS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ArgumentError(f"{name} is {value}.", "give a finite number.")

        if self.target_drop is not None and self.target_drop < 0:
            raise ArgumentError(
                f"target_drop is {self.target_drop}.",
                "give the largest allowed drop, 0 or more.",
            )

    def _check_metric_is_given(self) -> None:
        """Refuse targets for a metric if SQNR ranks, because SQNR has its own target."""
        for name in _METRIC_TARGETS:
            if getattr(self, name) is not None:
                raise ArgumentError(
                    f"{name} is given, but no metric.",
                    "choose a metric as well, or use target_sqnr.",
                )

    def _check_limits(self) -> None:
        """Refuse limits that are out of range."""
        if not _is_count(self.max_float_layers):
            raise ArgumentError(
                f"max_float_layers is {self.max_float_layers}.",
                "give a whole number, 0 (rank only) or more.",
            )

        if self.confirm is not None and not _is_count(self.confirm):
            raise ArgumentError(
                f"confirm is {self.confirm}.",
                "give the number of layers to measure, 0 or more.",
            )

        if self.max_float_share is not None and not 0 <= self.max_float_share <= 1:
            raise ArgumentError(
                f"max_float_share is {self.max_float_share}.",
                "give a fraction, 0 to 1.",
            )

        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ArgumentError(
                f"budget is {self.budget} seconds.",
                "give more than 0, or leave it out.",
            )

    def _check_ends_of_search(self) -> None:
        """Refuse options that end a search if there is no search."""
        if self.max_float_layers:
            return
        for name in (*_TARGETS, "max_float_share"):
            if getattr(self, name) is not None:
                raise ArgumentError(
                    f"{name} is given, but max_float_layers is 0: no layer may be left in float.",
                    "give max_float_layers as well, the largest number of float layers.",
                )

    def _check_costs(self) -> None:
        """Refuse an unknown GPU, a file that is not a profile, or both options together."""
        if self.gpu is not None and self.profile is not None:
            raise ArgumentError(
                "both gpu and profile are given.",
                "give one: the times of a profile replace the roofline of a GPU.",
            )

        if self.gpu is not None:
            find_gpu(self.gpu)
        if self.profile is not None:
            read_profile(Path(self.profile))


def _is_count(value: int) -> bool:
    """Whether a value is a whole number of 0 or more; bool is not, although it is an int."""
    return type(value) is int and value >= 0
