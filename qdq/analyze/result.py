"""What an analysis found: every unit with its sensitivity, the steps taken, and the plan that follows."""

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
        entries = {
            name: earlier.pin(name, precision, self.metric_name)
            for name, precision in self.pinned.items()
        }
        for rank, unit in enumerate(self.layers, 1):
            how = "measured" if unit.is_exact else "estimated"
            reason = (
                f"{steps.get(unit.name, '')}{self.mode}: rank {rank} of {len(self.layers)}, {how}"
            )
            precision = "float" if unit.name in steps else "int8"
            for name in unit.layers:
                entries[name] = PlanEntry(precision, reason, unit.gain)
        entries.update(
            {
                name: PlanEntry("int8", "not measured: the budget was used up")
                for name in self.unmeasured
            }
        )
        return Plan(entries, self.metric_name)

    def _explain_steps(self) -> dict[str, str]:
        """Unit -> what was measured when it joined the float ones: not its gain, which is of this unit alone."""
        texts, before = {}, self.metric if self.metric is not None else self.sqnr_db
        for number, step in enumerate(self.steps, 1):
            after = step.metric if step.metric is not None else step.sqnr_db
            texts[step.layer] = (
                f"step {number} of the search: {self.metric_name} {before:.4g} -> {after:.4g}; "
            )
            before = after
        return texts

    def format_table(self, rows: int = 8) -> str:
        """The most sensitive units and the steps taken, as text."""
        alone = "only this in int8" if self.mode == "one-at-a-time" else "only this in float"
        names = [layer.name for layer in self.layers[:rows]] + [
            f"+ {step.layer} in float" for step in self.steps
        ]
        is_pinned = "float" in self.pinned.values()
        everything = "pinned ones in float, others in int8" if is_pinned else "all layers in int8"
        width = max(len(name) for name in [*names, everything])
        lines = [
            f"{self.mode} on {self.images} images",
            f"{alone:{width}}   SQNR dB"
            + ("" if self.metric is None else f"    {self.metric_name}"),
            *(_row(layer.name, width, layer.sqnr_db, layer.metric) for layer in self.layers[:rows]),
        ]
        if len(self.layers) > rows:
            lines.append(f"... and {len(self.layers) - rows} less sensitive ones")
        if self.unmeasured:
            lines.append(f"not measured, the budget was used up: {', '.join(self.unmeasured)}")
        lines.append(_row(everything, width, self.sqnr_db, self.metric))
        lines += [
            _row(f"+ {step.layer} in float", width, step.sqnr_db, step.metric)
            for step in self.steps
        ]
        lines.append(f"stopped: {self.stopped_by}")
        if self.pareto:
            lines.append(
                "no measured choice is better and cheaper than one of these (microseconds, SQNR dB):"
            )
            lines += [
                f"{p.cost:10.1f}  {p.sqnr_db:7.2f}  {', '.join(p.float_layers) or 'none'}"
                for p in self.pareto
            ]
        return "\n".join(lines)

    def save(self, path: Path) -> Path:
        """Write the analysis as JSON."""
        return write_json(path, self)


def _row(name: str, width: int, sqnr: float, metric: float | None) -> str:
    return f"{name:{width}}  {sqnr:8.2f}" + ("" if metric is None else f"  {metric:8.4f}")
