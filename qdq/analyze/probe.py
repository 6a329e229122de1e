"""Measurements of the model in one state after another, against its float outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qdq.analyze.journal import Journal
from qdq.analyze.options import ChosenMetric
from qdq.analyze.ranks import Ranks
from qdq.analyze.replay import Replay
from qdq.analyze.sensitivity import (
    ErrorSums,
    collect,
    collect_on_device,
    count_columns,
    count_rows,
    list_decibels,
    reduce_rows,
)
from qdq.batch import count_samples, floats_of, tensors_of
from qdq.device import find_device, move_batch
from qdq.errors import DataError, StateError
from qdq.forward import call_model, evaluating
from qdq.quantizer import TensorQuantizer, disable_quantization, toggling

# Outputs on a GPU stay there, up to this many bytes of the float model, and this many measurements until they are read.
_REFERENCE_BYTES = 2**28
_MOST_UNREAD = 32
# Outputs of one model on two machines differ by less than this, relative to their energies.
_MACHINE_TOLERANCE = 1e-3

Variants = Mapping[str, Sequence[TensorQuantizer]]


@dataclass(frozen=True)
class Value:
    """A measurement of the model in one state.

    Args:
        parts: Error sums of each sample, one array per batch.
        sqnr: SQNR in dB, of the worst output or weighted.
        metric: The chosen metric; SQNR if that is the metric.
        outputs: SQNR in dB of each output, if there are several.
    """

    parts: tuple[ErrorSums, ...]
    sqnr: float
    metric: float
    outputs: Mapping[str, float]

    @property
    def rows(self) -> ErrorSums:
        """Error sums of each sample."""
        return np.concatenate(self.parts)


class _UnreadSums:
    """Error sums of one batch in several states, on the device of the outputs until they are read.

    Args:
        metric: The metric to measure.
        batch: The batch.
        reference: Outputs of the float model on it.
    """

    def __init__(self, metric: ChosenMetric, batch: Any, reference: Any) -> None:
        self._metric = metric
        self._batch = batch
        self._reference = reference
        self._sums: dict[str | None, torch.Tensor] = {}

    @property
    def should_be_read(self) -> bool:
        """Whether reading costs nothing, because the sums are on the CPU, or there are many of them."""
        is_on_cpu = any(rows.device.type == "cpu" for rows in self._sums.values())
        return is_on_cpu or len(self._sums) >= _MOST_UNREAD

    def add(self, name: str | None, outputs: Any) -> None:
        """Measure outputs.

        Args:
            name: The state of the model.
            outputs: Its outputs.
        """
        tensors = floats_of(outputs)
        if tensors:
            self._reference = move_batch(self._reference, tensors[0].device)
        metric = self._metric
        self._sums[name] = collect_on_device(
            metric.outputs, self._batch, self._reference, outputs, metric.view
        )

    def read(self) -> dict[str | None, ErrorSums]:
        """What has been added since the last call, in one transfer.

        Raises:
            StateError: It contains NaN.
        """
        if not self._sums:
            return {}
        rows = torch.stack(list(self._sums.values())).cpu().numpy()
        if np.isnan(rows).any():
            raise StateError(
                "the outputs of the model contain NaN.",
                "check the float model on the same batches: its outputs must be finite.",
            )
        results: dict[str | None, ErrorSums] = dict(zip(self._sums, rows, strict=True))
        self._sums.clear()
        return results


class _TimeIsUpError(Exception):
    """The time is up; ends the evaluation of a batch and is caught in this module."""


class Probe:
    """Measures the model against its float outputs, unchanged and with units switched.

    Args:
        model: The model.
        batches: The data.
        metric: The metric to measure.
        journal: Measurements of earlier runs.
        ranks: The processes that share the work.
        replay: Computes the outputs.
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
        """Only a first evaluation may begin after this time (`time.monotonic`)."""
        self.batches = batches
        self.references: list[Any] = []
        self.outputs: list[str] = []
        """Names of the outputs that are measured."""
        self.weights: list[float] | None = None
        """Their weights; None if the worst decides."""
        self._model = model
        self._journal = journal
        self._ranks = ranks
        self._until = math.inf

    @property
    def images(self) -> int:
        """Samples in the batches that are used."""
        return sum(map(count_samples, self.batches))

    @property
    def is_over(self) -> bool:
        """Whether the time is up, for any process."""
        return self._is_past(self.deadline)

    def prepare(self) -> None:
        """Compute the float outputs, and drop the measurements of the journal if they belong to another model."""
        num_bytes = 0
        for batch in self.batches:
            if self.references and self.is_over:
                break

            with disable_quantization(self._model), evaluating(self._model):
                outputs = call_model(self._model, batch)
            num_bytes += sum(tensor.nbytes for tensor in tensors_of(outputs))
            if num_bytes > _REFERENCE_BYTES:
                outputs = move_batch(outputs, torch.device("cpu"))
            self._require_outputs(outputs)
            self.references.append(outputs)
        self.weights = self.metric.view.weigh(self.outputs)
        self._limit_batches(len(self.references))
        if self._ranks.any(self._differs_from_journal()):
            self._journal.forget()

    def _require_outputs(self, outputs: Any) -> None:
        """Learn the names of the outputs from those of the first batch, and require them of the others.

        Raises:
            DataError: A batch has other outputs.
            StateError: There is nothing to measure.
        """
        names = list(self.metric.view.select_floats(outputs))
        if not names:
            raise StateError(
                "the model returns no floating-point tensor.",
                "have it return the scores before argmax or a similar function.",
            )
        if self.references and names != self.outputs:
            raise DataError(
                f"the model returns {names} for a batch, and {self.outputs} for the first one.",
                "give batches for which it returns the same outputs, or select those with outputs=.",
            )
        self.outputs = names

    def measure(
        self, state: list[str], variants: Variants, *, may_cut: bool = False
    ) -> dict[str | None, Value]:
        """Measure the model as it is (None) and with the quantizers of each variant switched, on the same batches.

        Args:
            state: Names of what is in float now; identifies the state of the model.
            variants: Name -> quantizers.
            may_cut: Whether to use fewer batches when the time is up. From then on only batches on which everything was
                measured are used. If there are none, the first batch is used, with the variants that were measured on
                it. Without `may_cut` the result is empty when the time is up.
        """
        # A function is called after the batches, and needs time as well.
        self._until = self.deadline
        if self.metric.function:
            self._until = (time.monotonic() + self.deadline) / 2
        parts = self._measure_batches(state, variants, may_cut=may_cut)
        self._until = self.deadline
        metrics = self._measure_metrics(state, variants, parts)
        if len(metrics) < len(parts) and not may_cut:
            return {}
        return {name: self._reduce(parts[name], metric) for name, metric in metrics.items()}

    def measure_float(self) -> float:
        """The chosen metric of the float model."""
        if self.metric.function is not None:
            with disable_quantization(self._model):
                return self._call_metric(["float"], {})[None]
        rows = []
        for batch, reference in zip(self.batches, self.references, strict=True):
            metric_rows = collect(
                self.metric.outputs, batch, reference, reference, self.metric.view
            )
            rows.append(metric_rows)
        _, metric = reduce_rows(self.metric.outputs, np.concatenate(rows), self.weights)
        return metric

    def cut(self, value: Value) -> Value:
        """A measurement restricted to the batches that are still used."""
        parts = value.parts[: len(self.batches)]
        return self._reduce(parts, value.metric if self.metric.function else None)

    def _measure_batches(
        self, state: list[str], variants: Variants, *, may_cut: bool
    ) -> dict[str | None, tuple[ErrorSums, ...]]:
        """Measure error sums of each state on each batch, by name; arguments as for `measure`."""
        count = 1 + len(variants)
        measured: list[dict[str | None, ErrorSums]] = []  # of each batch
        is_complete = True
        total = count * len(self.batches)
        with tqdm(total=total, desc="analyze", unit="forward", disable=None) as progress:
            for index in range(len(self.batches)):
                results: dict[str | None, ErrorSums] = {}
                if index == 0 or not self._is_past(self._until):
                    results = self._measure_batch(index, state, variants, progress)
                is_complete = len(results) == count
                if is_complete or index == 0:
                    measured.append(results)
                if not is_complete:
                    break

        if not is_complete:
            if not may_cut:
                return {}
            self._limit_batches(len(measured))
        return {name: tuple(rows[name] for rows in measured) for name in measured[0]}

    def _measure_batch(
        self, index: int, state: list[str], variants: Variants, progress: Any
    ) -> dict[str | None, ErrorSums]:
        """Error sums of each state on one batch, incomplete when the time is up; arguments as for `measure`."""
        names: list[str | None] = [None, *variants]
        results: dict[str | None, ErrorSums] = {}
        for name in names:
            recorded = self._recall([state, name, index])
            if recorded is not None:
                results[name] = recorded
        progress.update(len(results))

        missing = [name for name in names if name not in results]
        fresh = self._measure_missing(index, state, variants, self._ranks.share(missing), progress)
        for name, rows in self._ranks.merge(missing, fresh).items():
            self._journal.learn([state, name, index], rows.tolist())
            results[name] = rows
        return {name: results[name] for name in names if name in results}

    def _measure_missing(
        self,
        index: int,
        state: list[str],
        variants: Variants,
        assigned: Sequence[str | None],
        progress: Any,
    ) -> dict[str | None, ErrorSums]:
        """Error sums that the journal does not have, incomplete when the time is up.

        Args:
            index: The batch.
            state: As for `measure`.
            variants: As for `measure`.
            assigned: Names of what this process measures.
            progress: Counts the measurements.
        """
        results: dict[str | None, ErrorSums] = {}
        if not assigned:
            return results
        batch = move_batch(self.batches[index], find_device(self._model))
        unread = _UnreadSums(self.metric, batch, self.references[index])

        def read() -> None:
            for name, rows in unread.read().items():
                results[name] = rows
                self._journal.add([state, name, index], rows.tolist())
                progress.update()

        def store(name: str | None, outputs: Any) -> None:
            if name in assigned:
                unread.add(name, outputs)
                if unread.should_be_read:
                    read()
            if time.monotonic() >= self._until:
                raise _TimeIsUpError

        selected = {name: variants[name] for name in assigned if name is not None}
        with suppress(_TimeIsUpError):
            self.replay.evaluate(batch, selected, store)
        read()
        return results

    def _measure_metrics(
        self,
        state: list[str],
        variants: Variants,
        parts: Mapping[str | None, tuple[ErrorSums, ...]],
    ) -> Mapping[str | None, float | None]:
        """The chosen metric in each state that has error sums, if it is a function of the model.

        Args:
            state: As for `measure`.
            variants: As for `measure`.
            parts: The error sums of each state.

        Returns:
            Name -> value; None if the metric is a measure of the outputs.
        """
        if not parts or not self.metric.function:
            return dict.fromkeys(parts)
        measured = {name: variants[name] for name in parts if name is not None}
        return self._call_metric(state, measured)

    def _call_metric(self, state: list[str], variants: Variants) -> dict[str | None, float]:
        """Values of the function in each state.

        Some are missing when the time is up, but never the value of the unchanged model.

        Args:
            state: As for `measure`.
            variants: As for `measure`.
        """
        names: list[str | None] = [None, *variants]
        values: dict[str | None, float] = {}
        for name in names:
            recorded = self._recall_metric([state, name, "metric"])
            if recorded is not None:
                values[name] = recorded

        missing = [name for name in names if name not in values]
        fresh: dict[str | None, ErrorSums] = {}
        for name in tqdm(self._ranks.share(missing), desc="metric", unit="call", disable=None):
            if name is not None and time.monotonic() >= self._until:
                break
            with toggling(variants[name] if name is not None else ()):
                value = self._call_function()
            self._journal.add([state, name, "metric"], value)
            fresh[name] = np.asarray(value)

        for name, array in self._ranks.merge(missing, fresh).items():
            values[name] = float(array)
            self._journal.learn([state, name, "metric"], values[name])
        return {name: values[name] for name in names if name in values}

    def _call_function(self) -> float:
        """The value of the function for the model in its current state.

        Raises:
            StateError: It does not return a number.
        """
        assert self.metric.function is not None  # noqa: S101
        with evaluating(self._model):
            value = self.metric.function(self._model)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if math.isnan(number):
            raise StateError(
                f"the metric {self.metric.name} returns {str(value)[:60]}.",
                "have it return a number.",
            )
        return number

    def _reduce(self, parts: tuple[ErrorSums, ...], function_value: float | None) -> Value:
        """A measurement from its error sums.

        Args:
            parts: One array per batch.
            function_value: The metric, if it is a function of the model.
        """
        rows = np.concatenate(parts)
        sqnr, metric = reduce_rows(self.metric.outputs, rows, self.weights)
        if function_value is not None:
            metric = function_value
        outputs: dict[str, float] = {}
        if len(self.outputs) > 1:
            decibels = list_decibels(self.metric.outputs, rows.sum(0))
            outputs = dict(zip(self.outputs, map(float, decibels), strict=True))
        return Value(parts, sqnr, metric, outputs)

    def _recall(self, key: list[Any]) -> ErrorSums | None:
        """Error sums in the journal.

        Args:
            key: State, variant and number of the batch.

        Returns:
            None if there are none, or if the entry does not fit this metric.
        """
        try:
            rows = np.asarray(self._journal.get(key), np.float64)
        except (TypeError, ValueError, OverflowError):
            return None

        index = key[-1]
        shape = (
            count_rows(self.batches[index], self.references[index], self.metric.view),
            count_columns(self.metric.outputs, len(self.outputs)),
        )
        if rows.shape != shape or np.isnan(rows).any():
            return None
        return rows

    def _recall_metric(self, key: list[Any]) -> float | None:
        """A value of the function in the journal.

        Args:
            key: State, variant and "metric".

        Returns:
            None if there is none, or if the entry is not a number.
        """
        value = self._journal.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return None
        return float(value)

    def _differs_from_journal(self) -> bool:
        """Whether the outputs differ from the journal's: a fingerprint cannot cover all that they depend on."""
        recorded = self._recall([[], None, 0])
        if recorded is not None:
            batch = self.batches[0]
            unread = _UnreadSums(self.metric, batch, self.references[0])
            with evaluating(self._model):
                unread.add(None, call_model(self._model, batch))
            sums = unread.read()[None].sum(0)
            if not np.allclose(sums, recorded.sum(0), rtol=_MACHINE_TOLERANCE, atol=0):
                return True

        if self._has_other_metric([]):
            return True
        with disable_quantization(self._model):
            return self._has_other_metric(["float"])

    def _has_other_metric(self, state: list[str]) -> bool:
        """Whether the journal has a different value of the function in this state."""
        recorded = self._recall_metric([state, None, "metric"])
        if recorded is None:
            return False
        return not math.isclose(self._call_function(), recorded, rel_tol=_MACHINE_TOLERANCE)

    def _limit_batches(self, count: int) -> None:
        self.batches = self.batches[:count]
        self.references = self.references[:count]

    def _is_past(self, moment: float) -> bool:
        return moment < math.inf and self._ranks.any(time.monotonic() >= moment)
