"""Saved statistics for a person: tables, and a page with the histogram of every tensor. Needs no torch."""

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

_COLUMNS = 128  # of a plot; a file has up to 4096 bins
_WIDTH, _HEIGHT = 640, 160  # of a plot without its labels


def format_statistics(summary: dict[str, Any]) -> str:
    """Three tables in the order of the network: figures, amax by every method, share of the values beyond it.

    Args:
        summary: From `Statistics.summarize`.
    """
    tensors: dict[str, dict[str, Any]] = summary["tensors"]
    methods = list(dict.fromkeys(method for entry in tensors.values() for method in entry["amax"]))
    figures = [[printable(name), *_figures(entry).values()] for name, entry in tensors.items()]
    amax = [
        [printable(name), *(_cell(e["amax"].get(m), "{:.4g}") for m in methods)]
        for name, e in tensors.items()
    ]
    clipped = [
        [printable(name), *(_cell(e["clipped"].get(m), "{:.3%}") for m in methods)]
        for name, e in tensors.items()
    ]
    state = (
        ""
        if summary["complete"]
        else "; the pass was cut off, what follows is of a part of the data"
    )
    return "\n\n".join(
        [
            f"{len(tensors)} tensors, {summary['batches']} batches{state}",
            format_columns([["values", "count", "zeros", "mean", "std", "max"], *figures]),
            format_columns([["amax", *methods], *amax]),
            format_columns([["clipped share", *methods], *clipped]),
        ]
    )


def format_ranges(statistics: Statistics, ranges: Mapping[str, float]) -> str:
    """One line for each range: amax, and the share of the values beyond it.

    Args:
        statistics: What they were solved from.
        ranges: From `Statistics.solve_all`.
    """
    rows = [
        [printable(name), f"{amax:.6g}", f"{statistics.clipped_share(name, amax):.3%}"]
        for name, amax in ranges.items()
    ]
    return format_columns([["tensor", "amax", "clipped"], *rows])


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells below each other: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        columns = zip(cells, widths[1:], strict=True)
        lines.append(
            "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in columns)])
        )
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _figures(entry: dict[str, Any]) -> dict[str, str]:
    """What is said of the values of a tensor, in a few characters each."""
    return {
        "count": f"{entry['count']:,}",
        "zeros": f"{entry['zeros'] / max(entry['count'], 1):.2%}",
        "mean": f"{entry['mean']:.4g}",
        "std": f"{entry['std']:.4g}",
        "max": f"{entry['absmax']:.4g}",
    }


def write_plots(statistics: Statistics, summary: dict[str, Any], path: Path) -> Path:
    """Write one HTML page, atomically: of each tensor the histogram of |x|, and where every method clips it.

    The page holds all it needs, about 5 kB a tensor, and follows the reader's choice of light or dark.

    Args:
        statistics: What to plot.
        summary: Of the same, from `Statistics.summarize`.
        path: Where to write.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    environment = load_templates(Path(__file__).parent)
    plots = [
        _plot(name, tensor, summary["tensors"][name]) for name, tensor in statistics.tensors.items()
    ]
    page = environment.get_template("show.html").render(
        plots=plots, summary=summary, width=_WIDTH, height=_HEIGHT
    )
    return write_atomic(path, page)


def load_templates(folder: Path) -> jinja2.Environment:
    """The templates of a folder; what is put into them is escaped."""
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
    """A labelled place on an axis, from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class _Line:
    """Where a method clips; `at` in pixels, `number` is that of its colour."""

    number: int
    method: str
    at: float
    amax: str
    clipped: str


@dataclass(frozen=True)
class _Plot:
    """All that the template draws of one tensor; places in pixels."""

    name: str
    figures: dict[str, str]
    outline: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[_Line]


def _plot(name: str, tensor: TensorStatistics, entry: dict[str, Any]) -> _Plot:
    columns, end = tensor.histogram(_COLUMNS)
    decades = max(math.log10(columns.max(initial=0) + 1), 1)
    heights = np.log10(columns + 1) / decades * _HEIGHT
    return _Plot(
        name=name,
        figures=_figures(entry),
        outline=_outline(heights),
        x_ticks=[Tick(value / end * _WIDTH, f"{value:.4g}") for value in round_numbers(end)],
        y_ticks=[
            Tick(_HEIGHT * (1 - math.log10(10**decade + 1) / decades), f"{10**decade:,}")
            for decade in range(0, int(decades) + 1, max(1, int(decades) // 4))
            if math.log10(10**decade + 1) <= decades
        ],
        lines=[
            _Line(
                list(SOLVERS).index(method),
                method,
                amax / end * _WIDTH,
                f"{amax:.4g}",
                f"{entry['clipped'][method]:.3%}",
            )
            for method, amax in entry["amax"].items()
        ],
    )


def _outline(heights: Iterable[float]) -> str:
    """The filled steps of a histogram as an SVG path."""
    steps = [round(_HEIGHT - height) for height in heights]
    width = _WIDTH / len(steps)
    path = "".join(f"V{top}H{(at + 1) * width:.0f}" for at, top in enumerate(steps))
    return f"M0 {_HEIGHT}{path}V{_HEIGHT}Z"


def round_numbers(end: float, start: float = 0.0) -> list[float]:
    """About five round numbers from a start to an end above it."""
    span = end - start
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step * power for step in (0.2, 0.5, 1, 2) if span / (step * power) <= 6)
    return [number * step for number in range(math.ceil(start / step - 1e-9), int(end / step) + 1)]
