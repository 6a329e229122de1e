"""Search for the units that go to float: rank all units, then choose one after another until a limit is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from qdq.analyze.cost import LayerCost, SwitchCost, count_exclusive_macs
from qdq.analyze.gradients import has_gradients
from qdq.analyze.options import Options
from qdq.analyze.probe import Probe, Value
from qdq.analyze.result import Analysis, LayerSensitivity, MixedPoint, Step
from qdq.analyze.screen import estimate_sqnr, screen_units
from qdq.analyze.sensitivity import (
    SQNR,
    ErrorSums,
    draw_sums,
    reduce_sums,
    share_noise,
    split_sqnr,
)
from qdq.metrics import combine_db
from qdq.plan import Plan
from qdq.quantizer import disable_quantization, disable_until_exit
from qdq.units import Unit

_CONFIDENCE = (2.5, 97.5)  # percentiles
_RANKING = 0.75  # fraction of a budget, if a search follows
_NANOSECOND = 1e-3  # in microseconds: the price of a unit that is not slower in float


class Search:
    """Ranks the units and chooses among them.

    Args:
        model: The model, with the layers that are pinned to float switched off.
        probe: Measures the model.
        units: The units to rank.
        options: How to rank and choose.
        costs: Cost of each layer, and of the model under ""; empty if nothing multiplies.
        times: Times of each layer; empty if no option needs them.
        pinned: Layer -> "int8" or "float", already decided.
        start: When the budget began (`time.monotonic`).
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        units: list[Unit],
        options: Options,
        costs: dict[str, LayerCost],
        times: dict[str, SwitchCost],
        pinned: dict[str, str],
        start: float,
    ) -> None:
        self._model = model
        self._probe = probe
        self._units = {unit.name: unit for unit in units}
        self._options = options
        self._num_measured = options.limit_measured(len(units), has_gradients=has_gradients(model))
        self._costs = _UnitCosts(units, costs, times, pinned)
        self._metric = probe.metric
        self._sign = probe.metric.sign
        self._points: dict[tuple[str, ...], Value] = {}
        self._float_metric: float | None = None
        self._pinned = pinned
        self._start = start
        self._unmeasured: list[str] = []
        self._factors: list[float] = []  # of the noise of each output, see `share_noise`
        self._float_limit = options.limit_float_share(self._costs.find_float_fraction([]))
        self._kept: dict[str, str] = {}  # unit -> why the search left it in int8

    def run(self, undo: ExitStack, earlier_plan: Plan | None) -> Analysis:
        """Rank the units, then choose.

        Args:
            undo: Switches the chosen units on again when it is closed.
            earlier_plan: The plan that the pinned layers come from.
        """
        budget = math.inf if self._options.budget is None else self._options.budget
        fraction = _RANKING if self._options.max_float_layers else 1.0
        self._probe.deadline = self._start + budget * fraction
        self._probe.prepare()
        ranking = self._rank()

        self._probe.deadline = self._start + budget
        ranked_names = {unit.name for unit in ranking.layers}
        self._unmeasured = [name for name in self._units if name not in ranked_names]
        if self._options.target_drop is not None:
            self._float_metric = self._probe.measure_float()
        steps, stopped_by = self._choose(ranking, undo)
        return Analysis(
            mode=self._options.mode,
            images=self._probe.images,
            sqnr_db=ranking.int8.sqnr,
            outputs=ranking.int8.outputs,
            metric=self._metric_of(ranking.int8),
            layers=tuple(ranking.layers),
            steps=tuple(steps),
            stopped_by=stopped_by,
            metric_name=self._metric.name,
            pinned=self._pinned,
            pareto=self._find_front() if self._costs.has_times else (),
            full_evaluations=self._probe.replay.reason,
            earlier=earlier_plan,
            unmeasured=tuple(self._layers_of(self._unmeasured)),
            macs=self._costs.total,
            float_share=self._costs.find_float_fraction([]),
            kept=self._kept,
        )

    # Ranking

    def _rank(self) -> _Ranking:
        """Measure the model in int8 and the units alone, and sort the units."""
        int8 = self._probe.measure([], {}, may_cut=True)[None]
        self._factors = share_noise(self._metric.outputs, int8.rows, self._probe.weights)
        energies = self._screen(self._units) if self._is_screened(self._units) else {}
        by_energy = sorted(self._units, key=lambda name: -energies.get(name, 0.0))
        alone = self._measure_alone(set(by_energy[: self._num_measured]))

        int8 = self._probe.cut(int8)  # there may have been no time for some batches

        unswitched = alone.pop(None, int8)
        reference = unswitched if self._options.is_alone else int8
        units = {str(name): value for name, value in alone.items()}
        if self._options.mode == "leave-one-out":
            for name, value in units.items():
                self._points[(name,)] = value
        self._points[()] = int8

        is_descending = not self._options.is_alone
        measured = self._describe_measured(units, int8, reference)
        measured.sort(key=self._sensitivity_order, reverse=is_descending)

        estimated = []
        for name, energy in energies.items():
            if name not in units:
                estimated.append(self._describe_estimated(name, int8, energy))
        estimated.sort(key=lambda unit: unit.sqnr_db, reverse=is_descending)
        return _Ranking(int8, units, measured + estimated)

    def _sensitivity_order(self, unit: LayerSensitivity) -> tuple[float, float]:
        return self._sign * (unit.metric or 0.0), unit.sqnr_db

    def _is_screened(self, names: Collection[str]) -> bool:
        """Whether only some units are measured, so that an estimate has to select them."""
        return self._num_measured is not None and self._num_measured < len(names)

    def _screen(self, names: Iterable[str]) -> dict[str, float]:
        """Estimate the energies of the errors of some units.

        Args:
            names: The units.

        Returns:
            Unit -> energy, from `screen_units`.
        """
        probe = self._probe
        return screen_units(
            self._model,
            probe.batches,
            probe.references,
            [self._units[name] for name in names],
            self._options.mode,
            lambda: probe.is_over,
            self._metric.view,
            self._factors,
        )

    def _measure_alone(self, names: set[str]) -> dict[str | None, Value]:
        """Measure each of some units alone ("one-at-a-time"), or the model without each of them ("leave-one-out").

        Args:
            names: The units.

        Returns:
            Unit -> measurement; None -> the model with no unit switched.
        """
        variants = {}
        for name, unit in self._units.items():
            if name in names:
                variants[name] = unit.quantizers
        if not variants:
            return {}

        state: list[str] = []
        surroundings: AbstractContextManager[Any] = nullcontext()
        if self._options.is_alone:
            state = ["float"]
            surroundings = disable_quantization(self._model)
        with surroundings:
            return self._probe.measure(state, variants, may_cut=True)

    def _describe_measured(
        self, units: dict[str, Value], int8: Value, reference: Value
    ) -> list[LayerSensitivity]:
        """Results of the units that were measured.

        Args:
            units: Measurement of each unit.
            int8: The model with all units in int8.
            reference: The model in float ("one-at-a-time"), or the model in int8.
        """
        energies = self._energies_of(int8)
        sum_of_errors = np.zeros(energies.shape[:-1])  # of all units measured alone
        for value in units.values():
            sum_of_errors = sum_of_errors + self._energies_of(value)[..., 1]
        noise = np.stack([*np.moveaxis(energies, -1, 0), sum_of_errors], -1)

        results = []
        for name, value in units.items():
            gain = self._measure_gain(value, reference, noise)
            results.append(
                LayerSensitivity(
                    name=name,
                    sqnr_db=value.sqnr,
                    outputs=value.outputs,
                    metric=self._metric_of(value),
                    gain=gain.value,
                    gain_low=gain.low,
                    gain_high=gain.high,
                    layers=self._units[name].layers,
                    macs=self._costs.count_macs(name),
                    cost=self._costs.find_cost(name),
                )
            )
        return results

    def _describe_estimated(self, name: str, int8: Value, energy: float) -> LayerSensitivity:
        """Result of a unit that was only screened.

        Args:
            name: The unit.
            int8: The model with all units in int8.
            energy: The estimate of `screen_units`.
        """
        return LayerSensitivity(
            name=name,
            sqnr_db=estimate_sqnr(
                self._options.mode, self._energies_of(int8).sum(0), energy, self._factors
            ),
            metric=None,
            is_exact=False,
            layers=self._units[name].layers,
            macs=self._costs.count_macs(name),
            cost=self._costs.find_cost(name),
        )

    def _measure_gain(self, value: Value, reference: Value, noise: ErrorSums) -> _Gain:
        """The gain of a unit, with its interval.

        Args:
            value: The unit alone, or the model without it.
            reference: As for `_describe_measured`.
            noise: As for `_estimate_gain`, of each sample.
        """
        if self._options.is_alone and self._metric.is_sqnr:
            error = self._energies_of(value)[..., 1]
            estimate = partial(_estimate_gain, weights=self._probe.weights)
            return _bootstrap(estimate, noise, error)
        worse, better = (value, reference) if self._options.is_alone else (reference, value)
        if self._metric.function is not None:
            return _Gain(self._sign * (better.metric - worse.metric))
        return _bootstrap(self._measure_rise, worse.rows, better.rows)

    def _measure_rise(self, worse: ErrorSums, better: ErrorSums) -> ErrorSums:
        """Difference of the metric between two states, positive if the second is better.

        Args:
            worse: Sums in the first state, `[..., columns]`.
            better: Sums in the second state, `[..., columns]`.
        """
        reduce = partial(reduce_sums, self._metric.outputs, weights=self._probe.weights)
        with np.errstate(invalid="ignore"):
            rise = self._sign * (reduce(better) - reduce(worse))
        return np.nan_to_num(rise, posinf=np.inf)

    def _energies_of(self, value: Value) -> ErrorSums:
        """Energies of signal and noise of each sample and output, `[N, outputs, 2]`."""
        return split_sqnr(self._metric.outputs, value.rows)

    # Choice

    def _choose(self, ranking: _Ranking, undo: ExitStack) -> tuple[list[Step], str]:
        """Leave units in float one by one.

        Args:
            ranking: All units.
            undo: As for `run`.

        Returns:
            The steps, and the reason why the search ended.
        """
        steps: list[Step] = []
        current = ranking.int8
        refused: set[str] = set()
        while True:
            chosen = [step.layer for step in steps]
            candidates = self._find_candidates(ranking, chosen, refused)

            reason = self._reason_to_stop(current, chosen, candidates, refused)
            if reason:
                return steps, reason

            values = self._measure_candidates(ranking, chosen, candidates)
            if not values:
                return steps, self._budget_reason
            for name, value in values.items():
                self._points[(*chosen, name)] = value

            best = self._find_best(values, current)
            if self._quality(values[best]) <= self._quality(current):
                refused.update(values)
                self._note_refusals(values, current)
                continue

            current = values[best]
            disable_until_exit(self._units[best].quantizers, undo)
            steps.append(
                Step(
                    layer=best,
                    sqnr_db=current.sqnr,
                    outputs=current.outputs,
                    metric=self._metric_of(current),
                    layers=self._units[best].layers,
                    cost=self._costs.find_total([*chosen, best]),
                    float_share=self._costs.find_float_fraction([*chosen, best]),
                )
            )

    def _note_refusals(self, values: dict[str, Value], current: Value) -> None:
        """Note that units were tried in float without a gain.

        Args:
            values: Unit -> the model with this unit in float as well.
            current: The model without it.
        """
        for name, value in values.items():
            self._kept[name] = (
                f"tried in float: {self._metric.name} {current.metric:.4g} -> {value.metric:.4g}, no better"
            )

    def _find_candidates(
        self, ranking: _Ranking, chosen: list[str], refused: set[str]
    ) -> list[str]:
        """Units that may still go to float, most sensitive first.

        Args:
            ranking: All units.
            chosen: The units in float.
            refused: Units that did not improve the outputs.
        """
        excluded = {*chosen, *refused}
        limit = self._options.max_float_layers
        candidates = []
        for unit in ranking.layers:
            names = [*chosen, unit.name]
            if unit.name in excluded or len(self._layers_of(names)) > limit:
                continue
            fraction = self._costs.find_float_fraction(names)
            if fraction <= self._float_limit:
                candidates.append(unit.name)
            else:
                self._kept[unit.name] = (
                    f"with it {fraction:.1%} of the MACs would be in float, above the limit of "
                    f"{self._float_limit:.1%} (max_float_share)"
                )
        return candidates

    def _reason_to_stop(
        self, current: Value, chosen: list[str], candidates: list[str], refused: set[str]
    ) -> str:
        """The reason why the search ends in this state, "" if it goes on.

        Args:
            current: The model in this state.
            chosen: The units in float.
            candidates: The units that may still go to float.
            refused: Units that did not improve the outputs.
        """
        reason = self._reason_of_target(current) or self._reason_of_fraction(chosen)
        if reason:
            return reason
        if refused and (not candidates or self._options.mode == "leave-one-out"):
            return "no further layer improves the outputs"

        count = len(self._layers_of(chosen))
        limit = self._options.max_float_layers
        summary = f"{count} of at most {limit} layers are in float"
        if count >= limit:
            return summary
        if self._probe.is_over:
            return self._budget_reason
        if candidates:
            return ""
        if self._unmeasured:
            return self._budget_reason
        if not self._units:
            return f"{summary}; all layers are pinned"
        too_large = [name for name in self._kept if name not in refused]
        if too_large:
            name = too_large[0]
            word = self._units[name].quantizers[0].format.name
            return f"{summary}; {name} stays in {word}: {self._kept[name]}"
        return f"{summary}; no further layer may go to float"

    def _reason_of_fraction(self, chosen: list[str]) -> str:
        """The limit on float MACs if no further unit fits below it, else ""."""
        limit = self._options.max_float_share
        if limit is None or not self._options.max_float_layers:
            return ""
        fraction = self._costs.find_float_fraction(chosen)
        if fraction <= limit:
            return ""
        return f"{fraction:.3g} of the multiplications are in float already, the limit is {limit:g}"

    @property
    def _budget_reason(self) -> str:
        return f"the budget of {self._options.budget or 0:g} s is used up"

    def _reason_of_target(self, current: Value) -> str:
        """The target that is reached, or ""."""
        options = self._options
        if options.target_sqnr is not None and current.sqnr >= options.target_sqnr:
            return f"SQNR {current.sqnr:.2f} dB reaches the target of {options.target_sqnr:g} dB"

        target = options.target_metric
        if target is not None and self._sign * (current.metric - target) >= 0:
            return f"metric {current.metric:g} reaches the target of {target:g}"

        if options.target_drop is not None and self._float_metric is not None:
            drop = self._sign * (self._float_metric - current.metric)
            if drop <= options.target_drop:
                return (
                    f"{self._metric.name} is {drop:g} worse than the float model's, "
                    f"within the target of {options.target_drop:g}"
                )
        return ""

    def _measure_candidates(
        self, ranking: _Ranking, chosen: list[str], candidates: list[str]
    ) -> dict[str, Value]:
        """The candidates that are tried next, each in float besides the chosen units.

        Args:
            ranking: All units.
            chosen: The units in float.
            candidates: The units that may go to float next.

        Returns:
            Candidate -> measurement; empty if the time is up.
        """
        if self._options.is_alone:
            return self._measure_next(ranking, chosen, candidates)
        if not chosen:
            # The ranking has measured the model without each of them.
            values = {name: ranking.alone[name] for name in candidates if name in ranking.alone}
            if values:
                return values
        return self._measure_most_promising(chosen, candidates)

    def _measure_next(
        self, ranking: _Ranking, chosen: list[str], candidates: list[str]
    ) -> dict[str, Value]:
        """Measure the first candidate of the ranking, or with times the one with the largest gain per microsecond.

        Args:
            ranking: All units.
            chosen: The units in float.
            candidates: The units that may go to float next, most sensitive first.
        """
        name = candidates[0]
        if self._costs.has_times:
            gains = {unit.name: unit.gain or 0.0 for unit in ranking.layers}
            name = max(candidates, key=lambda unit: gains[unit] / self._costs.find_price(unit))

        with ExitStack() as trial:
            disable_until_exit(self._units[name].quantizers, trial)
            values = self._probe.measure([*chosen, name], {})
        if not values:
            return {}
        return {name: values[None]}

    def _measure_most_promising(self, chosen: list[str], candidates: list[str]) -> dict[str, Value]:
        """Measure all candidates, or those that a new estimate puts first.

        Args:
            chosen: The units in float.
            candidates: The units that may go to float next.
        """
        names = candidates
        if self._num_measured is not None and self._is_screened(names):
            energies = self._screen(names)
            by_energy = sorted(names, key=lambda name: -energies[name])
            names = by_energy[: max(self._num_measured, 1)]

        variants = {name: self._units[name].quantizers for name in names}
        values = self._probe.measure(chosen, variants)
        values.pop(None, None)  # the model as it is now
        return {str(name): value for name, value in values.items()}

    def _find_best(self, values: dict[str, Value], current: Value) -> str:
        """The candidate with the best quality; if times are known, the largest gain per microsecond.

        Args:
            values: Candidate -> measurement.
            current: The model without a further unit in float.
        """

        def rate(name: str) -> tuple[float, ...]:
            quality = self._quality(values[name])
            if not self._costs.has_times:
                return quality
            gain = quality[0] - self._quality(current)[0]
            if gain > 0:
                gain = gain / self._costs.find_price(name)
            return (gain, *quality)

        return max(values, key=rate)

    def _find_front(self) -> tuple[MixedPoint, ...]:
        """The Pareto front of all sets that were measured."""

        def cheapest_then_best(names: tuple[str, ...]) -> tuple[float, float, float]:
            metric, sqnr = self._quality(self._points[names])
            return self._costs.find_total(names) or 0.0, -metric, -sqnr

        front: list[MixedPoint] = []
        best = (-math.inf, -math.inf)
        for names in sorted(self._points, key=cheapest_then_best):
            value = self._points[names]
            if self._quality(value) > best:
                best = self._quality(value)
                cost = self._costs.find_total(names) or 0.0
                front.append(MixedPoint(names, cost, value.sqnr, self._metric_of(value)))
        return tuple(front)

    def _quality(self, value: Value) -> tuple[float, float]:
        """Sort key of a measurement: the metric with higher as better, then the SQNR."""
        return self._sign * value.metric, value.sqnr

    def _metric_of(self, value: Value) -> float | None:
        """The metric as results show it: None if it is SQNR."""
        return None if self._metric.is_sqnr else value.metric

    def _layers_of(self, names: Iterable[str]) -> list[str]:
        """The layers of some units."""
        layers: list[str] = []
        for name in names:
            layers += self._units[name].layers
        return layers


@dataclass(frozen=True)
class _Ranking:
    """The units, measured.

    Args:
        int8: The model with all units in int8.
        alone: Unit -> the model with only this unit switched.
        layers: All units that were measured or estimated, most sensitive first.
    """

    int8: Value
    alone: dict[str, Value]
    layers: list[LayerSensitivity]


@dataclass(frozen=True)
class _Gain:
    """The gain of a unit and its bootstrap interval, which does not exist for a function or a single row."""

    value: float
    low: float | None = None
    high: float | None = None


class _UnitCosts:
    """What units cost in int8 and in float.

    Args:
        units: The units to rank.
        costs: As for `Search`.
        times: As for `Search`.
        pinned: As for `Search`.
    """

    def __init__(
        self,
        units: list[Unit],
        costs: dict[str, LayerCost],
        times: dict[str, SwitchCost],
        pinned: dict[str, str],
    ) -> None:
        self._layers = {unit.name: unit.layers for unit in units}
        self.total = costs[""].macs if costs else 0
        """MACs of the whole model on one batch."""
        layers = [layer for unit in units for layer in unit.layers]
        self._macs = count_exclusive_macs(costs, [*layers, *pinned])
        self._times = times
        self.has_times = bool(times)
        """Whether the times of layers are known."""
        self._int8_macs = 0  # with no unit in float
        int8_times: list[float] = []
        for unit in units:
            self._int8_macs += self._sum_macs(unit.layers)
            int8_times += [times[layer].int8 for layer in unit.layers if layer in times]
        self._int8_time = sum(int8_times)
        pinned_to_int8 = [name for name, precision in pinned.items() if precision != "float"]
        self._int8_macs += self._sum_macs(pinned_to_int8)

    def count_macs(self, name: str) -> int:
        """MACs of a unit."""
        return self._sum_macs(self._layers[name])

    def find_cost(self, name: str) -> float | None:
        """Extra time of a unit in float compared with int8, in microseconds; None without times."""
        if not self._times:
            return None
        differences = []
        for layer in self._layers[name]:
            if layer in self._times:
                time = self._times[layer]
                differences.append(time.float16 - time.int8)
        return sum(differences)

    def find_price(self, name: str) -> float:
        """The cost of a unit as a positive divisor."""
        return max(self.find_cost(name) or 0.0, _NANOSECOND)

    def find_total(self, float_units: Sequence[str]) -> float | None:
        """Time of all units in microseconds with some of them in float; None without times."""
        if not self._times:
            return None
        extra = sum(self.find_cost(name) or 0.0 for name in float_units)
        return self._int8_time + extra

    def find_float_fraction(self, float_units: Sequence[str]) -> float:
        """Fraction of all MACs in float, counting pinned and never quantized layers.

        Args:
            float_units: The units in float.
        """
        int8_macs = self._int8_macs
        for name in float_units:
            int8_macs -= self._sum_macs(self._layers[name])
        return (self.total - int8_macs) / max(self.total, 1)

    def _sum_macs(self, layers: Iterable[str]) -> int:
        """MACs of some layers; a layer without a product has none."""
        return sum(self._macs.get(layer, 0) for layer in layers)


def _bootstrap(
    gain: Callable[[ErrorSums, ErrorSums], ErrorSums], first: ErrorSums, second: ErrorSums
) -> _Gain:
    """A gain and its 95 % bootstrap interval over samples.

    Args:
        gain: Computes the gain from two sums over samples.
        first: Rows of the first sum.
        second: Rows of the second sum.
    """
    value = float(gain(first.sum(0), second.sum(0)))
    if len(first) < 2:
        return _Gain(value)
    drawn = gain(_draw(first), _draw(second))
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return _Gain(value, value, value)
    low, high = np.percentile(finite, _CONFIDENCE)
    return _Gain(value, float(low), float(high))


def _draw(rows: ErrorSums) -> ErrorSums:
    """`draw_sums` of rows with any number of axes, `[N, ...]` -> `[draws, ...]`."""
    drawn = draw_sums(rows.reshape(len(rows), -1))
    return drawn.reshape(len(drawn), *rows.shape[1:])


def _estimate_gain(
    noise: ErrorSums, error: ErrorSums, weights: Sequence[float] | None = None
) -> ErrorSums:
    """Rise of the SQNR in dB when one of many independent errors is removed.

    Args:
        noise: Of each output: energy of the signal, energy of the error with all units in int8, and sum of the energies
            of all units alone, `[..., outputs, 3]`.
        error: Energy of the error of the one unit, `[..., outputs]`.
        weights: Weight of each output; None: the worst counts.
    """
    signal, total = noise[..., 0], noise[..., 1:].max(-1)
    with np.errstate(divide="ignore"):
        gain: ErrorSums = -10 * np.log10(1 - error / np.where(total > 0, total, 1.0))
        if gain.shape[-1] == 1:
            return gain[..., 0] + 0.0  # turns -0.0 into 0.0
        decibels = SQNR.reduce(np.stack([signal, total], -1))
    with np.errstate(invalid="ignore"):
        rise = combine_db(decibels + gain, weights) - combine_db(decibels, weights)
    return np.nan_to_num(rise, posinf=np.inf)
