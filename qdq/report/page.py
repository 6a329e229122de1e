"""The page of one run: one HTML file that loads nothing else."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from qdq.product_types import LOW_TYPES, word_of
from qdq.report.charts import (
    draw_bars,
    draw_curve,
    draw_network,
    draw_tuning,
    list_units,
    unit_of_gain,
)
from qdq.report.load import PAGE_FILE, StoredReport, guarded
from qdq.report.sections import TypeCensus
from qdq.report.tables import (
    list_census,
    list_commands,
    list_details,
    list_formats,
    list_rows,
    list_skipped,
)
from qdq.report.targets import TargetResult, list_target_rows
from qdq.report.wording import format_decibels, format_number, format_percent, format_state
from qdq.run import list_targets
from qdq.statistics.show import load_templates
from qdq.text import printable


def render_report(
    report: StoredReport, targets: Sequence[TargetResult] = (), page: Path | None = None
) -> str:
    """Render the page of one run.

    Args:
        report: From `load_report` or `parse_report`.
        targets: Results of its bundle, from `load_targets`; a column each.
        page: The file that it will be, for its links; by default the page in the run folder.

    Raises:
        DataError: A field is missing or has another form.
    """
    run_page = _link_to_run(report, page or report.path.parent / PAGE_FILE)
    return guarded(
        report.path, lambda: render("run.html", run_page=run_page, **_view(report, targets))
    )


def _link_to_run(report: StoredReport, page: Path) -> str:
    """The link to the page of all targets; "" if the run is not one of several targets, or was moved away from them.

    That page is written after those of the targets.
    """
    folder = report.path.absolute().parent
    if folder.name not in list_targets(folder.parent):
        return ""
    return link_file(folder.parent / PAGE_FILE, page)


def link_file(path: Path, page: Path) -> str:
    """The link to a file from the place of a page.

    Args:
        path: The file.
        page: The page.
    """
    return quote(os.fsencode(os.path.relpath(path, page.parent)))


def render(template: str, **values: Any) -> str:
    """Render a template of this package.

    Raises:
        LookupError: A value has no such field.
    """
    try:
        return _load_environment().get_template(template).render(**values)
    except jinja2.UndefinedError as error:
        raise LookupError(str(error)) from error


@functools.cache
def _load_environment() -> jinja2.Environment:
    """The templates, with the filters that they use."""
    environment = load_templates(Path(__file__).parent / "templates")
    environment.filters.update(number=format_number, percent=format_percent, embed=_embed)
    return environment


def _embed(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: without `<`, so that no text ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


@dataclass(frozen=True)
class Figure:
    """A number that decides.

    Args:
        label: Its name.
        value: The number as text.
        note: What to compare it with.
        is_bad: Whether a user should look at it.
    """

    label: str
    value: str
    note: str = ""
    is_bad: bool = False


def list_figures(report: StoredReport) -> list[Figure]:
    """The summary in numbers, the most important ones first."""
    return [*_list_quality(report), *_list_sizes(report), *_list_problems(report)]


def _list_quality(report: StoredReport) -> list[Figure]:
    """How much is in int8 or FP8, and how close the outputs are to the float model's."""
    data = report.data
    reference, final = reference_candidate(report), final_candidate(report)
    figures = [
        Figure(
            f"layers in {_name_precisions(report)}",
            f"{quantized_layers(report)} of {data['summary']['weighted_layers']}",
            "with weights, in the file",
        ),
        *_list_fractions(report),
        Figure(
            "SQNR of the outputs",
            format_decibels(final["sqnr_db"]),
            f"{final['name']} against {reference['name']}",
        ),
    ]
    for output in final.get("outputs") or ():
        label = f"SQNR of {printable(output['name'])}"
        figures.append(Figure(label, format_decibels(output["sqnr_db"]), "one of several outputs"))
    if final["agreement"] is not None:
        note = f"on {data['evaluation']['images']} samples"
        figures.append(Figure("same answer as float", format_percent(final["agreement"]), note))
    for metric, score in (final.get("scores") or {}).items():
        note = f"float {format_number(reference['scores'][metric], '.4f')}"
        figures.append(Figure(printable(metric), format_number(score, ".4f"), note))
    if final["top1"] is not None:
        change = 100 * (final["top1"] - reference["top1"])
        note = f"float {format_percent(reference['top1'])}: {change:+.1f} points"
        figures.append(Figure("top-1", format_percent(final["top1"]), note))

    return figures


def _list_fractions(report: StoredReport) -> list[Figure]:
    """The fraction of the multiplications in each type."""
    figures = []
    for type_name, census in read_census(report).items():
        label = f"multiplications in {word_of(type_name)}"
        note = "in the engine, of those of known size"
        figures.append(Figure(label, format_percent(census["macs"]), note))
    return figures


def _list_sizes(report: StoredReport) -> list[Figure]:
    """Sizes of the ONNX file and of the engine."""
    summary, build = report.data["summary"], report.data["build"]
    float_megabytes = format_number(reference_candidate(report)["megabytes"], ".1f")
    return [
        Figure(
            "ONNX file",
            f"{summary['onnx_megabytes']:.1f} MB",
            f"float parameters {float_megabytes} MB",
        ),
        Figure(
            "engine",
            f"{summary['engine_megabytes']:.1f} MB",
            f"{build['backend']} {build['backend_version']}",
        ),
    ]


def _list_problems(report: StoredReport) -> list[Figure]:
    """Numbers that should be zero, or as large as expected."""
    findings = report.data["findings"]
    census = read_census(report)
    words = " and ".join(map(word_of, census))
    expected, reached = count_layers(census)
    return [
        Figure(
            "census",
            f"{reached} of {expected}",
            f"layers in {words} in the engine, of those expected",
            is_bad=reached < expected,
        ),
        Figure(
            "findings",
            str(len(findings)),
            "what you must know before shipping",
            is_bad=bool(findings),
        ),
    ]


def reference_candidate(report: StoredReport) -> dict[str, Any]:
    """The row of the float model in the result table."""
    candidates: dict[str, dict[str, Any]] = report.data["summary"]["candidates"]
    return next(iter(candidates.values()))


def final_candidate(report: StoredReport) -> dict[str, Any]:
    """The last row of the result table: the ONNX file in the recipe."""
    candidates: dict[str, dict[str, Any]] = report.data["summary"]["candidates"]
    return list(candidates.values())[-1]


def layers_in(report: StoredReport, precision: str) -> int:
    """Number of layers with weights in a type, such as "int8" or "FP8"."""
    return sum(layer.precision == precision and layer.weights > 0 for layer in report.layers)


def quantized_layers(report: StoredReport) -> int:
    """Number of layers with weights that are int8 or FP8."""
    return sum(layer.precision != "float" and layer.weights > 0 for layer in report.layers)


def _name_precisions(report: StoredReport) -> str:
    """The types of the quantized layers, such as "int8 and FP8"; int8 if there are none."""
    precisions = {layer.precision for layer in report.layers}
    return " and ".join(word for word in LOW_TYPES.values() if word in precisions) or "int8"


def read_census(report: StoredReport) -> Mapping[str, TypeCensus]:
    """The layers of each type in the engine; reports of earlier versions have those of int8 only."""
    summary = report.data["summary"]
    if "census" in summary:
        census: Mapping[str, TypeCensus] = summary["census"]
        return census
    int8_census = TypeCensus(
        expected=summary["census_expected_int8"],
        missing=summary["census_missing_int8"],
        macs=summary["int8_macs"],
    )
    return {"Int8": int8_census}


def count_layers(census: Mapping[str, TypeCensus]) -> tuple[int, int]:
    """The number of layers that should run in a type of `census`, and of those that do."""
    expected = sum(entry["expected"] for entry in census.values())
    missing = sum(len(entry["missing"]) for entry in census.values())
    return expected, expected - missing


def _view(report: StoredReport, targets: Sequence[TargetResult]) -> dict[str, Any]:
    """The variables of the template."""
    data = report.data
    unit = unit_of_gain(report)
    return {
        "title": data["model"],
        "report": data,
        "run": report.name,
        "figures": list_figures(report),
        "headline": _write_headline(report),
        "formats": list_formats(report),
        "candidates": data["evaluation"]["candidates"],
        "metrics": list(reference_candidate(report).get("scores") or ()),
        "bars": draw_bars(report),
        "output_states": _list_output_states(data["analysis"]),
        "curve": draw_curve(report),
        "centering": data.get("centering"),
        "splitting": data.get("splitting"),
        "steps": data.get("steps"),
        "step_changes": _list_changes(data.get("steps")),
        "tuning": data.get("tuning"),
        "tuning_curves": draw_tuning(report),
        "network": draw_network(report.layers),
        "rows": list_rows(report.layers),
        "kinds": sorted({layer.kind for layer in report.layers}),
        "unit": unit,
        "details": [list_details(layer, unit) for layer in report.layers],
        "census": list_census(data["build"]["layers"]),
        "census_summary": _describe_census(report),
        "precisions": [*_name_precisions(report).split(" and "), "float"],
        "skipped": list_skipped(report),
        "payoff": data["check"].get("payoff"),
        "targets": [target.name for target in targets],
        "target_rows": list_target_rows(targets),
        "commands": list_commands(report),
    }


def _describe_census(report: StoredReport) -> str:
    """How many layers run in the type of their Q/DQ."""
    census = read_census(report)
    expected, reached = count_layers(census)
    verb = "int8" if list(census) == ["Int8"] else "the type of their Q/DQ"
    return f"{reached} of {expected} layers that have Q/DQ in the file run in {verb}."


def _list_changes(steps: dict[str, Any] | None) -> list[float | None]:
    """For each step, the change of the SQNR since the last one that was not undone, in dB; None for the first."""
    changes: list[float | None] = []
    former = None
    for step in steps["steps"] if steps else ():
        decibels = step["sqnr_db"]
        is_known = former is not None and decibels is not None
        changes.append(decibels - former if is_known else None)
        if not step["is_undone"]:
            former = decibels
    return changes


def _list_output_states(analysis: dict[str, Any]) -> list[tuple[str, dict[str, float | None]]]:
    """The SQNR of each of several outputs before the search and after each step, with what was done."""
    if not analysis.get("outputs"):
        return []
    states = [("before the search", analysis["outputs"])]
    for step in analysis["steps"]:
        states.append((f"+ {step['layer']} in float", step.get("outputs") or {}))
    return states


def _write_headline(report: StoredReport) -> str:
    """The result and the search in two sentences."""
    data, final = report.data, final_candidate(report)
    result = (
        f"{quantized_layers(report)} of {data['summary']['weighted_layers']} layers with weights are "
        f"{_name_precisions(report)}; "
        f"{_describe_quality(final, data['evaluation']['images'])}."
    )
    steps = data["analysis"]["steps"]
    if not steps:
        return result
    return f"{result} {_describe_search(report)}"


def _describe_quality(final: dict[str, Any], images: int) -> str:
    """How close the last candidate is to the float model, in one clause."""
    decibels = final["sqnr_db"]
    if final["agreement"] is not None:
        sqnr = "" if decibels is None else f", with {decibels:.2f} dB SQNR"
        return (
            f"{final['name']} agrees with the float model on {format_percent(final['agreement'])} of "
            f"{images} samples{sqnr}"
        )
    outputs = []
    for output in final.get("outputs") or ():
        outputs.append(f"{printable(output['name'])} {format_decibels(output['sqnr_db'])}")
    shown = ", ".join(outputs) or format_decibels(decibels)
    return f"the SQNR of {final['name']} on {images} samples is {shown}"


def _describe_search(report: StoredReport) -> str:
    """How many layers the analysis left in float, and what that gained."""
    analysis = report.data["analysis"]
    metric, steps = analysis["metric_name"], analysis["steps"]
    first = format_state(analysis, metric)
    last = format_state(steps[-1], metric)
    quality = "SQNR" if metric == "sqnr" else "quality"
    biases = analysis.get("biases")  # earlier versions do not say
    conditions = f", with {biases}," if biases else ""
    return (
        f"The analysis left {len(steps)} of {len(list_units(report))} in float, which took the {quality} "
        f"on its {analysis['images']} samples{conditions} from {first} to {last}; it ended: {analysis['stopped_by']}."
    )
