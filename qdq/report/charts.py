"""The geometry of the charts of a report; the templates draw it.

Places across are in percent, so that a chart is as wide as the page and its letters keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdq.report.load import StoredReport
from qdq.report.records import LayerRecord, Sensitivity
from qdq.report.wording import format_gain, format_number, format_state
from qdq.statistics.show import Tick, round_numbers

BARS = 20
_PLOT_HEIGHT = 220
_ROW, _LANE, _MARGIN = 22, 9, 14  # of the network, in pixels
_MOST_LANES = 40
_LOSSES = 50  # points of the curve of the loss
_Set = tuple[float | None, float | None, str]  # of float layers: cost, quality and words


@dataclass(frozen=True)
class Bar:
    """One unit in the chart of sensitivity; places in percent.

    Args:
        name: The unit.
        anchor: Number of its first layer in the table.
        is_float: Whether it is in float now.
        left: Where the bar begins.
        width: Its width.
        low: Lower end of the interval; None where there is none.
        high: Its upper end.
        label: The gain in words.
    """

    name: str
    anchor: int
    is_float: bool
    left: float
    width: float
    low: float | None
    high: float | None
    label: str


@dataclass(frozen=True)
class Bars:
    """The chart of sensitivity.

    Args:
        bars: Most sensitive first.
        zero: Where no gain is, in percent.
        more: How many units are not drawn.
        unit: What the gains are in.
    """

    bars: tuple[Bar, ...]
    zero: float
    more: int
    unit: str


def list_units(report: StoredReport) -> list[Sensitivity]:
    """What was ranked, most sensitive first."""
    units = {
        layer.sensitivity.rank: layer.sensitivity for layer in report.layers if layer.sensitivity
    }
    return [units[rank] for rank in sorted(units)]


def unit_of_gain(report: StoredReport) -> str:
    """What gains are in: dB, nats, or the name of the metric."""
    name = str(report.data["analysis"]["metric_name"])
    return {"sqnr": "dB", "kl": "nats"}.get(name, name)


def draw_bars(report: StoredReport, count: int = BARS) -> Bars:
    """The most sensitive units, with what each gains in float and the 95 % interval of that."""
    units = list_units(report)
    shown = units[:count]
    places = {layer.name: number for number, layer in enumerate(report.layers)}
    float_layers = {layer.name for layer in report.layers if layer.precision == "float"}
    ends = [0.0] + [
        value for unit in shown for value in (unit.gain, unit.low, unit.high) if value is not None
    ]
    low, span = min(ends), max(max(ends) - min(ends), 1e-12)

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    def draw(unit: Sensitivity) -> Bar:
        gain = (
            unit.gain if unit.gain is not None else max(ends) if unit.is_exact else 0.0
        )  # not finite: to the end
        return Bar(
            name=unit.unit,
            anchor=places[unit.layers[0]],
            is_float=unit.layers[0] in float_layers,
            left=place(min(gain, 0.0)),
            width=round(100 * abs(gain) / span, 2),
            low=None if unit.low is None else place(unit.low),
            high=None if unit.high is None else place(unit.high),
            label=format_gain(unit),
        )

    return Bars(tuple(map(draw, shown)), place(0.0), len(units) - len(shown), unit_of_gain(report))


@dataclass(frozen=True)
class Point:
    """A set of float layers: `x` in percent, `y` in pixels from the top."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Quality against cost.

    Args:
        points: Cheapest first.
        x_ticks: Along the cost, in percent.
        y_ticks: Along the quality, in pixels from the top.
        x_label: What the cost is.
        y_label: What the quality is.
        height: In pixels.
    """

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str
    height: int = _PLOT_HEIGHT


def draw_curve(report: StoredReport) -> Curve | None:
    """The Pareto front if times were given, else the steps of the search over the share of the work in float.

    Up goes what ranked, the SQNR or the metric of the user. None where there is one point only, or the size of a
    layer is not known.
    """
    analysis, unit = report.data["analysis"], unit_of_gain(report)
    metric = analysis["metric_name"]
    quality = (
        "SQNR of the outputs, in dB"
        if metric == "sqnr"
        else metric
        if unit == metric
        else f"{metric}, in {unit}"
    )

    def describe(cost: float | None, state: Mapping[str, Any], what: str) -> _Set:
        value = state["sqnr_db" if metric == "sqnr" else "metric"]
        return cost, value, f"{what}: {format_state(state, metric)} at {format_number(cost)}"

    if analysis["pareto"]:
        sets = [
            describe(point["cost"], point, _name_set(point["float_layers"]))
            for point in analysis["pareto"]
        ]
        return _draw_curve(sets, "Time of what can be int8, in microseconds", quality)
    shares = {layer.name: layer.macs_share for layer in report.layers}
    pinned = [name for name, precision in analysis["pinned"].items() if precision == "float"]
    chosen, sets = (
        list(pinned),
        [describe(_sum_shares(shares, pinned), analysis, "all that may be int8 in int8")],
    )
    for step in analysis["steps"]:
        chosen += step["layers"] or [step["layer"]]
        sets.append(describe(_sum_shares(shares, chosen), step, f"+ {step['layer']} in float"))
    if any(cost is None for cost, _, _ in sets):
        return None
    return _draw_curve(
        sets, "Multiplications that the analysis left in float, in % of all", quality
    )


def draw_tuning(report: StoredReport) -> list[Curve]:
    """The metric and the loss over the steps of fine-tuning, each where there are two points or more."""
    tuning = report.data.get("tuning")
    if tuning is None:
        return []
    metric = [
        (m["step"], m["metric"], f"step {m['step']}: {format_number(m['metric'])}")
        for m in tuning["curve"]
    ]
    curves = (
        _draw_curve(metric, "Step", "The metric"),
        _draw_curve(
            _average(tuning["losses"]), "Step", "Loss, as the mean of the steps up to a point"
        ),
    )
    return [curve for curve in curves if curve is not None]


def _average(losses: Sequence[float | None]) -> list[_Set]:
    """Means of equally many steps, so that the longest training has no more than so many points."""
    length = -(-len(losses) // _LOSSES) or 1
    sets: list[_Set] = []
    for start in range(0, len(losses), length):
        part = [loss for loss in losses[start : start + length] if loss is not None]
        if part:
            end, mean = min(start + length, len(losses)), sum(part) / len(part)
            sets.append((end, mean, f"step {end}: {mean:.4g}"))
    return sets


def _sum_shares(shares: dict[str, float | None], names: Sequence[str]) -> float | None:
    """In percent; None if one is not known."""
    found = [shares.get(name, 0.0) for name in names]
    return None if None in found else 100 * sum(share or 0.0 for share in found)


def _name_set(names: Sequence[str]) -> str:
    return f"{len(names)} units in float: {', '.join(names)}" if names else "all in int8"


def _draw_curve(sets: Sequence[_Set], x_label: str, y_label: str) -> Curve | None:
    found = [
        (cost, quality, label)
        for cost, quality, label in sets
        if cost is not None and quality is not None
    ]
    if len(found) < 2:
        return None
    costs, qualities = [cost for cost, _, _ in found], [sqnr for _, sqnr, _ in found]
    left, right = _widen(min(costs), max(costs))
    bottom, top = _widen(min(qualities), max(qualities))

    def across(cost: float) -> float:
        return round(100 * (cost - left) / (right - left), 2)

    def down(quality: float) -> float:
        return round(_PLOT_HEIGHT * (top - quality) / (top - bottom), 1)

    return Curve(
        points=tuple(Point(across(cost), down(quality), label) for cost, quality, label in found),
        x_ticks=tuple(
            Tick(across(number), f"{number:.4g}") for number in round_numbers(right, left)
        ),
        y_ticks=tuple(Tick(down(number), f"{number:.4g}") for number in round_numbers(top, bottom)),
        x_label=x_label,
        y_label=y_label,
    )


def _widen(low: float, high: float) -> tuple[float, float]:
    """A little more on both sides, so that no point lies on the edge."""
    space = 0.08 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - space, high + space


@dataclass(frozen=True)
class Node:
    """A layer in the drawing of the network; an end of the network has no number."""

    name: str
    kind: str
    number: int | None
    colour: str
    y: int


@dataclass(frozen=True)
class Network:
    """Layers below each other, with lines from each to those that read it.

    Args:
        nodes: In the order in which they run.
        edges: SVG paths.
        x: Where the nodes stand.
        width: Of the drawing.
        height: Of the drawing.
    """

    nodes: tuple[Node, ...]
    edges: tuple[str, ...]
    x: int
    width: int
    height: int


def draw_network(layers: Sequence[LayerRecord]) -> Network:
    """An arc diagram: what reads the layer before it hangs below it, other lines go round in lanes of their own."""
    rows = {layer.name: number for number, layer in enumerate(layers, 1)}
    last = len(layers) + 1
    pairs = [
        (rows[other], rows[layer.name])
        for layer in layers
        for other in layer.reads
        if other in rows
    ]
    pairs += [(0, rows[layer.name]) for layer in layers if layer.reads_input]
    pairs += [(rows[layer.name], last) for layer in layers if layer.writes_output]
    lanes = _assign_lanes([pair for pair in pairs if abs(pair[1] - pair[0]) > 1])
    x = _MARGIN + _LANE * (max(lanes.values(), default=-1) + 1)
    longest = max((len(layer.name) + len(layer.kind) for layer in layers), default=0)
    ends = [
        Node("input of the network", "", None, "end", _y(0)),
        Node("output of the network", "", None, "end", _y(last)),
    ]
    nodes = [
        Node(layer.name, layer.kind, number, layer.precision, _y(number + 1))
        for number, layer in enumerate(layers)
    ]
    edges = [
        _draw_edge(x, start, end, lanes.get((start, end))) for start, end in dict.fromkeys(pairs)
    ]
    return Network(
        (ends[0], *nodes, ends[1]), tuple(edges), x, x + 40 + 8 * longest, _y(last) + _ROW
    )


def _y(row: int) -> int:
    return _ROW * row + _ROW // 2


def _assign_lanes(pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """The innermost lane that is free over all rows between two nodes; short lines first."""
    lanes: dict[tuple[int, int], int] = {}
    taken: list[list[tuple[int, int]]] = []
    for start, end in sorted(set(pairs), key=lambda pair: (abs(pair[1] - pair[0]), pair)):
        low, high = min(start, end), max(start, end)
        free = (
            lane
            for lane, others in enumerate(taken)
            if all(high <= a or b <= low for a, b in others)
        )
        lane = next(free, len(taken) if len(taken) < _MOST_LANES else _MOST_LANES - 1)
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        lanes[start, end] = lane
    return lanes


def _draw_edge(x: int, start: int, end: int, lane: int | None) -> str:
    top, bottom = _y(start), _y(end)
    if lane is None:
        return f"M{x} {top}V{bottom}"
    left, bend = x - _LANE * (lane + 1) - 4, 4 if bottom > top else -4
    turn, down = left + 4, bottom - bend
    return f"M{x} {top}H{turn}Q{left} {top} {left} {top + bend}V{down}Q{left} {bottom} {turn} {bottom}H{x}"
