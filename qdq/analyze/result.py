"""Result of an analysis: every unit with its sensitivity, the steps taken, and the resulting plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qdq.files import write_json
from qdq.plan import Plan, PlanEntry


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
        macs: Its MACs on one batch; None if no option needs costs.
        cost: Extra time in float compared with int8, in microseconds; None without `gpu` and `profile`.
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
        layer: The unit that went to float in this step.
        sqnr_db: SQNR with all units up to this one in float, in dB.
        metric: The chosen metric in the same state, None if that is SQNR.
        layers: The layers and calls in it.
        cost: Time of all units, in microseconds; None without `gpu` and `profile`.
    """

    layer: str
    sqnr_db: float
    metric: float | None
    layers: tuple[str, ...] = ()
    cost: float | None = None

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
        pinned: Layer -> "int8" or "float", decided before the analysis.
        pareto: The measured sets that no other measured set beats in both cost and quality, cheapest first; empty
            without `gpu` and `profile`.
        full_evaluations: Why layers were evaluated in full; "" if they were replayed.
        earlier: The plan that `pinned` came from; None if it did not come from a plan.
        unmeasured: Layers that the budget left no time for. They stay in int8, and their sensitivity is unknown.
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
            precision = "float" if unit.name in explanations else "int8"
            entries.update(dict.fromkeys(unit.layers, PlanEntry(precision, reason, unit.gain)))

        unmeasured = PlanEntry("int8", "not measured: the budget was used up")
        entries.update(dict.fromkeys(self.unmeasured, unmeasured))
        return Plan(entries, self.metric_name)

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
        title = "only this in int8" if self.mode == "one-at-a-time" else "only this in float"
        start = "all layers in int8"
        if "float" in self.pinned.values():
            start = "pinned ones in float, others in int8"
        shown = self.layers[:rows]
        steps = [f"+ {step.layer} in float" for step in self.steps]
        labels = [*(layer.name for layer in shown), *steps, start]
        width = max(len(label) for label in labels)

        header = f"{title:{width}}   SQNR dB"
        if self.metric is not None:
            header = f"{header}    {self.metric_name}"
        lines = [f"{self.mode} on {self.images} images", header]
        for layer in shown:
            lines.append(_format_row(layer.name, width, layer.sqnr_db, layer.metric))
        if len(self.layers) > rows:
            lines.append(f"... and {len(self.layers) - rows} less sensitive ones")
        if self.unmeasured:
            names = ", ".join(self.unmeasured)
            lines.append(f"not measured, the budget was used up: {names}")

        lines.append(_format_row(start, width, self.sqnr_db, self.metric))
        for label, step in zip(steps, self.steps, strict=True):
            lines.append(_format_row(label, width, step.sqnr_db, step.metric))
        lines.append(f"stopped: {self.stopped_by}")
        lines += self._format_front()
        return "\n".join(lines)

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


def _format_row(label: str, width: int, sqnr: float, metric: float | None) -> str:
    """A row of the table.

    Args:
        label: The first column.
        width: Characters of the first column.
        sqnr: SQNR in dB.
        metric: The chosen metric; None if it is SQNR.
    """
    row = f"{label:{width}}  {sqnr:8.2f}"
    if metric is None:
        return row
    return f"{row}  {metric:8.4f}"
