"""Result of an analysis: every unit with its sensitivity, the steps taken, and the resulting plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qdq.files import write_json
from qdq.plan import Plan, PlanEntry
from qdq.text import list_names, printable


@dataclass(frozen=True)
class LayerSensitivity:
    """One unit measured alone.

    Args:
        name: Dotted name of the layer, or name of the group.
        sqnr_db: SQNR of the model's outputs against the float model's, in dB, with only this unit in int8
            ("one-at-a-time": low is sensitive) or only this unit in float ("leave-one-out": high is sensitive).
        metric: The chosen metric in the same state, None if that is SQNR.
        gain: How much the metric (SQNR if there is none) improves when this unit alone goes from int8 to float;
            positive is better for every metric. "leave-one-out": measured. "one-at-a-time": estimated from the loss of
            the float model when this unit alone is quantized, as if the errors of all units were independent. For SQNR
            this is -10 log10(1 - e / E) dB, with e the energy of its error and E that of all units in int8, but at
            least the sum of all e. Infinite if one unit causes the whole error.
        gain_low: Lower end of the 95 % bootstrap interval of the gain over samples; None if there is no interval.
        gain_high: Upper end of the interval.
        is_exact: Whether the unit was measured; otherwise the screen estimated it.
        layers: The layers and calls in it.
        macs: Its MACs on one batch.
        cost: Extra time in float compared with int8, in microseconds; None without `gpu` and `profile`.
        outputs: SQNR of each output in dB in the same state, if there are several; `sqnr_db` is that of the worst, or
            of all with the weights that were given. Empty for an estimate.
    """

    name: str
    sqnr_db: float
    metric: float | None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    is_exact: bool = True
    layers: tuple[str, ...] = ()
    macs: int = 0
    cost: float | None = None
    outputs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of leaving units in float.

    Args:
        layer: The unit that went to float in this step.
        sqnr_db: SQNR with all units up to this one in float, in dB.
        metric: The chosen metric in the same state, None if that is SQNR.
        layers: The layers and calls in it.
        cost: Time of all units, in microseconds; None without `gpu` and `profile`.
        outputs: SQNR of each output in dB in the same state, if there are several.
        float_share: Fraction of all MACs in float in the same state, 0 to 1.
    """

    layer: str
    sqnr_db: float
    metric: float | None
    layers: tuple[str, ...] = ()
    cost: float | None = None
    outputs: Mapping[str, float] = field(default_factory=dict)
    float_share: float = 0.0

    @property
    def float_layers(self) -> tuple[str, ...]:
        """The layers that went to float; a unit without a list of layers is one layer."""
        return self.layers or (self.layer,)


@dataclass(frozen=True)
class MixedPoint:
    """A set of float layers that was measured, and its cost.

    Args:
        float_layers: The units in float.
        cost: Time of all units, in microseconds.
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
        images: Number of samples that the figures are measured on; fewer than in the batches if the budget ended the
            ranking.
        sqnr_db: SQNR with every unit quantized, in dB.
        metric: The chosen metric with every unit quantized, None if that is SQNR.
        layers: Every unit, most sensitive first.
        steps: The units left in float, in order; they are disabled in the model.
        stopped_by: Why the search ended.
        metric_name: "sqnr", "cosine", "kl", "top1", or the name of the function.
        pinned: Layer -> "int8", "fp8" or "float", decided before the analysis.
        pareto: The measured sets that no other measured set beats in both cost and quality, cheapest first; empty
            without `gpu` and `profile`.
        full_evaluations: Why layers were evaluated in full; "" if they were replayed.
        earlier: The plan that `pinned` came from; None if it did not come from a plan.
        unmeasured: Layers that the budget left no time for. They stay in int8, and their sensitivity is unknown.
        outputs: SQNR of each output in dB with every unit quantized, if there are several.
        macs: MACs of the whole model on one batch.
        float_share: Fraction of them in float before the first step, 0 to 1.
        kept: Unit -> why the search did not leave it in float, for units that it tried or that are too large.
        idle: Adds, resizes and average poolings that only layers in float read now; their quantizers are disabled too.
        unknown_work: Calls of operators whose MACs are not known; they are in no share.
        fp8: Layers and calls that are quantized to FP8; all others are int8.
        biases: "" if the biases of quantized layers were as they are; else which were corrected, or why none was.
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
    outputs: Mapping[str, float] = field(default_factory=dict)
    macs: int = 0
    float_share: float = 0.0
    kept: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    unknown_work: tuple[str, ...] = ()
    fp8: frozenset[str] = frozenset()
    biases: str = ""

    @property
    def float_layers(self) -> list[str]:
        """The layers left in float."""
        layers = [name for name, precision in self.pinned.items() if precision == "float"]
        for step in self.steps:
            layers += step.float_layers
        return layers

    @property
    def plan(self) -> Plan:
        """The decision, for `save_plan`; pinned layers keep the gain and the reason of the plan they came from."""
        earlier_plan = self.earlier or Plan()
        entries: dict[str, PlanEntry] = {}
        for name, precision in self.pinned.items():
            entries[name] = earlier_plan.pin(name, precision, self.metric_name)

        explanations = self._explain_steps()
        for rank, unit in enumerate(self.layers, 1):
            method = "measured" if unit.is_exact else "estimated"
            explanation = explanations.get(unit.name, "")
            reason = f"{explanation}{self.mode}: rank {rank} of {len(self.layers)}, {method}"
            if self.biases:
                reason = f"{reason} with {self.biases}"
            if unit.name in self.kept:
                reason = f"{reason}; {self.kept[unit.name]}"
            for name in unit.layers:
                precision = "float" if unit.name in explanations else self._format_of(name)
                entries[name] = PlanEntry(precision, reason, unit.gain)

        for name in self.unmeasured:
            reason = "not measured: the budget was used up"
            entries[name] = PlanEntry(self._format_of(name), reason)
        for name in self.idle:
            gain = entries[name].gain if name in entries else None
            entries[name] = PlanEntry(
                "float", f"nothing {self._state} reads its result any more", gain
            )
        return Plan(entries, self.metric_name)

    def _format_of(self, name: str) -> str:
        """The precision of a layer that is not in float."""
        return "fp8" if name in self.fp8 else "int8"

    @property
    def _state(self) -> str:
        """What is not in float is "in int8", or if a layer is in FP8 "quantized"."""
        return "quantized" if self.fp8 else "in int8"

    def _explain_steps(self) -> dict[str, str]:
        """Unit -> the metric before and after the unit went to float.

        The gain of a unit is a different number: the mode sets the state of all other units for it.
        """
        explanations = {}
        earlier_value = _value_of(self)
        for number, step in enumerate(self.steps, 1):
            value = _value_of(step)
            change = f"{self.metric_name} {earlier_value:.4g} -> {value:.4g}"
            explanations[step.layer] = f"step {number} of the search: {change}; "
            earlier_value = value
        return explanations

    def format_table(self, rows: int = 8) -> str:
        """The most sensitive units and the steps taken, as text.

        Args:
            rows: Upper limit on the number of units shown.
        """
        title = f"only this {self._state}" if self.mode == "one-at-a-time" else "only this in float"
        start = f"all layers {self._state}"
        if "float" in self.pinned.values():
            start = f"pinned ones in float, others {self._state}"
        shown = self.layers[:rows]
        steps = [f"+ {step.layer} in float" for step in self.steps]
        labels = [*(layer.name for layer in shown), *steps, start]
        width = max(len(label) for label in labels)

        header = f"{title:{width}}   SQNR dB"
        metric_header = "" if self.metric is None else f"    {self.metric_name}"
        conditions = f"; {self.biases}" if self.biases else ""
        lines = [
            f"{self.mode} on {self.images} samples{conditions}",
            f"{header}{metric_header}  % of MACs",
        ]
        for layer in shown:
            share = layer.macs / max(self.macs, 1)
            lines.append(_format_row(layer.name, width, layer.sqnr_db, layer.metric, share))
        if len(self.layers) > rows:
            lines.append(f"... and {len(self.layers) - rows} less sensitive ones")
        lines += self._format_estimated()
        if self.unmeasured:
            names = ", ".join(self.unmeasured)
            lines.append(f"not measured, the budget was used up: {names}")

        lines.append(f"{'':{width}}   SQNR dB{metric_header}  % of MACs in float")
        lines.append(_format_row(start, width, self.sqnr_db, self.metric, self.float_share))
        for label, step in zip(steps, self.steps, strict=True):
            lines.append(_format_row(label, width, step.sqnr_db, step.metric, step.float_share))
        lines += self._format_kept(rows)
        if self.unknown_work:
            names = list_names(self.unknown_work, 3)
            lines.append(f"the MACs of {len(self.unknown_work)} calls are unknown: {names}")
        lines += self._format_outputs(shown, start, width)
        lines.append(f"stopped: {self.stopped_by}")
        lines += self._format_front()
        return "\n".join(lines)

    def _format_estimated(self) -> list[str]:
        """How many units were only estimated."""
        num_estimated = sum(not unit.is_exact for unit in self.layers)
        if not num_estimated:
            return []
        total = len(self.layers)
        return [
            f"{num_estimated} of {total} are estimated, not measured; confirm={total} measures all"
        ]

    def _format_outputs(
        self, shown: Sequence[LayerSensitivity], start: str, width: int
    ) -> list[str]:
        """The SQNR of each output in every state of the table, if there are several.

        Args:
            shown: The most sensitive units.
            start: Label of the state before the search.
            width: Characters of the first column.
        """
        if not self.outputs:
            return []
        rows = [(unit.name, unit.outputs) for unit in shown]
        rows.append((start, self.outputs))
        for step in self.steps:
            rows.append((f"+ {step.layer} in float", step.outputs))
        columns = {name: f"{printable(name):>8}" for name in self.outputs}
        lines = ["  ".join([f"{'SQNR dB of each output':{width}}", *columns.values()])]
        for label, outputs in rows:
            cells = [f"{label:{width}}"]
            for name, title in columns.items():
                # An estimate has no figures of single outputs.
                text = f"{outputs[name]:.2f}" if name in outputs else "-"
                cells.append(f"{text:>{len(title)}}")
            lines.append("  ".join(cells))
        return lines

    def _format_kept(self, rows: int) -> list[str]:
        """Why units stay quantized that are more sensitive than one in float, and why the most sensitive one does.

        Args:
            rows: Upper limit on the number of units shown.
        """
        names = [unit.name for unit in self.layers]
        ranks = [names.index(step.layer) for step in self.steps]
        last = max(ranks, default=0)
        lines = []
        for name in names[: min(last + 1, rows)]:
            if name in self.kept:
                lines.append(f"{name} stays {self._state}: {self.kept[name]}")
        return lines

    def _format_front(self) -> list[str]:
        """The Pareto front, one line per set."""
        if not self.pareto:
            return []
        lines = [
            "no measured choice is better and cheaper than one of these (microseconds, SQNR dB):"
        ]
        for point in self.pareto:
            layers = ", ".join(point.float_layers) or "none"
            lines.append(f"{point.cost:10.1f}  {point.sqnr_db:7.2f}  {layers}")
        return lines

    def save(self, path: Path) -> Path:
        """Write the analysis as JSON."""
        return write_json(path, self)


def _value_of(state: Analysis | Step) -> float:
    """The chosen metric in a state of the model."""
    return state.sqnr_db if state.metric is None else state.metric


def _format_row(label: str, width: int, sqnr: float, metric: float | None, share: float) -> str:
    """A row of the table.

    Args:
        label: The first column.
        width: Characters of the first column.
        sqnr: SQNR in dB.
        metric: The chosen metric; None if it is SQNR.
        share: Fraction of all MACs, 0 to 1.
    """
    row = f"{label:{width}}  {sqnr:8.2f}"
    if metric is not None:
        row = f"{row}  {metric:8.4f}"
    return f"{row}  {100 * share:9.1f}"
