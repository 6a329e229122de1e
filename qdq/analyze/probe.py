"""The model measured in one state after another, against its float outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from qdq.analyze.journal import Journal
from qdq.analyze.options import ChosenMetric
from qdq.analyze.ranks import Ranks
from qdq.analyze.replay import Replay
from qdq.analyze.sensitivity import (
    ErrorSums,
    collect,
    count_columns,
    find_rows,
    reduce_rows,
)
from qdq.errors import StateError
from qdq.forward import call_model, evaluating
from qdq.quantizer import TensorQuantizer, disable_quantization, toggling
from qdq.samples import count_samples

_SAME = 1e-3  # outputs of one model on two machines differ by less, as shares of their energies


@dataclass(frozen=True)
class Value:
    """The model in one state.

    Args:
        parts: Error sums of each sample, one array a batch.
        sqnr: In dB.
        metric: The chosen metric; SQNR if that is the one.
    """

    parts: tuple[ErrorSums, ...]
    sqnr: float
    metric: float

    @property
    def rows(self) -> ErrorSums:
        """Error sums of each sample."""
        return np.concatenate(self.parts)


class _TimeIsUpError(Exception):
    """Ends a forward in many states. Never leaves this module."""


class Probe:
    """Measures the model against its float outputs, as it is and with units switched.

    Args:
        model: The model.
        batches: The data.
        metric: What is measured.
        journal: What has been measured already.
        ranks: Who shares the work.
        replay: How outputs are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        metric: ChosenMetric,
        journal: Journal,
        ranks: Ranks,
        replay: Replay,
    ) -> None:
        self.metric = metric
        self.replay = replay
        self.deadline = math.inf
        """Nothing but a first evaluation begins later than this (`time.monotonic`)."""
        self.batches = batches
        self.references: list[Any] = []
        self._model = model
        self._journal = journal
        self._ranks = ranks
        self._until = math.inf

    def prepare(self) -> None:
        """The float outputs; and what the journal knows is forgotten if it is not of this model."""
        for batch in self.batches:
            if self.references and self.is_over:
                break
            with disable_quantization(self._model), evaluating(self._model):
                self.references.append(call_model(self._model, batch))
        self._keep_only(len(self.references))
        if self._ranks.any(self._differs_from_journal()):
            self._journal.forget()

    def _differs_from_journal(self) -> bool:
        """Whether this model does not give what it gave then: some of what it depends on is in no fingerprint."""
        known = self._recall([[], None, 0])
        if known is not None:
            with evaluating(self._model):
                found = self._collect(0, call_model(self._model, self.batches[0])).sum(0)
            if not np.allclose(found, known.sum(0), rtol=_SAME, atol=0):
                return True
        if self._gives_another([]):
            return True
        with disable_quantization(self._model):
            return self._gives_another(["float"])

    def _gives_another(self, state: list[str]) -> bool:
        """Whether the function is known to have given something else in this state."""
        value = self._recall_metric([state, None, "metric"])
        return value is not None and not math.isclose(self._call(), value, rel_tol=_SAME)

    @property
    def images(self) -> int:
        """Samples in the batches that are used."""
        return sum(map(count_samples, self.batches))

    @property
    def is_over(self) -> bool:
        """Whether the time is, for any process."""
        return self._is_past(self.deadline)

    def _is_past(self, moment: float) -> bool:
        return moment < math.inf and self._ranks.any(time.monotonic() >= moment)

    def measure(
        self,
        state: list[str],
        variants: Mapping[str, Sequence[TensorQuantizer]],
        *,
        may_cut: bool = False,
    ) -> dict[str | None, Value]:
        """The model as it is (None), and with the quantizers of each variant switched; all on the same batches.

        Args:
            state: Names what the model is now.
            variants: Name -> quantizers.
            may_cut: What happens when the time is up: from now on only the batches are used on which all is measured,
                of the first one what is measured. Otherwise the result is empty.
        """
        names: list[str | None] = [None, *variants]
        parts: dict[str | None, list[ErrorSums]] = {name: [] for name in names}
        # A function is called after the batches, and needs time as well.
        self._until = (
            (time.monotonic() + self.deadline) / 2 if self.metric.function else self.deadline
        )
        with tqdm(
            total=len(names) * len(self.batches), desc="analyze", unit="forward", disable=None
        ) as progress:
            for index in range(len(self.batches)):
                is_late = index > 0 and self._is_past(self._until)
                found = {} if is_late else self._measure_batch(index, state, variants, progress)
                is_cut = len(found) < len(names)
                if is_cut and not may_cut:
                    return {}
                if not (is_cut and index):
                    for name, rows in found.items():
                        parts[name].append(rows)
                if is_cut:
                    self._keep_only(max(index, 1))
                    break
        self._until = self.deadline
        complete = {name: tuple(each) for name, each in parts.items() if each}
        metrics: Mapping[str | None, float | None] = dict.fromkeys(complete)
        if self.metric.function:
            metrics = self._call_metric(
                state, {name: variants[name] for name in complete if name is not None}
            )
        if len(metrics) < len(complete) and not may_cut:
            return {}
        return {
            name: self._reduce(each, metrics[name])
            for name, each in complete.items()
            if name in metrics
        }

    def cut(self, value: Value) -> Value:
        """A measurement, on the batches that are used now."""
        return self._reduce(
            value.parts[: len(self.batches)], value.metric if self.metric.function else None
        )

    def _reduce(self, parts: tuple[ErrorSums, ...], metric: float | None) -> Value:
        sqnr, own = reduce_rows(self.metric.outputs, np.concatenate(parts))
        return Value(parts, sqnr, own if metric is None else metric)

    def measure_float(self) -> float:
        """The chosen metric of the float model."""
        if self.metric.function is not None:
            with disable_quantization(self._model):
                return self._call_metric(["float"], {})[None]
        pairs = zip(self.batches, self.references, strict=True)
        rows = [
            collect(self.metric.outputs, batch, reference, reference) for batch, reference in pairs
        ]
        return reduce_rows(self.metric.outputs, np.concatenate(rows))[1]

    def _keep_only(self, count: int) -> None:
        self.batches, self.references = self.batches[:count], self.references[:count]

    def _collect(self, index: int, outputs: Any) -> ErrorSums:
        rows = collect(self.metric.outputs, self.batches[index], self.references[index], outputs)
        if np.isnan(rows).any():
            raise StateError(
                "the outputs of the model hold NaN.",
                "check the float model on the same batches: it must be finite.",
            )
        return rows

    def _recall(self, key: list[Any]) -> ErrorSums | None:
        """Error sums in the journal; None if there are none, or if what stands there is none of this metric."""
        try:
            rows = np.asarray(self._journal.get(key), np.float64)
        except (TypeError, ValueError, OverflowError):
            return None
        index = key[-1]
        shape = (
            find_rows(self.batches[index], self.references[index]),
            count_columns(self.metric.outputs),
        )
        return rows if rows.shape == shape and not np.isnan(rows).any() else None

    def _recall_metric(self, key: list[Any]) -> float | None:
        value = self._journal.get(key)
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        )
        return float(value) if is_number else None

    def _measure_batch(
        self,
        index: int,
        state: list[str],
        variants: Mapping[str, Sequence[TensorQuantizer]],
        progress: Any,
    ) -> dict[str | None, ErrorSums]:
        """Error sums of each state on one batch; some are missing when the time is up."""
        names: list[str | None] = [None, *variants]
        known = {
            name: rows for name in names if (rows := self._recall([state, name, index])) is not None
        }
        missing = [name for name in names if name not in known]
        mine = self._ranks.share(missing)
        fresh: dict[str | None, ErrorSums] = {}
        progress.update(len(known))

        def keep(name: str | None, outputs: Any) -> None:
            if name in mine:
                fresh[name] = self._collect(index, outputs)
                self._journal.add([state, name, index], fresh[name].tolist())
                progress.update()
            if time.monotonic() >= self._until:
                raise _TimeIsUpError

        if mine:
            wanted = {name: variants[name] for name in mine if name is not None}
            with suppress(_TimeIsUpError):
                self.replay.evaluate(self.batches[index], wanted, keep)
        for name, rows in self._ranks.merge(missing, fresh).items():
            self._journal.learn([state, name, index], rows.tolist())
            known[name] = rows
        return {name: known[name] for name in names if name in known}

    def _call_metric(
        self, state: list[str], variants: Mapping[str, Sequence[TensorQuantizer]]
    ) -> dict[str | None, float]:
        """What the function gives in each state; some are missing when the time is up, never the model as it is."""
        names: list[str | None] = [None, *variants]
        known = {name: self._recall_metric([state, name, "metric"]) for name in names}
        missing = [name for name in names if known[name] is None]
        fresh: dict[str | None, ErrorSums] = {}
        for name in tqdm(self._ranks.share(missing), desc="metric", unit="call", disable=None):
            if name is not None and time.monotonic() >= self._until:
                break
            with toggling(variants[name] if name is not None else ()):
                value = self._call()
            self._journal.add([state, name, "metric"], value)
            fresh[name] = np.asarray(value)
        for name, found in self._ranks.merge(missing, fresh).items():
            known[name] = float(found)
            self._journal.learn([state, name, "metric"], known[name])
        return {name: value for name, value in known.items() if value is not None}

    def _call(self) -> float:
        assert self.metric.function is not None  # noqa: S101
        with evaluating(self._model):
            value = self.metric.function(self._model)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if math.isnan(number):
            raise StateError(
                f"the metric {self.metric.name} gives {str(value)[:60]}.",
                "have it return a number.",
            )
        return number
