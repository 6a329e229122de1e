"""Which units go to float: all are ranked, then chosen one by one until something ends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext

import numpy as np
from torch import nn

from qdq.analyze.cost import LayerCost, SwitchCost
from qdq.analyze.options import Options
from qdq.analyze.probe import Probe, Value
from qdq.analyze.result import Analysis, LayerSensitivity, MixedPoint, Step
from qdq.analyze.screen import estimate_sqnr, screen_units
from qdq.analyze.sensitivity import ErrorSums, draw_sums
from qdq.plan import Plan
from qdq.quantizer import disable_quantization, disable_until_exit
from qdq.units import Unit

_CONFIDENCE = (2.5, 97.5)  # percentiles
_RANKING = 0.75  # of a budget, where a search follows


class Search:
    """Ranks the units and chooses among them.

    Args:
        model: The model, with what is pinned to float switched off.
        probe: Measures it.
        units: What is to be ranked.
        options: How.
        costs: Of each layer, and of the model under ""; empty where nobody asks.
        times: Of each layer; empty where nobody asks.
        pinned: Layer -> "int8" or "float", decided already.
        began: When the budget began (`time.monotonic`).
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
        began: float,
    ) -> None:
        self._model = model
        self._probe = probe
        self._units = {unit.name: unit for unit in units}
        self._options = options
        self._costs = costs
        self._times = times
        self._metric = probe.metric
        self._sign = 1 if probe.metric.higher_is_better else -1
        self._points: dict[tuple[str, ...], Value] = {}
        self._float_metric: float | None = None
        self._pinned = pinned
        self._began = began
        int8_layers = [layer for unit in units for layer in unit.layers]
        self._int8_time = sum(times[layer].int8 for layer in int8_layers if layer in times)
        int8_layers += [name for name, precision in pinned.items() if precision == "int8"]
        self._int8_macs = self._sum_macs(int8_layers)  # with no unit in float
        self._unmeasured: list[str] = []
        self._errors: ErrorSums = np.zeros(
            0
        )  # of each sample, the sum over all units that were measured alone

    def run(self, undo: ExitStack, earlier: Plan | None) -> Analysis:
        """Rank, then choose; what is switched off is undone by `undo`."""
        budget = math.inf if self._options.budget is None else self._options.budget
        self._probe.deadline = self._began + budget * (
            _RANKING if self._options.max_float_layers else 1.0
        )
        self._probe.prepare()
        base, alone, ranked = self._rank()
        self._probe.deadline = self._began + budget
        measured = {unit.name for unit in ranked}
        self._unmeasured = [name for name in self._units if name not in measured]
        if self._options.target_drop is not None:
            self._float_metric = self._probe.measure_float()
        steps, stopped_by = self._choose(base, alone, ranked, undo)
        return Analysis(
            mode=self._options.mode,
            images=self._probe.images,
            sqnr_db=base.sqnr,
            metric=self._shown(base),
            layers=tuple(ranked),
            steps=tuple(steps),
            stopped_by=stopped_by,
            metric_name=self._metric.name,
            pinned=self._pinned,
            pareto=self._front() if self._times else (),
            full_evaluations=self._probe.replay.reason,
            earlier=earlier,
            unmeasured=tuple(
                layer for name in self._unmeasured for layer in self._units[name].layers
            ),
        )

    def _rank(self) -> tuple[Value, dict[str, Value], list[LayerSensitivity]]:
        """The model in int8, each measured unit alone, and all of which something is known, most sensitive first."""
        is_alone = self._options.mode == "one-at-a-time"
        base = self._probe.measure([], {}, may_cut=True)[None]
        is_screened = self._options.confirm is not None and self._options.confirm < len(self._units)
        energies = self._screen(self._units) if is_screened else {}
        names = sorted(self._units, key=lambda name: -energies.get(name, 0.0))[
            : self._options.confirm
        ]
        to_measure = set(names)
        variants = {
            name: unit.quantizers for name, unit in self._units.items() if name in to_measure
        }
        with disable_quantization(self._model) if is_alone else nullcontext():
            values = (
                self._probe.measure(["float"] if is_alone else [], variants, may_cut=True)
                if variants
                else {}
            )
        base = self._probe.cut(base)
        reference = values.pop(None, base)
        alone = {str(name): value for name, value in values.items()}
        if not is_alone:
            self._points |= {(name,): value for name, value in alone.items()}
        self._points[()] = base
        self._errors = sum((value.rows[:, 1] for value in alone.values()), np.zeros(len(base.rows)))
        exact = [self._describe(name, value, base, reference) for name, value in alone.items()]
        exact.sort(
            key=lambda each: (self._sign * (each.metric or 0.0), each.sqnr_db), reverse=not is_alone
        )
        rest = [self._guess(name, base, energies[name]) for name in energies if name not in alone]
        rest.sort(key=lambda each: each.sqnr_db, reverse=not is_alone)
        return base, alone, exact + rest

    def _screen(self, names: Iterable[str]) -> dict[str, float]:
        probe = self._probe
        return screen_units(
            self._model,
            probe.batches,
            probe.references,
            [self._units[name] for name in names],
            self._options.mode,
            lambda: probe.is_over,
        )

    def _measure_most_promising(self, chosen: list[str], names: list[str]) -> dict[str, Value]:
        """Units without which the model as it is now is measured: all, or those that a new estimate puts first."""
        if self._options.confirm is not None and self._options.confirm < len(names):
            energies = self._screen(names)
            names = sorted(names, key=lambda name: -energies[name])[: max(self._options.confirm, 1)]
        values = self._probe.measure(chosen, {name: self._units[name].quantizers for name in names})
        return {str(name): value for name, value in values.items() if name is not None}

    def _guess(self, name: str, base: Value, energy: float) -> LayerSensitivity:
        sqnr = estimate_sqnr(self._options.mode, base.rows, energy)
        return LayerSensitivity(
            name,
            sqnr,
            None,
            is_exact=False,
            layers=self._units[name].layers,
            macs=self._macs(name),
            cost=self._cost(name),
        )

    def _describe(self, name: str, value: Value, base: Value, reference: Value) -> LayerSensitivity:
        gain, low, high = self._gain(value, base, reference)
        return LayerSensitivity(
            name,
            value.sqnr,
            self._shown(value),
            gain,
            low,
            high,
            layers=self._units[name].layers,
            macs=self._macs(name),
            cost=self._cost(name),
        )

    def _gain(
        self, value: Value, base: Value, reference: Value
    ) -> tuple[float, float | None, float | None]:
        """What a unit gains, with its interval."""
        is_alone = self._options.mode == "one-at-a-time"
        if self._metric.function is not None:
            worse, better = (value, reference) if is_alone else (base, value)
            return self._sign * (better.metric - worse.metric), None, None
        if not (is_alone and self._metric.is_sqnr):
            worse, better = (value, reference) if is_alone else (base, value)
            return self._interval(self._rise, worse.rows, better.rows)
        return self._interval(
            _estimate_gain, np.column_stack([base.rows[:, 1], self._errors]), value.rows[:, 1:2]
        )

    def _interval(
        self,
        gain: Callable[[ErrorSums, ErrorSums], ErrorSums],
        first: ErrorSums,
        second: ErrorSums,
    ) -> tuple[float, float | None, float | None]:
        """A gain from two sums over samples, and its ends over draws of the samples."""
        kind = float(gain(first.sum(0), second.sum(0)))
        if len(first) < 2:
            return kind, None, None
        drawn = gain(draw_sums(first), draw_sums(second))
        finite = drawn[np.isfinite(drawn)]
        low, high = np.percentile(finite, _CONFIDENCE) if len(finite) else (kind, kind)
        return kind, float(low), float(high)

    def _rise(self, worse: ErrorSums, better: ErrorSums) -> ErrorSums:
        """How much better the metric of some sums is than of others."""
        columns = slice(0, 2) if self._metric.is_sqnr else slice(2, None)
        reduce = self._metric.outputs.reduce
        with np.errstate(invalid="ignore"):
            rise = self._sign * (reduce(better[..., columns]) - reduce(worse[..., columns]))
        return np.nan_to_num(rise, posinf=np.inf)

    def _choose(
        self, base: Value, alone: dict[str, Value], ranked: list[LayerSensitivity], undo: ExitStack
    ) -> tuple[list[Step], str]:
        """Leave units in float one by one until something ends it."""
        steps: list[Step] = []
        current = base
        refused: set[str] = set()
        while True:
            chosen = [step.layer for step in steps]
            pool = [entry.name for entry in ranked if entry.name not in {*chosen, *refused}]
            pool = [name for name in pool if self._fits(chosen, name)]
            if reason := self._reason_to_stop(current, chosen, pool, refused):
                return steps, reason
            if self._options.mode == "leave-one-out":
                values = {name: alone[name] for name in pool if name in alone and not chosen}
                values = values or self._measure_most_promising(chosen, pool)
            else:
                values = self._measure_next(chosen, pool, ranked)
            if not values:
                return steps, self._used_up
            self._points |= {(*chosen, name): value for name, value in values.items()}
            best = max(values, key=lambda name: self._worth(name, values[name], current))
            if self._order(values[best]) <= self._order(current):
                refused.update(values)
                continue
            disable_until_exit(self._units[best].quantizers, undo)
            current = values[best]
            layers, cost = self._units[best].layers, self._total_cost([*chosen, best])
            steps.append(Step(best, current.sqnr, self._shown(current), layers, cost))

    def _measure_next(
        self, chosen: list[str], pool: list[str], ranked: list[LayerSensitivity]
    ) -> dict[str, Value]:
        """The first unit of the ranking, with times the one with the largest gain for each microsecond."""
        gains = {entry.name: entry.gain or 0.0 for entry in ranked}
        best = (
            max(pool, key=lambda name: gains[name] / self._price(name)) if self._times else pool[0]
        )
        with ExitStack() as trial:
            disable_until_exit(self._units[best].quantizers, trial)
            values = self._probe.measure([*chosen, best], {})
        return {best: values[None]} if values else {}

    def _reason_to_stop(
        self, current: Value, chosen: list[str], pool: list[str], refused: set[str]
    ) -> str:
        if reason := self._reached(current):
            return reason
        count, limit = (
            sum(len(self._units[name].layers) for name in chosen),
            self._options.max_float_layers,
        )
        share = self._options.max_float_share
        if limit and share is not None and self._float_share(chosen) > share:
            return f"{self._float_share(chosen):.3g} of the multiplications are in float already, at most {share:g}"
        if refused and (not pool or self._options.mode == "leave-one-out"):
            return "no further layer improves the outputs"
        if count < limit and (self._probe.is_over or (self._unmeasured and not pool)):
            return self._used_up
        if count >= limit or not pool:
            more = (
                ""
                if count >= limit
                else "; no other one fits"
                if self._units
                else "; all layers are pinned"
            )
            return f"{count} of at most {limit} layers are in float{more}"
        return ""

    @property
    def _used_up(self) -> str:
        return f"the budget of {self._options.budget or 0:g} s is used up"

    def _reached(self, current: Value) -> str:
        options, metric = self._options, current.metric
        if options.target_sqnr is not None and current.sqnr >= options.target_sqnr:
            return f"SQNR {current.sqnr:.2f} dB reaches the target of {options.target_sqnr:g} dB"
        if options.target_metric is not None and self._sign * (metric - options.target_metric) >= 0:
            return f"metric {metric:g} reaches the target of {options.target_metric:g}"
        if options.target_drop is not None and self._float_metric is not None:
            drop = self._sign * (self._float_metric - metric)
            if drop <= options.target_drop:
                return f"{self._metric.name} is {drop:g} worse than the float model's, at most {options.target_drop:g}"
        return ""

    def _fits(self, chosen: list[str], name: str) -> bool:
        """Whether one more unit stays within the numbers of layers and of multiplications."""
        names = [*chosen, name]
        if sum(len(self._units[each].layers) for each in names) > self._options.max_float_layers:
            return False
        return (
            self._options.max_float_share is None
            or self._float_share(names) <= self._options.max_float_share
        )

    def _float_share(self, chosen: Sequence[str]) -> float:
        """Share of all multiplications in float, of what was pinned or never quantized too."""
        total = self._costs[""].macs if self._costs else 0
        in_int8 = self._int8_macs - sum(self._macs(name) or 0 for name in chosen)
        return (total - in_int8) / max(total, 1)

    def _worth(self, name: str, value: Value, current: Value) -> tuple[float, ...]:
        """What orders candidates: gain, with times gain for each microsecond."""
        order = self._order(value)
        if not self._times:
            return order
        gain = order[0] - self._order(current)[0]
        return (gain / self._price(name) if gain > 0 else gain, *order)

    def _order(self, value: Value) -> tuple[float, float]:
        return self._sign * value.metric, value.sqnr

    def _shown(self, value: Value) -> float | None:
        return None if self._metric.is_sqnr else value.metric

    def _price(self, name: str) -> float:
        return max(self._cost(name) or 0.0, 1e-3)  # a nanosecond, for what costs nothing

    def _macs(self, name: str) -> int | None:
        return self._sum_macs(self._units[name].layers) if self._costs else None

    def _sum_macs(self, layers: Iterable[str]) -> int:
        return sum(self._costs[layer].macs for layer in layers if layer in self._costs)

    def _cost(self, name: str) -> float | None:
        found = [self._times[layer] for layer in self._units[name].layers if layer in self._times]
        return sum(time.float16 - time.int8 for time in found) if self._times else None

    def _total_cost(self, chosen: Sequence[str]) -> float | None:
        extra = sum(self._cost(name) or 0.0 for name in chosen)
        return self._int8_time + extra if self._times else None

    def _front(self) -> tuple[MixedPoint, ...]:
        """The Pareto front of all sets that were measured."""
        points = [
            (self._total_cost(names) or 0.0, names, value) for names, value in self._points.items()
        ]
        points.sort(key=lambda point: (point[0], [-part for part in self._order(point[2])]))
        front: list[MixedPoint] = []
        best = (-math.inf, -math.inf)
        for cost, names, value in points:
            if self._order(value) > best:
                best = self._order(value)
                front.append(MixedPoint(names, cost, value.sqnr, self._shown(value)))
        return tuple(front)


def _estimate_gain(noise: ErrorSums, error: ErrorSums) -> ErrorSums:
    """What SQNR rises in dB without one of many independent errors.

    Args:
        noise: Energy of the error of all in int8, and the sum of the energies of each one's, `[..., 2]`.
        error: Energy of the error of the one, `[..., 1]`.
    """
    total = noise.max(-1)
    with np.errstate(divide="ignore"):
        gain: ErrorSums = -10 * np.log10(1 - error[..., 0] / np.where(total > 0, total, 1.0))
    return gain + 0.0  # no minus before 0
