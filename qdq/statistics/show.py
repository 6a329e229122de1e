"""Shows saved statistics: tables, and a page with the histogram of every tensor. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from qdq.files import write_atomic
from qdq.observers.solve import SOLVERS
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.statistics import Statistics
from qdq.text import printable

_COLUMNS = 128  # of a plot; a file has many more bins, see `tensor_statistics.NUM_BINS`
_WIDTH, _HEIGHT = 640, 160  # of a plot without its labels


def format_statistics(summary: dict[str, Any]) -> str:
    """Three tables in the order of the network: figures, amax by every method, fraction of the values outside.

    Args:
        summary: From `Statistics.summarize`.
    """
    tensors: dict[str, dict[str, Any]] = summary["tensors"]
    methods = _list_methods(tensors)
    figure_rows = [["values", "count", "zeros", "mean", "std", "max"]]
    amax_rows = [["amax", *methods]]
    clipped_rows = [["clipped fraction", *methods]]
    for name, entry in tensors.items():
        label = printable(name)
        figure_rows.append([label, *_figures(entry).values()])
        amax_rows.append([label, *_cells(entry["amax"], methods, "{:.4g}")])
        clipped_rows.append([label, *_cells(entry["clipped"], methods, "{:.3%}")])

    title = f"{len(tensors)} tensors, {summary['batches']} batches"
    if not summary["complete"]:
        title += "; the pass was cut off, so these figures are from a part of the data"
    tables = map(format_columns, (figure_rows, amax_rows, clipped_rows))
    return "\n\n".join([title, *tables])


def _list_methods(tensors: Mapping[str, dict[str, Any]]) -> list[str]:
    """The methods by which any tensor has a range, in order."""
    methods: dict[str, None] = {}
    for entry in tensors.values():
        methods |= dict.fromkeys(entry["amax"])
    return list(methods)


def format_ranges(statistics: Statistics, ranges: Mapping[str, float]) -> str:
    """One line for each range: amax, and the fraction of the values outside.

    Args:
        statistics: The statistics that the ranges were computed from.
        ranges: From `Statistics.solve_all`.
    """
    rows = [["tensor", "amax", "clipped"]]
    for name, amax in ranges.items():
        clipped = statistics.clipped_share(name, amax)
        rows.append([printable(name), f"{amax:.6g}", f"{clipped:.3%}"])
    return format_columns(rows)


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells in columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        columns = [name.ljust(widths[0])]
        for cell, width in zip(cells, widths[1:], strict=True):
            columns.append(cell.rjust(width))
        lines.append("  ".join(columns))
    return "\n".join(lines)


def _cells(values: Mapping[str, float], methods: Iterable[str], form: str) -> list[str]:
    """The values of the methods as text; "-" for a method without one."""
    cells = []
    for method in methods:
        cells.append(form.format(values[method]) if method in values else "-")
    return cells


def _figures(entry: dict[str, Any]) -> dict[str, str]:
    """The figures of a tensor as short texts."""
    return {
        "count": f"{entry['count']:,}",
        "zeros": f"{entry['zeros'] / max(entry['count'], 1):.2%}",
        "mean": f"{entry['mean']:.4g}",
        "std": f"{entry['std']:.4g}",
        "max": f"{entry['absmax']:.4g}",
    }


def write_plots(statistics: Statistics, summary: dict[str, Any], path: Path) -> Path:
    """Write one HTML page, atomically: the histogram of |x| of each tensor, and where every method clips it.

    The page needs no other file, has about 5 kB per tensor, and follows the reader's choice of light or dark.

    Args:
        statistics: The statistics to plot.
        summary: From `Statistics.summarize` of these statistics.
        path: The file to write.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    environment = load_templates(Path(__file__).parent)
    plots = []
    for name, tensor in statistics.tensors.items():
        plots.append(_make_plot(name, tensor, summary["tensors"][name]))
    page = environment.get_template("show.html").render(
        plots=plots, summary=summary, width=_WIDTH, height=_HEIGHT
    )
    return write_atomic(path, page)


def load_templates(folder: Path) -> jinja2.Environment:
    """The templates in a folder; values in them are escaped."""
    loader = jinja2.FileSystemLoader(folder)
    return jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class _Line:
    """The position where a method clips; `at` is in pixels, `number` is the number of its colour."""

    number: int
    method: str
    at: float
    amax: str
    clipped: str


@dataclass(frozen=True)
class _Plot:
    """Everything that the template draws for one tensor; positions in pixels."""

    name: str
    figures: dict[str, str]
    outline: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[_Line]


def _make_plot(name: str, tensor: TensorStatistics, entry: dict[str, Any]) -> _Plot:
    columns, end = tensor.histogram(_COLUMNS)
    decades = max(math.log10(columns.max(initial=0) + 1), 1)
    heights = np.log10(columns + 1) / decades * _HEIGHT
    return _Plot(
        name=name,
        figures=_figures(entry),
        outline=_outline(heights),
        x_ticks=[Tick(value / end * _WIDTH, f"{value:.4g}") for value in round_numbers(end)],
        y_ticks=_list_count_ticks(decades),
        lines=_list_lines(entry, end),
    )


def _list_count_ticks(decades: float) -> list[Tick]:
    """Powers of ten on the logarithmic axis of counts, which shows log10(count + 1).

    Args:
        decades: The end of the axis.
    """
    ticks = []
    step = max(1, int(decades) // 4)
    for decade in range(0, int(decades) + 1, step):
        height = math.log10(10**decade + 1)
        if height <= decades:
            ticks.append(Tick(_HEIGHT * (1 - height / decades), f"{10**decade:,}"))
    return ticks


def _list_lines(entry: dict[str, Any], end: float) -> list[_Line]:
    """A line for each method.

    Args:
        entry: The summary of the tensor.
        end: The end of the axis of |x|.
    """
    methods = list(SOLVERS)
    lines = []
    for method, amax in entry["amax"].items():
        line = _Line(
            number=methods.index(method),
            method=method,
            at=amax / end * _WIDTH,
            amax=f"{amax:.4g}",
            clipped=f"{entry['clipped'][method]:.3%}",
        )
        lines.append(line)
    return lines


def _outline(heights: Iterable[float]) -> str:
    """The filled steps of a histogram as an SVG path."""
    tops = [round(_HEIGHT - height) for height in heights]
    width = _WIDTH / len(tops)
    path = f"M0 {_HEIGHT}"
    for index, top in enumerate(tops, start=1):
        path += f"V{top}H{index * width:.0f}"
    return f"{path}V{_HEIGHT}Z"


def round_numbers(end: float, start: float = 0.0) -> list[float]:
    """About five round numbers from a start to an end above it."""
    span = end - start
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step * power for step in (0.2, 0.5, 1, 2) if span / (step * power) <= 6)
    first = math.ceil(start / step - 1e-9)
    return [number * step for number in range(first, int(end / step) + 1)]
