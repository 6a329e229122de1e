"""The page of one run: one HTML file that needs nothing but itself."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qdq.report.charts import (
    draw_bars,
    draw_curve,
    draw_network,
    draw_tuning,
    list_units,
    unit_of_gain,
)
from qdq.report.load import StoredReport, guarded
from qdq.report.tables import list_census, list_commands, list_details, list_rows, list_skipped
from qdq.report.wording import format_number, format_share, format_state
from qdq.statistics.show import load_templates


def render_report(report: StoredReport) -> str:
    """The page of one run.

    Args:
        report: From `load_report` or `parse_report`.

    Raises:
        DataError: The report lacks something, or holds it in another form.
    """
    return guarded(report.path, lambda: render("run.html", **_view(report)))


def render(template: str, **values: Any) -> str:
    """A page from a template of this package.

    Raises:
        LookupError: A value has no such field.
    """
    try:
        return _load_environment().get_template(template).render(**values)
    except jinja2.UndefinedError as error:
        raise LookupError(str(error)) from error


@functools.cache
def _load_environment() -> jinja2.Environment:
    environment = load_templates(Path(__file__).parent / "templates")
    environment.filters.update(number=format_number, share=format_share, embed=_embed)
    return environment


def _embed(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no `<` in it, so that no text ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


@dataclass(frozen=True)
class Figure:
    """A number that decides.

    Args:
        label: What it is.
        value: In words.
        note: What it is to be compared with.
        is_bad: Whether a person should look.
    """

    label: str
    value: str
    note: str = ""
    is_bad: bool = False


def list_figures(report: StoredReport) -> list[Figure]:
    """The summary in numbers, what decides first."""
    data = report.data
    summary, candidates = data["summary"], data["summary"]["candidates"]
    rows = list(candidates.values())
    reference, final = rows[0], rows[-1]
    expected, missing = summary["census_expected_int8"], len(summary["census_missing_int8"])
    figures = [
        Figure(
            "layers in int8",
            f"{int8_layers(report)} of {summary['weighted_layers']}",
            "with weights, in the file",
        ),
        Figure(
            "multiplications in int8",
            format_share(int8_share(report)),
            "in the engine, of those of known size",
        ),
        Figure(
            "SQNR of the outputs",
            _decibels(final["sqnr_db"]),
            f"{final['name']} against {reference['name']}",
        ),
        Figure(
            "same answer as float",
            format_share(final["agreement"]),
            f"on {data['evaluation']['images']} images",
        ),
    ]
    if final["top1"] is not None:
        change = 100 * (final["top1"] - reference["top1"])
        note = f"float {format_share(reference['top1'])}: {change:+.1f} points"
        figures.append(Figure("top-1", format_share(final["top1"]), note))
    float_size = f"float parameters {format_number(reference['megabytes'], '.1f')} MB"
    backend = f"{data['build']['backend']} {data['build']['backend_version']}"
    expected, missing = summary["census_expected_int8"], len(summary["census_missing_int8"])
    census = "layers in int8 in the engine, of those expected"
    findings = "what must be known before shipping"
    return [
        *figures,
        Figure("ONNX file", f"{summary['onnx_megabytes']:.1f} MB", float_size),
        Figure("engine", f"{summary['engine_megabytes']:.1f} MB", backend),
        Figure("census", f"{expected - missing} of {expected}", census, missing > 0),
        Figure("findings", str(len(data["findings"])), findings, bool(data["findings"])),
    ]


def _decibels(value: float | None) -> str:
    return "no error" if value is None else f"{value:.2f} dB"


def int8_layers(report: StoredReport) -> int:
    """How many layers with weights are int8."""
    return sum(layer.precision == "int8" and layer.weights > 0 for layer in report.layers)


def int8_share(report: StoredReport) -> float | None:
    """Part of the known multiplications that the engine runs in int8, 0..1."""
    share: float | None = report.data["summary"]["int8_macs"]
    return share


def _view(report: StoredReport) -> dict[str, Any]:
    data = report.data
    return {
        "title": data["model"],
        "report": data,
        "run": report.name,
        "figures": list_figures(report),
        "headline": _headline(report),
        "candidates": data["evaluation"]["candidates"],
        "bars": draw_bars(report),
        "curve": draw_curve(report),
        "tuning": data.get("tuning"),
        "tuning_curves": draw_tuning(report),
        "network": draw_network(report.layers),
        "rows": list_rows(report.layers),
        "kinds": sorted({layer.kind for layer in report.layers}),
        "unit": unit_of_gain(report),
        "details": [list_details(layer, unit_of_gain(report)) for layer in report.layers],
        "census": list_census(data["build"]["layers"]),
        "skipped": list_skipped(report),
        "commands": list_commands(report),
    }


def _headline(report: StoredReport) -> str:
    """What is to be decided, in two sentences."""
    data, summary = report.data, report.data["summary"]
    final = list(summary["candidates"].values())[-1]
    sqnr = "" if final["sqnr_db"] is None else f", with {final['sqnr_db']:.2f} dB SQNR"
    headline = (
        f"{int8_layers(report)} of {summary['weighted_layers']} layers with weights are int8; {final['name']} gives "
        f"the answer of the float model on {format_share(final['agreement'])} of {data['evaluation']['images']} "
        f"images{sqnr}."
    )
    analysis = data["analysis"]
    if analysis["steps"]:
        first, last = (
            format_state(state, analysis["metric_name"])
            for state in (analysis, analysis["steps"][-1])
        )
        what = "SQNR" if analysis["metric_name"] == "sqnr" else "quality"
        headline += (
            f" The analysis left {len(analysis['steps'])} of {len(list_units(report))} in float, which took the {what} "
            f"on its {analysis['images']} images from {first} to {last}; it ended: {analysis['stopped_by']}."
        )
    return headline
