"""The geometry of the charts of a report; the templates draw them.

Horizontal positions are in percent, so that a chart is as wide as the page and its text keeps its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qdq.report.load import StoredReport
from qdq.report.records import LayerRecord, Sensitivity
from qdq.report.wording import format_gain, format_number, format_state
from qdq.statistics.show import Tick, round_numbers

BARS = 20
_PLOT_HEIGHT = 220  # pixels
_MOST_LOSSES = 50  # points of the curve of the loss
_EDGE = 0.08  # of the span of the points, left free on both sides of a curve

# The drawing of the network, in pixels.
_ROW, _LANE, _MARGIN = 22, 9, 14
_MOST_LANES = 40
_LETTER = 8
_BEND = 4  # radius of the corners of a line


@dataclass(frozen=True)
class Bar:
    """One layer or group in the chart of sensitivity; positions are in percent.

    Args:
        name: The layer or group.
        anchor: Number of its first layer in the table.
        is_float: Whether it is in float now.
        left: Left end of the bar.
        width: Width of the bar.
        low: Lower end of the interval; None if there is none.
        high: Upper end of the interval.
        label: The gain as text.
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
        bars: The most sensitive first.
        zero: Position of a gain of zero, in percent.
        more: Number of layers and groups that are not drawn.
        unit: The unit of the gains.
    """

    bars: tuple[Bar, ...]
    zero: float
    more: int
    unit: str


def list_units(report: StoredReport) -> list[Sensitivity]:
    """The layers and groups that were ranked, the most sensitive first."""
    units = {}
    for layer in report.layers:
        if layer.sensitivity is not None:
            units[layer.sensitivity.rank] = layer.sensitivity

    return [units[rank] for rank in sorted(units)]


def unit_of_gain(report: StoredReport) -> str:
    """The unit of the gains: dB, nats, or the name of the metric."""
    metric = str(report.data["analysis"]["metric_name"])
    return {"sqnr": "dB", "kl": "nats"}.get(metric, metric)


@dataclass(frozen=True)
class _Scale:
    """Maps the values from `low` to `high` to 0 to 100 percent."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """The position of a value in percent."""
        return self.length(value - self.low)

    def length(self, value: float) -> float:
        """The length of a bar from zero to a value in percent."""
        span = max(self.high - self.low, 1e-12)  # no division by zero if all gains are zero
        return round(100 * abs(value) / span, 2)


def draw_bars(report: StoredReport, count: int = BARS) -> Bars:
    """Draw the most sensitive layers and groups: the gain of each in float, with its 95 % interval."""
    units = list_units(report)
    shown_units = units[:count]
    scale = _fit_scale(shown_units)
    places = {layer.name: place for place, layer in enumerate(report.layers)}

    bars = []
    for unit in shown_units:
        anchor = places[unit.layers[0]]
        is_float = report.layers[anchor].precision == "float"
        bars.append(_draw_bar(unit, scale, anchor, is_float))

    return Bars(tuple(bars), scale.place(0.0), len(units) - len(bars), unit_of_gain(report))


def _fit_scale(units: Sequence[Sensitivity]) -> _Scale:
    """A scale that covers zero, all gains and all intervals."""
    values = [0.0]
    for unit in units:
        for value in (unit.gain, unit.low, unit.high):
            if value is not None:
                values.append(value)

    return _Scale(min(values), max(values))


def _draw_bar(unit: Sensitivity, scale: _Scale, anchor: int, is_float: bool) -> Bar:
    """Draw the bar of one layer or group.

    Args:
        unit: The layer or group.
        scale: The scale of the chart.
        anchor: Number of its first layer in the table.
        is_float: Whether it is in float now.
    """
    gain = unit.gain
    if gain is None:  # not finite: the bar goes to the end of the scale; an estimate has no bar
        gain = scale.high if unit.is_exact else 0.0
    return Bar(
        name=unit.unit,
        anchor=anchor,
        is_float=is_float,
        left=scale.place(min(gain, 0.0)),
        width=scale.length(gain),
        low=None if unit.low is None else scale.place(unit.low),
        high=None if unit.high is None else scale.place(unit.high),
        label=format_gain(unit),
    )


@dataclass(frozen=True)
class Point:
    """A point of a curve: `x` in percent, `y` in pixels from the top."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Quality against cost, or a figure over the steps of fine-tuning.

    Args:
        points: From left to right.
        x_ticks: Ticks of the horizontal axis, in percent.
        y_ticks: Ticks of the vertical axis, in pixels from the top.
        x_label: Title of the horizontal axis.
        y_label: Title of the vertical axis.
        height: In pixels.
    """

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str
    height: int = _PLOT_HEIGHT


class _Sample(NamedTuple):
    """A point of a curve in its own units; an unknown coordinate is None."""

    x: float | None
    y: float | None
    label: str


def draw_curve(report: StoredReport) -> Curve | None:
    """Draw the Pareto front if times were given, else the steps of the search over the work in float.

    The vertical axis is the metric that ranked the layers.

    Returns:
        The curve; None if there is only one point, or if the size of a layer is not known.
    """
    if report.data["analysis"]["pareto"]:
        samples = _sample_front(report)
        return _draw_samples(
            samples, "Time of the quantizable layers, in microseconds", _name_quality(report)
        )
    samples = _sample_steps(report)
    if any(sample.x is None for sample in samples):
        return None
    return _draw_samples(
        samples,
        "Multiplications that the analysis left in float, in % of all",
        _name_quality(report),
    )


def _name_quality(report: StoredReport) -> str:
    """Title of the axis with the metric that ranked the layers."""
    metric = str(report.data["analysis"]["metric_name"])
    if metric == "sqnr":
        return "SQNR of the outputs, in dB"
    unit = unit_of_gain(report)
    return metric if unit == metric else f"{metric}, in {unit}"


def _sample_front(report: StoredReport) -> list[_Sample]:
    """Sets of float layers on the Pareto front: their time and the quality of the outputs."""
    samples = []
    for point in report.data["analysis"]["pareto"]:
        names = point["float_layers"]
        title = (
            f"{len(names)} units in float: {', '.join(names)}"
            if names
            else f"all {report.quantized_state}"
        )
        samples.append(_sample(report, point["cost"], point, title))

    return samples


def _sample_steps(report: StoredReport) -> list[_Sample]:
    """States of the search: the percentage of the work that it left in float and the quality of the outputs."""
    analysis = report.data["analysis"]
    float_layers = []
    for name, precision in analysis["pinned"].items():
        if precision == "float":
            float_layers.append(name)

    work = _sum_work(report, float_layers)
    samples = [_sample(report, work, analysis, f"all quantizable layers {report.quantized_state}")]

    for step in analysis["steps"]:
        float_layers += step["layers"] or [step["layer"]]
        work = _sum_work(report, float_layers)
        samples.append(_sample(report, work, step, f"+ {step['layer']} in float"))

    return samples


def _sample(
    report: StoredReport, cost: float | None, state: Mapping[str, Any], title: str
) -> _Sample:
    """One state of the model.

    Args:
        report: The report, which names the metric that ranked the layers.
        cost: Time or work of the state; None if not known.
        state: `sqnr_db` and `metric` of the state.
        title: The float layers in words.
    """
    metric = report.data["analysis"]["metric_name"]
    quality = state["sqnr_db"] if metric == "sqnr" else state["metric"]
    label = f"{title}: {format_state(state, metric)} at {format_number(cost)}"
    return _Sample(cost, quality, label)


def _sum_work(report: StoredReport, names: Sequence[str]) -> float | None:
    """The percentage of all multiplications that are in some layers; None if the size of one is not known."""
    fractions = {layer.name: layer.macs_share for layer in report.layers}
    total = 0.0
    for name in names:
        fraction = fractions.get(name, 0.0)
        if fraction is None:
            return None
        total += fraction

    return 100 * total


def draw_tuning(report: StoredReport) -> list[Curve]:
    """Draw the metric and the loss over the steps of fine-tuning, each if it has two points or more."""
    tuning = report.data.get("tuning")
    if tuning is None:
        return []
    measurements = []
    for measurement in tuning["curve"]:
        step, metric = measurement["step"], measurement["metric"]
        measurements.append(_Sample(step, metric, f"step {step}: {format_number(metric)}"))

    losses = _average_losses(tuning["losses"])

    metric_curve = _draw_samples(measurements, "Step", "The metric")
    loss_curve = _draw_samples(losses, "Step", "Loss, as the mean of the steps up to a point")
    return [curve for curve in (metric_curve, loss_curve) if curve is not None]


def _average_losses(losses: Sequence[float | None]) -> list[_Sample]:
    """Average the losses over spans of equal length, so that a long training has at most `_MOST_LOSSES` points."""
    length = max(-(-len(losses) // _MOST_LOSSES), 1)
    samples = []
    for start in range(0, len(losses), length):
        window = [loss for loss in losses[start : start + length] if loss is not None]
        if window:
            end = min(start + length, len(losses))
            mean = sum(window) / len(window)
            samples.append(_Sample(end, mean, f"step {end}: {mean:.4g}"))

    return samples


def _draw_samples(samples: Sequence[_Sample], x_label: str, y_label: str) -> Curve | None:
    """Draw the samples whose coordinates are both known.

    Args:
        samples: From left to right.
        x_label: Title of the horizontal axis.
        y_label: Title of the vertical axis.

    Returns:
        The curve; None if there are fewer than two such samples.
    """
    xs, ys, labels = [], [], []
    for sample in samples:
        if sample.x is not None and sample.y is not None:
            xs.append(sample.x)
            ys.append(sample.y)
            labels.append(sample.label)

    if len(xs) < 2:
        return None
    left, right = _widen(min(xs), max(xs))
    bottom, top = _widen(min(ys), max(ys))

    def across(x: float) -> float:
        """The horizontal position of a value, in percent."""
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        """The vertical position of a value, in pixels from the top."""
        return round(_PLOT_HEIGHT * (top - y) / (top - bottom), 1)

    points = [Point(across(x), down(y), label) for x, y, label in zip(xs, ys, labels, strict=True)]
    x_ticks = [Tick(across(number), f"{number:.4g}") for number in round_numbers(right, left)]
    y_ticks = [Tick(down(number), f"{number:.4g}") for number in round_numbers(top, bottom)]
    return Curve(tuple(points), tuple(x_ticks), tuple(y_ticks), x_label, y_label)


def _widen(low: float, high: float) -> tuple[float, float]:
    """Add a little on both sides, so that no point lies on the edge."""
    space = _EDGE * (high - low)
    if space == 0:
        space = 0.1 * max(abs(high), 1.0)
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
    """The layers in a column, with lines from each layer to its readers.

    Args:
        nodes: In the order of execution.
        edges: SVG paths.
        x: Horizontal position of the nodes.
        width: Width of the drawing.
        height: Height of the drawing.
    """

    nodes: tuple[Node, ...]
    edges: tuple[str, ...]
    x: int
    width: int
    height: int


_Edge = tuple[int, int]  # from one row to another; the ends of the network have rows, too


def draw_network(layers: Sequence[LayerRecord]) -> Network:
    """Draw an arc diagram: a line to the next layer is straight, other lines run in lanes on the left."""
    last_row = len(layers) + 1
    edges = _list_edges(layers)
    lanes = _assign_lanes(edges)
    x = _MARGIN + _LANE * (max(lanes.values(), default=-1) + 1)

    nodes = [Node("input of the network", "", None, "end", _y(0))]
    longest_text = 0
    for number, layer in enumerate(layers):
        nodes.append(Node(layer.name, layer.kind, number, layer.precision, _y(number + 1)))
        longest_text = max(longest_text, len(layer.name) + len(layer.kind))

    nodes.append(Node("output of the network", "", None, "end", _y(last_row)))

    paths = [_draw_edge(x, edge, lanes.get(edge)) for edge in edges]
    width = x + 40 + _LETTER * longest_text
    return Network(tuple(nodes), tuple(paths), x, width, _y(last_row) + _ROW)


def _list_edges(layers: Sequence[LayerRecord]) -> list[_Edge]:
    """Each pair of a row and a row that reads it, once: first pairs of layers, then those of the two ends.

    Row 0 is the input of the network; the layers follow, and after them its output.
    """
    rows = {layer.name: row for row, layer in enumerate(layers, 1)}
    output_row = len(layers) + 1
    inner_edges, input_edges, output_edges = [], [], []
    for layer in layers:
        row = rows[layer.name]
        for source in layer.reads:
            if source in rows:
                inner_edges.append((rows[source], row))
        if layer.reads_input:
            input_edges.append((0, row))
        if layer.writes_output:
            output_edges.append((row, output_row))

    edges = dict.fromkeys(inner_edges + input_edges + output_edges)
    return list(edges)


def _assign_lanes(edges: Sequence[_Edge]) -> dict[_Edge, int]:
    """Give each line that skips a row the innermost lane that is free over all its rows; short lines first."""
    long_edges = [edge for edge in edges if _length(edge) > 1]
    long_edges.sort(key=lambda edge: (_length(edge), edge))

    lanes: dict[_Edge, int] = {}
    spans: list[list[_Edge]] = []  # of the lines in each lane
    for edge in long_edges:
        span = (min(edge), max(edge))
        lane = _find_free_lane(span, spans)
        if lane == len(spans):
            spans.append([])
        spans[lane].append(span)
        lanes[edge] = lane

    return lanes


def _length(edge: _Edge) -> int:
    """Number of rows that a line spans."""
    return abs(edge[1] - edge[0])


def _find_free_lane(span: _Edge, spans: Sequence[Sequence[_Edge]]) -> int:
    """The first lane without a line that overlaps a span.

    Args:
        span: First and last row of a line.
        spans: Spans of the lines in each lane.

    Returns:
        The number of the lane; a new one if no lane is free, or the last one when there are too many.
    """
    low, high = span
    for lane, taken in enumerate(spans):
        if all(high <= start or end <= low for start, end in taken):
            return lane

    return min(len(spans), _MOST_LANES - 1)


def _draw_edge(x: int, edge: _Edge, lane: int | None) -> str:
    """An SVG path: straight down, or to the left, along a lane with round corners, and back.

    Args:
        x: Horizontal position of the nodes.
        edge: The two rows.
        lane: Its lane; None for a line to the next row.
    """
    top, bottom = _y(edge[0]), _y(edge[1])
    if lane is None:
        return f"M{x} {top}V{bottom}"

    left = x - _LANE * (lane + 1) - _BEND
    turn = left + _BEND
    bend = _BEND if bottom > top else -_BEND
    first_corner = f"M{x} {top}H{turn}Q{left} {top} {left} {top + bend}"
    second_corner = f"V{bottom - bend}Q{left} {bottom} {turn} {bottom}H{x}"
    return first_corner + second_corner


def _y(row: int) -> int:
    """The middle of a row, in pixels from the top."""
    return _ROW * row + _ROW // 2
