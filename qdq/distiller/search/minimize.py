"""Minimise a loss over numbers that keep their signs, with scipy; a run that was stopped goes on from its journal.

scipy searches exponents x: number = start * 2^(x - 1). So no number that it tries is zero or has another sign, a step
means the same for small and large numbers, and a number that is 0 stays 0.

Every measured loss is in the journal under its numbers. No method of scipy can be stopped and continued, but all of
them are deterministic: a second run asks for the same numbers, and takes from the journal what was measured.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.analyze.journal import Journal
from qdq.distiller.search.search_options import MinimizeOptions
from qdq.errors import DependencyError, StateError

Vector = npt.NDArray[np.float64]
"""Numbers, one axis."""

_ORIGIN = (
    1.0  # exponent of the start: Nelder-Mead begins with steps of 5 %, and with almost none from 0
)
_LARGEST_STEP = 16.0  # numbers from 1/65536 to 65536 times the start
_NO_LOSS = 1e30  # instead of NaN and Inf, which the line searches of scipy cannot compare


class Listener:
    """Is told about the search; this one does nothing."""

    def evaluated(self, count: int, loss: float, best_loss: float) -> None:
        """A loss was asked for.

        Args:
            count: How many so far.
            loss: This one.
            best_loss: The smallest so far.
        """

    def iterated(self, loss: float, best_loss: float) -> None:
        """An iteration of the method has ended.

        Args:
            loss: The loss at its end.
            best_loss: The smallest so far.
        """


class Objective:
    """A loss of numbers that remembers what was measured, and the best of it.

    Args:
        measure: The loss of numbers; the same for the same numbers.
        start: Numbers to start at; those that are 0 stay 0.
        journal: Where measured losses are and go.

    Raises:
        StateError: The loss of the start is not finite.
    """

    def __init__(self, measure: Callable[[Vector], float], start: Vector, journal: Journal) -> None:
        self._measure = measure
        self._start = start
        self._journal = journal
        self.is_free = start != 0
        self.evaluations = 0
        self.best = start
        self.start_loss = self.best_loss = self._recall(start)
        if self.start_loss >= _NO_LOSS:
            raise StateError(
                "the loss at the start of the search is NaN or Inf; expected a finite number.",
                "check the loss of the float model, then the scales of the quantized one.",
            )

    def __call__(self, exponents: Vector) -> float:
        """The loss.

        Args:
            exponents: One for each number that is not 0.
        """
        steps = np.clip(exponents - _ORIGIN, -_LARGEST_STEP, _LARGEST_STEP)
        numbers = self._start.copy()
        numbers[self.is_free] *= np.exp2(steps)
        loss = self._recall(numbers)
        if loss < self.best_loss:
            self.best, self.best_loss = numbers, loss
        return loss

    def _recall(self, numbers: Vector) -> float:
        """The loss of numbers, measured if the journal does not have it."""
        key = ["loss", *numbers.tolist()]
        loss = self._journal.get(key)
        if loss is None:
            loss = float(self._measure(numbers))
            if not math.isfinite(loss):
                loss = _NO_LOSS
            self._journal.add(key, loss)
        return float(loss)


class _LimitReached(Exception):  # noqa: N818  # no error
    """As many losses as allowed were asked for."""


@dataclass
class _Run:
    """What scipy calls: a loss that counts, and ends the search at the limit."""

    objective: Objective
    limit: int | None
    listener: Listener

    def __call__(self, exponents: Vector) -> float:
        objective = self.objective
        if self.limit is not None and objective.evaluations >= self.limit:
            raise _LimitReached
        loss = objective(exponents)
        objective.evaluations += 1
        self.listener.evaluated(objective.evaluations, loss, objective.best_loss)
        return loss

    def end_iteration(self, exponents: Vector) -> None:
        self._report(self.objective(exponents))

    def end_hop(self, _: Vector, loss: float, __: bool) -> None:
        self._report(loss)

    def _report(self, loss: float) -> None:
        self.listener.iterated(float(loss), self.objective.best_loss)


def minimize(
    objective: Objective, options: MinimizeOptions, listener: Listener | None = None
) -> None:
    """Search for the numbers with the smallest loss, which are `objective.best` then.

    Args:
        objective: The loss.
        options: How to search.
        listener: Is told about evaluations and iterations.

    Raises:
        DependencyError: scipy is not installed or too old.
    """
    optimize = load_scipy()
    start = np.full(int(objective.is_free.sum()), _ORIGIN)
    if not start.size:
        return
    run = _Run(objective, options.maxfev, listener or Listener())
    limits: dict[str, Any] = {}
    if options.maxiter is not None:
        limits["maxiter"] = options.maxiter
    method: dict[str, Any] = {"method": options.method, "options": limits}
    try:
        if options.basinhopping:
            optimize.basinhopping(
                run,
                start,
                niter=options.basinhopping_niter,
                minimizer_kwargs=method,
                callback=run.end_hop,
                rng=np.random.default_rng(options.seed),
            )
        else:
            optimize.minimize(run, start, callback=run.end_iteration, **method)
    except _LimitReached:
        return


def load_scipy() -> ModuleType:
    """The module `scipy.optimize`.

    Raises:
        DependencyError: scipy is not installed or too old.
    """
    fix = "pip install 'qdq[lapq]'"
    try:
        from scipy import optimize
    except ImportError as error:
        raise DependencyError("LAPQ searches with scipy, which is not installed.", fix) from error
    if "rng" not in inspect.signature(optimize.basinhopping).parameters:
        raise DependencyError("LAPQ needs scipy 1.15 or newer; an older one is installed.", fix)
    return optimize  # type: ignore[no-any-return]
