"""Sensitivity of every layer, and which ones to leave in float.

Every unit, a layer or a group of them, is measured in one of two modes; then units go to float until a target is met.

- "one-at-a-time": only this unit in int8, all others in float. The SQNR is that of its own error, and errors of
  different layers add up, so the ranking holds for sets of layers too.
- "leave-one-out": only this unit in float, all others in int8. What one more float layer would gain right now; after
  every step the others are measured anew.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from qdq.analyze.cost import (
    LayerCost,
    SwitchCost,
    count_costs,
    estimate_times,
    find_gpu,
    load_times,
    read_profile,
)
from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.analyze.replay import CACHE_BYTES, Replay, flipped
from qdq.analyze.screen import estimate_sqnr, screen_units
from qdq.analyze.sensitivity import (
    METRICS,
    SQNR,
    OutputMetric,
    Statistics,
    collect,
    count_columns,
    count_rows,
    draw_sums,
    find_rows,
    reduce_rows,
    require_labels,
)
from qdq.calibrate.collect import bytes_of
from qdq.errors import ArgumentError, DataError, StateError
from qdq.patterns import Pattern
from qdq.plan import PRECISIONS, Plan, PlanEntry
from qdq.quantizer import TensorQuantizer, disable_quantization, named_quantizers
from qdq.run import write_json
from qdq.trace import call_model, evaluating, require_batches, trace_forward
from qdq.units import Unit, find_units, group_units, match_precisions

MODES = ("one-at-a-time", "leave-one-out")
Metric = Callable[[nn.Module], float]
_CONFIDENCE = (2.5, 97.5)  # percentiles
_RANKING = 0.75  # of a budget, where a search follows
_PLAIN = (bool, int, float, complex, str, torch.dtype)  # arguments that print the same in every process
_SAME = 1e-3  # outputs of one model on two machines differ by less, as shares of their energies


@dataclass(frozen=True)
class LayerSensitivity:
    """One unit measured alone.

    Args:
        name: Dotted name of the layer, or name of the group.
        sqnr_db: SQNR of the model's outputs against the float model's, in dB, with only this unit in int8
            ("one-at-a-time": low is sensitive) or only this unit in float ("leave-one-out": high is sensitive).
        metric: The chosen metric in the same state, None if that is SQNR.
        gain: How much the metric (SQNR if there is none) improves when this unit alone goes from int8 to float;
            positive is better, whatever its direction. "leave-one-out": measured. "one-at-a-time": estimated from what
            the unit alone takes from the float model, as if the errors of all units were independent: for SQNR
            -10 log10(1 - e / E) dB, with e the energy of its error and E that of all units in int8, but no less than
            the sum of all e. Infinite for the one unit that makes all of the error.
        gain_low: Lower end of the 95 % bootstrap interval of the gain over samples; None where there is none.
        gain_high: Its upper end.
        is_exact: Whether it was measured; otherwise the screen estimated it.
        layers: The layers and calls in it.
        macs: Its multiplications with an addition on one batch; None if costs were not asked for.
        cost: What it costs more in float than in int8, in microseconds; None without `gpu` and `profile`.
    """

    name: str
    sqnr_db: float
    metric: float | None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    is_exact: bool = True
    layers: tuple[str, ...] = ()
    macs: int | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Step:
    """One step of leaving units in float.

    Args:
        layer: The unit that joined the float ones in this step.
        sqnr_db: SQNR with all units up to this one in float, in dB.
        metric: The chosen metric in the same state, None if that is SQNR.
        layers: The layers and calls in it.
        cost: Time of all that could run in int8, in microseconds; None without `gpu` and `profile`.
    """

    layer: str
    sqnr_db: float
    metric: float | None
    layers: tuple[str, ...] = ()
    cost: float | None = None


@dataclass(frozen=True)
class MixedPoint:
    """A set of float layers that was measured, and what it costs.

    Args:
        float_layers: The units in float.
        cost: Time of all that could run in int8, in microseconds.
        sqnr_db: SQNR, in dB.
        metric: The chosen metric, None if that is SQNR.
    """

    float_layers: tuple[str, ...]
    cost: float
    sqnr_db: float
    metric: float | None


@dataclass(frozen=True)
class Analysis:
    """Result of `analyze_layers`.

    Args:
        mode: "one-at-a-time" or "leave-one-out".
        images: How many samples every figure is of: fewer than were given where the budget ended the ranking.
        sqnr_db: SQNR with every unit quantized, in dB.
        metric: The chosen metric with every unit quantized, None if that is SQNR.
        layers: Every unit, most sensitive first.
        steps: What was left in float, in order; disabled in the model now.
        stopped_by: Why the search ended.
        metric_name: "sqnr", "cosine", "kl", "top1", or the name of the function.
        pinned: Layer -> "int8" or "float", as it was given.
        pareto: The sets that were measured and that no other one beats in cost and quality, cheapest first; empty
            without `gpu` and `profile`.
        full_evaluations: Why layers were evaluated in full; "" if they were replayed.
        earlier: The plan that `pinned` came from; None if it came from none.
        unmeasured: Layers that the budget left no time for. They stay in int8; nothing is known of them.
    """

    mode: str
    images: int
    sqnr_db: float
    metric: float | None
    layers: tuple[LayerSensitivity, ...]
    steps: tuple[Step, ...]
    stopped_by: str
    metric_name: str = "sqnr"
    pinned: Mapping[str, str] = field(default_factory=dict)
    pareto: tuple[MixedPoint, ...] = ()
    full_evaluations: str = ""
    earlier: Plan | None = None
    unmeasured: tuple[str, ...] = ()

    @property
    def float_layers(self) -> list[str]:
        """The layers left in float."""
        pinned = [name for name, precision in self.pinned.items() if precision == "float"]
        return pinned + [name for step in self.steps for name in step.layers or (step.layer,)]

    @property
    def plan(self) -> Plan:
        """The decision, for `save_plan`; what is pinned keeps the gain and the reason of the plan it came from."""
        steps = self._explain_steps()
        earlier = self.earlier or Plan()
        entries = {name: earlier.pin(name, precision, self.metric_name) for name, precision in self.pinned.items()}
        for rank, unit in enumerate(self.layers, 1):
            how = "measured" if unit.is_exact else "estimated"
            reason = f"{steps.get(unit.name, '')}{self.mode}: rank {rank} of {len(self.layers)}, {how}"
            precision = "float" if unit.name in steps else "int8"
            for name in unit.layers:
                entries[name] = PlanEntry(precision, reason, unit.gain)
        entries.update({name: PlanEntry("int8", "not measured: the budget was used up") for name in self.unmeasured})
        return Plan(entries, self.metric_name)

    def _explain_steps(self) -> dict[str, str]:
        """Unit -> what was measured when it joined the float ones: not its gain, which is of this unit alone."""
        texts, before = {}, self.metric if self.metric is not None else self.sqnr_db
        for number, step in enumerate(self.steps, 1):
            after = step.metric if step.metric is not None else step.sqnr_db
            texts[step.layer] = f"step {number} of the search: {self.metric_name} {before:.4g} -> {after:.4g}; "
            before = after
        return texts

    def format_table(self, rows: int = 8) -> str:
        """The most sensitive units and the steps taken, as text."""
        alone = "only this in int8" if self.mode == "one-at-a-time" else "only this in float"
        names = [layer.name for layer in self.layers[:rows]] + [f"+ {step.layer} in float" for step in self.steps]
        is_pinned = "float" in self.pinned.values()
        everything = "pinned ones in float, others in int8" if is_pinned else "all layers in int8"
        width = max(len(name) for name in [*names, everything])
        lines = [
            f"{self.mode} on {self.images} images",
            f"{alone:{width}}   SQNR dB" + ("" if self.metric is None else f"    {self.metric_name}"),
            *(_row(layer.name, width, layer.sqnr_db, layer.metric) for layer in self.layers[:rows]),
        ]
        if len(self.layers) > rows:
            lines.append(f"... and {len(self.layers) - rows} less sensitive ones")
        if self.unmeasured:
            lines.append(f"not measured, the budget was used up: {', '.join(self.unmeasured)}")
        lines.append(_row(everything, width, self.sqnr_db, self.metric))
        lines += [_row(f"+ {step.layer} in float", width, step.sqnr_db, step.metric) for step in self.steps]
        lines.append(f"stopped: {self.stopped_by}")
        if self.pareto:
            lines.append("no measured choice is better and cheaper than one of these (microseconds, SQNR dB):")
            lines += [f"{p.cost:10.1f}  {p.sqnr_db:7.2f}  {', '.join(p.float_layers) or 'none'}" for p in self.pareto]
        return "\n".join(lines)

    def save(self, path: Path) -> Path:
        """Write the analysis as JSON."""
        return write_json(path, self)


@dataclass(frozen=True)
class Limits:
    """What ends the search; see `analyze_layers`."""

    max_float_layers: int = 0
    target_sqnr: float | None = None
    target_metric: float | None = None
    target_drop: float | None = None
    max_float_share: float | None = None
    budget: float | None = None

    @property
    def given(self) -> list[str]:
        """The names of those that are given and have a meaning only where layers may be left in float."""
        names = ("target_sqnr", "target_metric", "target_drop", "max_float_share")
        return [name for name in names if getattr(self, name) is not None]


def analyze_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "one-at-a-time",
    metric: str | Metric | None = None,
    higher_is_better: bool | None = None,
    groups: str | Sequence[Pattern] | None = None,
    pinned: Mapping[str, str] | Plan | None = None,
    confirm: int | None = None,
    target_sqnr: float | None = None,
    target_metric: float | None = None,
    target_drop: float | None = None,
    max_float_layers: int = 0,
    max_float_share: float | None = None,
    budget: float | None = None,
    gpu: str | None = None,
    profile: Path | str | None = None,
    path: Path | str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Analysis:
    """Rank the layers by what they cost, and leave the worst in float until a target is met or enough are.

    Layers that are chosen are disabled in the model, with what exists only for them; nothing else about it changes.
    Under torchrun the processes share the work and all come to the same result.

    Args:
        model: A calibrated model. Layers that are disabled already stay so and are not ranked.
        batches: Iterated once and kept; see `trace.call_model`. "top1" needs `(images, labels)`.
        mode: "one-at-a-time" or "leave-one-out", see above.
        metric: What ranks: "sqnr" (as None), "cosine", "kl" (of the softmax, in nats) or "top1" of the outputs, or a
            function `model -> float`, which is called once for each state.
        higher_is_better: Direction of a function; True if not given. The others have their own.
        groups: What is left in float together: None (each layer by itself), "block", "shared" (layers whose inputs
            have one range) or patterns, each of which makes a group.
        pinned: Layer, or pattern of layers -> "int8" or "float": decided already, neither ranked nor changed. Or the
            plan of an earlier analysis. A name goes before patterns.
        confirm: Rank by an estimate for one to two evaluations, and measure only so many units exactly; None
            measures all.
        target_sqnr: Stop when the SQNR reaches this many dB.
        target_metric: Stop when the metric reaches this value.
        target_drop: Stop when the metric is worse than the float model's by no more than this.
        max_float_layers: At most so many layers are left in float, beyond those that are pinned or were in float
            before; 0 only ranks.
        max_float_share: At most this share of all multiplications of the model is in float, 0 to 1, what is pinned or
            was in float before included.
        budget: Seconds. Nothing but the first evaluation begins later: what is not measured by then has no gain and
            is in `unmeasured`, and a step that is not finished by then is not taken. The ranking has 3/4 of it where
            layers may be left in float.
        gpu: Weigh the gain against the time of a layer on this GPU ("a100", "orin" ...; `qdq.analyze.cost.GPUS`).
        profile: The same, with times of an engine: JSON of trtexec `--exportProfile`.
        path: File to which every measurement is appended; an analysis that was killed goes on from it.
        cache_bytes: Activations beyond this many bytes wait in temporary files.

    Raises:
        ArgumentError: An unknown name, a target for a metric that is not given, a number out of range, options that
            contradict each other, a pattern that matches nothing, or a file that cannot be written.
        DataError: No batch, "top1" without labels, or a file that is no profile.
        StateError: No layer is quantized, one has no amax, the outputs hold NaN, or a function gives no number.
    """
    earlier = pinned if isinstance(pinned, Plan) else None
    precisions = pinned.precisions if isinstance(pinned, Plan) else pinned or {}
    chosen = _choose_metric(metric, higher_is_better)
    limits = Limits(max_float_layers, target_sqnr, target_metric, target_drop, max_float_share, budget)
    _check_arguments(mode, chosen, limits, confirm, precisions)
    _check_costs(gpu, profile)
    require_batches(batches)
    kept = [batch for batch in batches if count_rows(batch)]
    if not kept:
        raise DataError("there is no batch to analyze on.", "give at least one, for instance of the calibration data.")
    require_labels(chosen.outputs, kept[0])
    began = time.monotonic()
    with ExitStack() as undo:  # an interrupted search leaves the model as it was
        units, fixed = _pin(model, find_units(model, kept[0]), precisions, undo)
        units = group_units(model, units, groups)
        costs = count_costs(model, kept[0]) if gpu or profile or max_float_share is not None else {}
        times = _estimate(model, costs, gpu, profile, units)
        with Ranks() as ranks:
            journal = Journal(
                None if path is None else Path(path), _fingerprint(model, kept, chosen, units), ranks.rank
            )
            ranks.wait()  # until all have read what is known
            replay = Replay(model, cache_bytes=cache_bytes)
            probe = _Probe(model, kept, chosen, journal, ranks, replay)
            search = _Search(model, probe, units, mode, limits, costs, times, confirm, fixed, began)
            analysis = search.run(undo, earlier)
            journal.close()
        undo.pop_all()
    return analysis


def check_options(
    *,
    mode: str = MODES[0],
    metric: str | Metric | None = None,
    confirm: int | None = None,
    target_sqnr: float | None = None,
    target_metric: float | None = None,
    target_drop: float | None = None,
    max_float_layers: int = 0,
    max_float_share: float | None = None,
    budget: float | None = None,
    gpu: str | None = None,
    profile: Path | str | None = None,
) -> None:
    """Refuse arguments of `analyze_layers` that cannot be meant, before the work that precedes it.

    Raises:
        ArgumentError: As there; patterns that match nothing are seen only with the model.
        DataError: The profile cannot be read.
    """
    limits = Limits(max_float_layers, target_sqnr, target_metric, target_drop, max_float_share, budget)
    _check_arguments(mode, _choose_metric(metric, None), limits, confirm, {})
    _check_costs(gpu, profile)


@dataclass(frozen=True)
class _Chosen:
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
        return self.function is None and self.outputs is SQNR


def _choose_metric(metric: str | Metric | None, higher_is_better: bool | None) -> _Chosen:
    if callable(metric):
        name = getattr(metric, "__qualname__", type(metric).__qualname__)
        return _Chosen(name, higher_is_better is not False, SQNR, metric)
    known = METRICS.get("sqnr" if metric is None else metric)
    if known is None:
        raise ArgumentError(
            f"metric is {metric!r}; known are {', '.join(METRICS)}.", "or pass a function of the model."
        )
    if higher_is_better is not None and higher_is_better != known.higher_is_better:
        raise ArgumentError(f"higher_is_better is {higher_is_better} for {known.name}.", "leave it out: it is known.")
    return _Chosen(known.name, known.higher_is_better, known)


def _check_arguments(
    mode: str, metric: _Chosen, limits: Limits, confirm: int | None, pinned: Mapping[str, str]
) -> None:
    if mode not in MODES:
        raise ArgumentError(f"mode is {mode!r}; known are {', '.join(MODES)}.", "use 'one-at-a-time'.")
    for name in ("target_metric", "target_drop"):
        if getattr(limits, name) is not None and metric.is_sqnr:
            raise ArgumentError(f"{name} is given, but no metric.", "pass metric= as well, or use target_sqnr.")
    if type(limits.max_float_layers) is not int or limits.max_float_layers < 0:
        raise ArgumentError(
            f"max_float_layers is {limits.max_float_layers}.", "give a whole number, 0 (rank only) or more."
        )
    if confirm is not None and (type(confirm) is not int or confirm < 0):
        raise ArgumentError(f"confirm is {confirm}.", "give the number of layers to measure, 0 or more.")
    for name in ("target_sqnr", "target_metric", "target_drop"):
        value = getattr(limits, name)
        if value is not None and not math.isfinite(value):
            raise ArgumentError(f"{name} is {value}.", "give a finite number.")
    if limits.target_drop is not None and limits.target_drop < 0:
        raise ArgumentError(f"target_drop is {limits.target_drop}.", "give how much worse it may be, 0 or more.")
    if limits.max_float_share is not None and not 0 <= limits.max_float_share <= 1:
        raise ArgumentError(f"max_float_share is {limits.max_float_share}.", "give a share, 0 to 1.")
    if limits.budget is not None and not 0 < limits.budget < math.inf:
        raise ArgumentError(f"budget is {limits.budget} seconds.", "give more than 0, or leave it out.")
    if limits.given and not limits.max_float_layers:
        raise ArgumentError(
            f"{limits.given[0]} is given, but max_float_layers is 0: no layer may be left in float.",
            "give max_float_layers as well, the most that may be.",
        )
    for name, precision in pinned.items():
        if precision not in PRECISIONS:
            raise ArgumentError(f"{name} is pinned to {precision!r}.", "pin to 'int8' or 'float'.")


def _check_costs(gpu: str | None, profile: Path | str | None) -> None:
    if gpu is not None and profile is not None:
        raise ArgumentError("both gpu and profile are given.", "give one: the times of a profile need no roofline.")
    if gpu is not None:
        find_gpu(gpu)
    if profile is not None:
        read_profile(Path(profile))


def _pin(
    model: nn.Module, units: list[Unit], pinned: Mapping[str, str], undo: ExitStack
) -> tuple[list[Unit], dict[str, str]]:
    """What is left to decide, and what is decided; float layers are switched off."""
    fixed = match_precisions(model, [unit.name for unit in units], pinned)
    for unit in units:
        if fixed.get(unit.name) == "float":
            _switch_off(unit.quantizers, undo)
    return [unit for unit in units if unit.name not in fixed], fixed


def _switch_off(quantizers: Sequence[TensorQuantizer], undo: ExitStack) -> None:
    for quantizer in quantizers:
        undo.callback(setattr, quantizer, "_disabled", quantizer._disabled)
        quantizer.disable()


def _estimate(
    model: nn.Module, costs: dict[str, LayerCost], gpu: str | None, profile: Path | str | None, units: list[Unit]
) -> dict[str, SwitchCost]:
    """Time of every layer in both types, if they are asked for."""
    if profile is not None:
        names = [name for unit in units for name in unit.layers]
        return load_times(Path(profile), names, dict(model.named_modules()))
    return estimate_times(costs, gpu) if gpu else {}


def _fingerprint(model: nn.Module, batches: list[Any], metric: _Chosen, units: list[Unit]) -> str:
    """What a measurement depends on, in 16 hexadecimal digits."""
    digest = hashlib.sha256(f"{torch.__version__} {metric.name}".encode())
    for name, tensor in model.state_dict().items():
        _feed(digest, name, tensor)
    for name, quantizer in named_quantizers(model):
        digest.update(f"{name} {quantizer._disabled} {quantizer.format}".encode())
    for operation in trace_forward(model, batches[0]).operations:
        arguments = {
            key: repr([leaf for leaf in tree_leaves(value) if isinstance(leaf, _PLAIN)])
            for key, value in operation.arguments.items()
        }
        digest.update(f"{operation.name} {operation.inputs} {operation.outputs} {arguments}".encode())
    for leaf in tree_leaves(batches):
        _feed(digest, "batch", leaf)
    digest.update(repr([(unit.name, unit.layers, unit.calls) for unit in units]).encode())
    return digest.hexdigest()[:16]


def _feed(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode())
    elif value.numel():
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value))


@dataclass(frozen=True)
class _Value:
    """The model in one state.

    Args:
        parts: Statistics of each sample, one array a batch.
        sqnr: In dB.
        metric: The chosen metric; SQNR if that is the one.
    """

    parts: tuple[Statistics, ...]
    sqnr: float
    metric: float

    @property
    def rows(self) -> Statistics:
        """Statistics of each sample."""
        return np.concatenate(self.parts)


class _TimeIsUpError(Exception):
    """Ends a forward in many states. Never leaves this module."""


class _Probe:
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
        self, model: nn.Module, batches: list[Any], metric: _Chosen, journal: Journal, ranks: Ranks, replay: Replay
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
        return sum(map(count_rows, self.batches))

    @property
    def is_over(self) -> bool:
        """Whether the time is, for any process."""
        return self._is_past(self.deadline)

    def _is_past(self, moment: float) -> bool:
        return moment < math.inf and self._ranks.any(time.monotonic() >= moment)

    def measure(
        self, state: list[str], variants: Mapping[str, Sequence[TensorQuantizer]], *, may_cut: bool = False
    ) -> dict[str | None, _Value]:
        """The model as it is (None), and with the quantizers of each variant switched; all on the same batches.

        Args:
            state: Names what the model is now.
            variants: Name -> quantizers.
            may_cut: What happens when the time is up: from now on only the batches are used on which all is measured,
                of the first one what is measured. Otherwise the result is empty.
        """
        names: list[str | None] = [None, *variants]
        parts: dict[str | None, list[Statistics]] = {name: [] for name in names}
        # A function is called after the batches, and needs time as well.
        self._until = (time.monotonic() + self.deadline) / 2 if self.metric.function else self.deadline
        with tqdm(total=len(names) * len(self.batches), desc="analyze", unit="forward", disable=None) as progress:
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
            metrics = self._call_metric(state, {name: variants[name] for name in complete if name is not None})
        if len(metrics) < len(complete) and not may_cut:
            return {}
        return {name: self._reduce(each, metrics[name]) for name, each in complete.items() if name in metrics}

    def cut(self, value: _Value) -> _Value:
        """A measurement, on the batches that are used now."""
        return self._reduce(value.parts[: len(self.batches)], value.metric if self.metric.function else None)

    def _reduce(self, parts: tuple[Statistics, ...], metric: float | None) -> _Value:
        sqnr, own = reduce_rows(self.metric.outputs, np.concatenate(parts))
        return _Value(parts, sqnr, own if metric is None else metric)

    def measure_float(self) -> float:
        """The chosen metric of the float model."""
        if self.metric.function is not None:
            with disable_quantization(self._model):
                return self._call_metric(["float"], {})[None]
        pairs = zip(self.batches, self.references, strict=True)
        rows = [collect(self.metric.outputs, batch, reference, reference) for batch, reference in pairs]
        return reduce_rows(self.metric.outputs, np.concatenate(rows))[1]

    def _keep_only(self, count: int) -> None:
        self.batches, self.references = self.batches[:count], self.references[:count]

    def _collect(self, index: int, outputs: Any) -> Statistics:
        rows = collect(self.metric.outputs, self.batches[index], self.references[index], outputs)
        if np.isnan(rows).any():
            raise StateError(
                "the outputs of the model hold NaN.", "check the float model on the same batches: it must be finite."
            )
        return rows

    def _recall(self, key: list[Any]) -> Statistics | None:
        """Statistics in the journal; None if there are none, or if what stands there is none of this metric."""
        try:
            rows = np.asarray(self._journal.get(key), np.float64)
        except (TypeError, ValueError, OverflowError):
            return None
        index = key[-1]
        shape = (find_rows(self.batches[index], self.references[index]), count_columns(self.metric.outputs))
        return rows if rows.shape == shape and not np.isnan(rows).any() else None

    def _recall_metric(self, key: list[Any]) -> float | None:
        value = self._journal.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        return float(value) if is_number else None

    def _measure_batch(
        self, index: int, state: list[str], variants: Mapping[str, Sequence[TensorQuantizer]], progress: Any
    ) -> dict[str | None, Statistics]:
        """Statistics of each state on one batch; some are missing when the time is up."""
        names: list[str | None] = [None, *variants]
        known = {name: rows for name in names if (rows := self._recall([state, name, index])) is not None}
        missing = [name for name in names if name not in known]
        mine = self._ranks.share(missing)
        fresh: dict[str | None, Statistics] = {}
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
        fresh: dict[str | None, Statistics] = {}
        for name in tqdm(self._ranks.share(missing), desc="metric", unit="call", disable=None):
            if name is not None and time.monotonic() >= self._until:
                break
            with flipped(variants[name] if name is not None else ()):
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
            raise StateError(f"the metric {self.metric.name} gives {str(value)[:60]}.", "have it return a number.")
        return number


class _Search:
    """Ranks the units and chooses among them; the arguments are those of `analyze_layers`."""

    def __init__(
        self,
        model: nn.Module,
        probe: _Probe,
        units: list[Unit],
        mode: str,
        limits: Limits,
        costs: dict[str, LayerCost],
        times: dict[str, SwitchCost],
        confirm: int | None,
        pinned: dict[str, str],
        began: float,
    ) -> None:
        self._model = model
        self._probe = probe
        self._units = {unit.name: unit for unit in units}
        self._mode = mode
        self._limits = limits
        self._costs = costs
        self._times = times
        self._confirm = confirm
        self._metric = probe.metric
        self._sign = 1 if probe.metric.higher_is_better else -1
        self._points: dict[tuple[str, ...], _Value] = {}
        self._float_metric: float | None = None
        self._pinned = pinned
        self._began = began
        self._unmeasured: list[str] = []
        self._errors: Statistics = np.zeros(0)  # of each sample, the sum over all units that were measured alone

    def run(self, undo: ExitStack, earlier: Plan | None) -> Analysis:
        """Rank, then choose; what is switched off is undone by `undo`."""
        budget = math.inf if self._limits.budget is None else self._limits.budget
        self._probe.deadline = self._began + budget * (_RANKING if self._limits.max_float_layers else 1.0)
        self._probe.prepare()
        base, alone, ranked = self._rank()
        self._probe.deadline = self._began + budget
        self._unmeasured = [name for name in self._units if name not in {unit.name for unit in ranked}]
        if self._limits.target_drop is not None:
            self._float_metric = self._probe.measure_float()
        steps, stopped_by = self._choose(base, alone, ranked, undo)
        return Analysis(
            mode=self._mode,
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
            unmeasured=tuple(layer for name in self._unmeasured for layer in self._units[name].layers),
        )

    def _rank(self) -> tuple[_Value, dict[str, _Value], list[LayerSensitivity]]:
        """The model in int8, each measured unit alone, and all of which something is known, most sensitive first."""
        is_alone = self._mode == "one-at-a-time"
        base = self._probe.measure([], {}, may_cut=True)[None]
        is_screened = self._confirm is not None and self._confirm < len(self._units)
        energies = self._screen(self._units) if is_screened else {}
        names = sorted(self._units, key=lambda name: -energies.get(name, 0.0))[: self._confirm]
        variants = {name: self._units[name].quantizers for name in self._units if name in set(names)}
        with disable_quantization(self._model) if is_alone else nullcontext():
            values = self._probe.measure(["float"] if is_alone else [], variants, may_cut=True) if variants else {}
        base = self._probe.cut(base)
        reference = values.pop(None, base)
        alone = {str(name): value for name, value in values.items()}
        if not is_alone:
            self._points |= {(name,): value for name, value in alone.items()}
        self._points[()] = base
        self._errors = sum((value.rows[:, 1] for value in alone.values()), np.zeros(len(base.rows)))
        exact = [self._describe(name, value, base, reference) for name, value in alone.items()]
        exact.sort(key=lambda each: (self._sign * (each.metric or 0.0), each.sqnr_db), reverse=not is_alone)
        rest = [self._guess(name, base, energies[name]) for name in energies if name not in alone]
        rest.sort(key=lambda each: each.sqnr_db, reverse=not is_alone)
        return base, alone, exact + rest

    def _screen(self, names: Iterable[str]) -> dict[str, float]:
        probe = self._probe
        return screen_units(
            self._model, probe.batches, probe.references, [self._units[name] for name in names], self._mode,
            lambda: probe.is_over,
        )  # fmt: skip

    def _measure_most_promising(self, chosen: list[str], names: list[str]) -> dict[str, _Value]:
        """Units without which the model as it is now is measured: all, or those that a new estimate puts first."""
        if self._confirm is not None and self._confirm < len(names):
            energies = self._screen(names)
            names = sorted(names, key=lambda name: -energies[name])[: max(self._confirm, 1)]
        values = self._probe.measure(chosen, {name: self._units[name].quantizers for name in names})
        return {str(name): value for name, value in values.items() if name is not None}

    def _guess(self, name: str, base: _Value, energy: float) -> LayerSensitivity:
        sqnr = estimate_sqnr(self._mode, base.rows, energy)
        return LayerSensitivity(
            name,
            sqnr,
            None,
            is_exact=False,
            layers=self._units[name].layers,
            macs=self._macs(name),
            cost=self._cost(name),
        )

    def _describe(self, name: str, value: _Value, base: _Value, reference: _Value) -> LayerSensitivity:
        gain, low, high = self._gain(value, base, reference)
        return LayerSensitivity(
            name, value.sqnr, self._shown(value), gain, low, high,
            layers=self._units[name].layers, macs=self._macs(name), cost=self._cost(name),
        )  # fmt: skip

    def _gain(self, value: _Value, base: _Value, reference: _Value) -> tuple[float, float | None, float | None]:
        """What a unit gains, with its interval."""
        is_alone = self._mode == "one-at-a-time"
        if self._metric.function is not None:
            worse, better = (value, reference) if is_alone else (base, value)
            return self._sign * (better.metric - worse.metric), None, None
        if not (is_alone and self._metric.is_sqnr):
            worse, better = (value, reference) if is_alone else (base, value)
            return self._interval(self._rise, worse.rows, better.rows)
        return self._interval(_estimate_gain, np.column_stack([base.rows[:, 1], self._errors]), value.rows[:, 1:2])

    def _interval(
        self, gain: Callable[[Statistics, Statistics], Statistics], first: Statistics, second: Statistics
    ) -> tuple[float, float | None, float | None]:
        """A gain from two sums over samples, and its ends over draws of the samples."""
        kind = float(gain(first.sum(0), second.sum(0)))
        if len(first) < 2:
            return kind, None, None
        drawn = gain(draw_sums(first), draw_sums(second))
        finite = drawn[np.isfinite(drawn)]
        low, high = np.percentile(finite, _CONFIDENCE) if len(finite) else (kind, kind)
        return kind, float(low), float(high)

    def _rise(self, worse: Statistics, better: Statistics) -> Statistics:
        """How much better the metric of some sums is than of others."""
        columns = slice(0, 2) if self._metric.is_sqnr else slice(2, None)
        reduce = self._metric.outputs.reduce
        with np.errstate(invalid="ignore"):
            rise = self._sign * (reduce(better[..., columns]) - reduce(worse[..., columns]))
        return np.nan_to_num(rise, posinf=np.inf)

    def _choose(
        self, base: _Value, alone: dict[str, _Value], ranked: list[LayerSensitivity], undo: ExitStack
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
            if self._mode == "leave-one-out":
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
            _switch_off(self._units[best].quantizers, undo)
            current = values[best]
            layers, cost = self._units[best].layers, self._total_cost([*chosen, best])
            steps.append(Step(best, current.sqnr, self._shown(current), layers, cost))

    def _measure_next(self, chosen: list[str], pool: list[str], ranked: list[LayerSensitivity]) -> dict[str, _Value]:
        """The first unit of the ranking, with times the one with the largest gain for each microsecond."""
        gains = {entry.name: entry.gain or 0.0 for entry in ranked}
        best = max(pool, key=lambda name: gains[name] / self._price(name)) if self._times else pool[0]
        with ExitStack() as trial:
            _switch_off(self._units[best].quantizers, trial)
            values = self._probe.measure([*chosen, best], {})
        return {best: values[None]} if values else {}

    def _reason_to_stop(self, current: _Value, chosen: list[str], pool: list[str], refused: set[str]) -> str:
        if reason := self._reached(current):
            return reason
        count, limit = sum(len(self._units[name].layers) for name in chosen), self._limits.max_float_layers
        share = self._limits.max_float_share
        if limit and share is not None and self._float_share(chosen) > share:
            return f"{self._float_share(chosen):.3g} of the multiplications are in float already, at most {share:g}"
        if refused and (not pool or self._mode == "leave-one-out"):
            return "no further layer improves the outputs"
        if count < limit and (self._probe.is_over or (self._unmeasured and not pool)):
            return self._used_up
        if count >= limit or not pool:
            more = "" if count >= limit else "; no other one fits" if self._units else "; all layers are pinned"
            return f"{count} of at most {limit} layers are in float{more}"
        return ""

    @property
    def _used_up(self) -> str:
        return f"the budget of {self._limits.budget or 0:g} s is used up"

    def _reached(self, current: _Value) -> str:
        limits, metric = self._limits, current.metric
        if limits.target_sqnr is not None and current.sqnr >= limits.target_sqnr:
            return f"SQNR {current.sqnr:.2f} dB reaches the target of {limits.target_sqnr:g} dB"
        if limits.target_metric is not None and self._sign * (metric - limits.target_metric) >= 0:
            return f"metric {metric:g} reaches the target of {limits.target_metric:g}"
        if limits.target_drop is not None and self._float_metric is not None:
            drop = self._sign * (self._float_metric - metric)
            if drop <= limits.target_drop:
                return f"{self._metric.name} is {drop:g} worse than the float model's, at most {limits.target_drop:g}"
        return ""

    def _fits(self, chosen: list[str], name: str) -> bool:
        """Whether one more unit stays within the numbers of layers and of multiplications."""
        names = [*chosen, name]
        if sum(len(self._units[each].layers) for each in names) > self._limits.max_float_layers:
            return False
        return self._limits.max_float_share is None or self._float_share(names) <= self._limits.max_float_share

    def _float_share(self, chosen: Sequence[str]) -> float:
        """Share of all multiplications in float, of what was pinned or never quantized too."""
        layers = [layer for name, unit in self._units.items() if name not in chosen for layer in unit.layers]
        layers += [name for name, precision in self._pinned.items() if precision == "int8"]
        total = self._costs[""].macs if self._costs else 0
        return (total - sum(self._costs[layer].macs for layer in layers if layer in self._costs)) / max(total, 1)

    def _worth(self, name: str, value: _Value, current: _Value) -> tuple[float, ...]:
        """What orders candidates: gain, with times gain for each microsecond."""
        order = self._order(value)
        if not self._times:
            return order
        gain = order[0] - self._order(current)[0]
        return (gain / self._price(name) if gain > 0 else gain, *order)

    def _order(self, value: _Value) -> tuple[float, float]:
        return self._sign * value.metric, value.sqnr

    def _shown(self, value: _Value) -> float | None:
        return None if self._metric.is_sqnr else value.metric

    def _price(self, name: str) -> float:
        return max(self._cost(name) or 0.0, 1e-3)  # a nanosecond, for what costs nothing

    def _macs(self, name: str) -> int | None:
        found = [self._costs[layer].macs for layer in self._units[name].layers if layer in self._costs]
        return sum(found) if self._costs else None

    def _cost(self, name: str) -> float | None:
        found = [self._times[layer] for layer in self._units[name].layers if layer in self._times]
        return sum(time.float16 - time.int8 for time in found) if self._times else None

    def _total_cost(self, chosen: Sequence[str]) -> float | None:
        layers = [layer for unit in self._units.values() for layer in unit.layers if layer in self._times]
        extra = sum(self._cost(name) or 0.0 for name in chosen)
        return sum(self._times[layer].int8 for layer in layers) + extra if self._times else None

    def _front(self) -> tuple[MixedPoint, ...]:
        """The Pareto front of all sets that were measured."""
        points = [(self._total_cost(names) or 0.0, names, value) for names, value in self._points.items()]
        points.sort(key=lambda point: (point[0], [-part for part in self._order(point[2])]))
        front: list[MixedPoint] = []
        best = (-math.inf, -math.inf)
        for cost, names, value in points:
            if self._order(value) > best:
                best = self._order(value)
                front.append(MixedPoint(names, cost, value.sqnr, self._shown(value)))
        return tuple(front)


def _estimate_gain(noise: Statistics, error: Statistics) -> Statistics:
    """What SQNR rises in dB without one of many independent errors.

    Args:
        noise: Energy of the error of all in int8, and the sum of the energies of each one's, `[..., 2]`.
        error: Energy of the error of the one, `[..., 1]`.
    """
    total = noise.max(-1)
    with np.errstate(divide="ignore"):
        gain: Statistics = -10 * np.log10(1 - error[..., 0] / np.where(total > 0, total, 1.0))
    return gain + 0.0  # no minus before 0


def _row(name: str, width: int, sqnr: float, metric: float | None) -> str:
    return f"{name:{width}}  {sqnr:8.2f}" + ("" if metric is None else f"  {metric:8.4f}")
