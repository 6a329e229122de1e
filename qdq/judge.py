"""The worth of every step, measured on samples that no step was fitted to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any

from torch import nn

from qdq.forward import require_model
from qdq.metrics import (
    agreement,
    count_rows,
    decide_db,
    has_classes,
    list_batches,
    name_arrays,
    pair_arrays,
    sqnr_db,
)
from qdq.outputs import Mask, OutputView, Selection
from qdq.predictor import predict
from qdq.text import printable


@dataclass(frozen=True)
class JudgedStep:
    """The model after one step.

    Args:
        name: What was done.
        sqnr_db: SQNR of the outputs against the float model, in dB; of several outputs, that of the worst, or of their
            weighted noise.
        agreement: Fraction of samples with the same largest output as the float model, 0 to 1; None if the output is
            not `[N, classes]`, or if there are several.
        outputs: Name of each output -> its SQNR in dB, if there are several.
        is_undone: Whether the step was taken back, because it was not worth it.
    """

    name: str
    sqnr_db: float
    agreement: float | None
    outputs: Mapping[str, float] = field(default_factory=dict)
    is_undone: bool = False


@dataclass(frozen=True)
class JudgedSteps:
    """What every step was worth.

    Args:
        description: The samples that the steps were judged on.
        images: Their number.
        steps: In the order in which they were done.
        notes: What was left out and why, and what was done after the last measurement.
    """

    description: str
    images: int
    steps: tuple[JudgedStep, ...]
    notes: tuple[str, ...] = ()

    def format_table(self) -> str:
        """A line for each step with what it changed."""
        names = [step.name for step in self.steps]
        for step in self.steps:
            names += [f"  {printable(output)}" for output in step.outputs]
        title = f"on {self.images} held-out samples"
        width = max(len(title), *map(len, names))
        lines = [f"{title:{width}}  SQNR dB   change  agreement"]
        former = None
        for step in self.steps:
            lines.append(_format_step(step, former, width))
            for output, decibels in step.outputs.items():
                lines.append(f"{f'  {printable(output)}':{width}}  {decibels:7.2f}")
            if not step.is_undone:
                former = step
        lines.append(f"held out: {printable(self.description)}")
        lines += map(printable, self.notes)
        return "\n".join(lines)


def _format_step(step: JudgedStep, former: JudgedStep | None, width: int) -> str:
    """A line of the table.

    Args:
        step: The step.
        former: The last step before it that was not undone; None before the first.
        width: Of the first column.
    """
    change = ""
    if former is not None and isfinite(step.sqnr_db - former.sqnr_db):
        change = f"{step.sqnr_db - former.sqnr_db:+.2f}"
    share = "-" if step.agreement is None else f"{step.agreement:.1%}"
    line = f"{step.name:{width}}  {step.sqnr_db:7.2f}  {change:>7}  {share:>9}"
    return f"{line}  undone" if step.is_undone else line


class Judge:
    """Measures a model after every step against the float model, on samples that no step sees.

    Args:
        model: The float model, which is run here; it may be changed afterwards.
        samples: Batches as for `qdq.predict`, with `description`; give samples that no step is fitted to.
        outputs: Parts of the outputs that count, as for `qdq.predict`.
        mask: What leaves padding out, as for `qdq.predict`.
        weights: Weight of each output where one figure decides; None: the worst decides.

    Raises:
        ArgumentError: `weights` names another output.
        ArgumentTypeError: What is no module.
        DataError: There is no batch, or the model does not run on one.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Iterable[Any],
        *,
        outputs: Selection | None = None,
        mask: Mask | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        require_model(model)
        self._samples = samples
        self._run = partial(predict, batches=samples, outputs=outputs, mask=mask)
        self._expected = self._run(model)
        self._weights = OutputView(outputs, mask, weights).weigh(self.outputs)
        self._steps: list[JudgedStep] = []

    def measure(self, name: str, model: nn.Module) -> JudgedStep:
        """Measure the model after a step, and remember the step.

        Args:
            name: What was done, for the table.
            model: The model.

        Returns:
            The step.
        """
        actual = self._run(model)
        pairs = pair_arrays(self._expected, actual)
        decibels = {output: sqnr_db(*pair) for output, pair in pairs.items()}
        share = None
        if len(pairs) == 1:
            (pair,) = pairs.values()
            share = agreement(*pair) if has_classes(pair[0]) else None
        step = JudgedStep(
            name=name,
            sqnr_db=decide_db(decibels, self._weights),
            agreement=share,
            outputs=decibels if len(decibels) > 1 else {},
        )
        self._steps.append(step)
        return step

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that are compared."""
        return list(pair_arrays(self._expected, self._expected))

    @property
    def steps(self) -> tuple[JudgedStep, ...]:
        """The steps that were measured so far."""
        return tuple(self._steps)

    def copy(self) -> Judge:
        """A judge with the same float outputs and the steps so far, to go on from there in another way."""
        judge = copy.copy(self)
        judge._steps = list(self._steps)
        return judge

    def resume(self, steps: Sequence[JudgedStep]) -> None:
        """Take the steps of an earlier call over, in place of those that were measured."""
        self._steps = list(steps)

    def mark_undone(self) -> None:
        """The last step was taken back."""
        last = self._steps[-1]
        self._steps[-1] = replace(last, is_undone=True)

    def conclude(self, notes: Sequence[str] = ()) -> JudgedSteps:
        """The table of all steps.

        Args:
            notes: What was left out and why, and what was done after the last measurement.
        """
        arrays = name_arrays(self._expected)
        first = next(iter(arrays.values()))
        description = str(getattr(self._samples, "description", "the samples that were given"))
        return JudgedSteps(description, count_rows(list_batches(first)), self.steps, tuple(notes))
