"""The page of one run: one HTML file that needs nothing but itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from qdq.errors import DataError
from qdq.report.charts import draw_bars, draw_curve, draw_network, list_units, unit_of_gain
from qdq.report.load import StoredReport
from qdq.report.records import LayerRecord, TensorRecord
from qdq.show import load_templates

_DIGITS = 4  # of numbers in the page; report.json has all
Result = TypeVar("Result")


def render_report(report: StoredReport) -> str:
    """The page of one run.

    Args:
        report: From `load_report` or `parse_report`.

    Raises:
        DataError: The report lacks something, or holds it in another form.
    """
    return guarded(report.path, lambda: render("run.html", **_view(report)))


def render(template: str, **values: Any) -> str:
    """A page from a template of this package."""
    environment = load_templates(Path(__file__).parent / "templates")
    environment.filters.update(number=format_number, share=format_share, embed=_embed)
    return environment.get_template(template).render(**values)


def guarded(path: Path, make: Callable[[], Result]) -> Result:
    """What `make` returns; if a report is not as it should be, the error names the file.

    Raises:
        DataError: Something is missing in the report, or is of another kind.
    """
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, jinja2.UndefinedError) as error:
        raise DataError(
            f"{path} is damaged: {type(error).__name__}: {error}.", "run the same command again; it writes a new report."
        ) from error


def format_number(value: float | None, form: str = ".4g", unknown: str = "–") -> str:
    """A number in a few characters."""
    return unknown if value is None else format(value, form)


def format_share(value: float | None, digits: int = 1) -> str:
    """0.123 as "12.3 %"; what is little is not shown as nothing."""
    if value is None:
        return "–"
    least = 10.0**-digits
    return f"< {least:g} %" if 0 < 100 * value < least / 2 else f"{100 * value:.{digits}f} %"


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
    reference, final = list(candidates.values())[0], list(candidates.values())[-1]
    count = int8_layers(report)
    share = int8_share(report)
    expected, missing = summary["census_expected_int8"], len(summary["census_missing_int8"])
    figures = [
        Figure("layers in int8", f"{count} of {summary['weighted_layers']}", "with weights, in the exported file"),
        Figure("multiplications in int8", format_share(share), "in the engine, of those whose size is known"),
        Figure("SQNR of the outputs", _decibels(final["sqnr_db"]), f"{final['name']} against {reference['name']}"),
        Figure("same answer as float", format_share(final["agreement"]), f"on {data['evaluation']['images']} images"),
    ]
    if final["top1"] is not None:
        change = 100 * (final["top1"] - reference["top1"])
        figures.append(Figure("top-1", format_share(final["top1"]), f"float {format_share(reference['top1'])}: {change:+.1f} points"))
    size = f"float parameters {format_number(reference['megabytes'], '.1f')} MB"
    figures += [
        Figure("ONNX file", f"{summary['onnx_megabytes']:.1f} MB", size),
        Figure("engine", f"{summary['engine_megabytes']:.1f} MB", f"{data['build']['backend']} {data['build']['backend_version']}"),
        Figure("census", f"{expected - missing} of {expected}", "layers in int8 in the engine, of those expected", missing > 0),
        Figure("findings", str(len(data["findings"])), "what must be known before shipping", bool(data["findings"])),
    ]
    return figures


def _decibels(value: float | None) -> str:
    return "no error" if value is None else f"{value:.2f} dB"


def int8_layers(report: StoredReport) -> int:
    """How many layers with weights are int8."""
    return sum(layer.precision == "int8" and layer.weights > 0 for layer in report.layers)


def int8_share(report: StoredReport) -> float | None:
    """Part of the known multiplications that the engine runs in int8, 0..1."""
    known = {layer["name"]: layer["macs"] for layer in report.data["build"]["coverage"]["layers"] if layer["macs"]}
    running = sum(known.get(layer["node"], 0) for layer in report.data["build"]["layers"] if layer["int8"])
    return running / sum(known.values()) if known else None


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
        "network": draw_network(report.layers),
        "rows": [_row(number, layer) for number, layer in enumerate(report.layers)],
        "kinds": sorted({layer.kind for layer in report.layers}),
        "unit": unit_of_gain(report),
        "details": [_shorten(asdict(layer)) for layer in report.layers],
        "census": _list_census(data["build"]["layers"]),
        "skipped": list_skipped(report),
        "commands": _list_commands(report),
    }


def _headline(report: StoredReport) -> str:
    """What is to be decided, in two sentences."""
    data, summary = report.data, report.data["summary"]
    final = list(summary["candidates"].values())[-1]
    count, all_layers = int8_layers(report), summary["weighted_layers"]
    sqnr = "" if final["sqnr_db"] is None else f", with {final['sqnr_db']:.2f} dB SQNR"
    first = (
        f"{count} of {all_layers} layers with weights are int8; {final['name']} gives the answer of the float model on "
        f"{format_share(final['agreement'])} of {data['evaluation']['images']} images{sqnr}."
    )
    analysis, units = data["analysis"], list_units(report)
    if analysis["steps"]:
        last = analysis["steps"][-1]["sqnr_db"]
        first += (
            f" The analysis left {len(analysis['steps'])} of {len(units)} in float, which took its "
            f"SQNR from {_decibels(analysis['sqnr_db'])} to {_decibels(last)}; it ended: {analysis['stopped_by']}."
        )
    return first


@dataclass(frozen=True)
class Cell:
    """A cell of the table of layers.

    Args:
        text: What it shows.
        value: What it is sorted by; None where it is not known.
        note: Why it is not known; "" if it is.
    """

    text: str
    value: float | str | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table of layers."""

    number: int
    layer: LayerRecord
    cells: tuple[Cell, ...]


def _row(number: int, layer: LayerRecord) -> Row:
    entry, weight, found = layer.tensor("input"), layer.tensor("weight"), layer.sensitivity
    estimated = "only estimated, not measured"
    why = layer.unknown.get("sensitivity", estimated)
    cells = (
        _cell(found and found.gain, ".3g", why if found is None else estimated),
        _cell_of(layer, entry, "amax", ".4g"),
        Cell(entry.method if entry and entry.method else "–", entry.method if entry else None, _why(layer, entry, "amax")),
        _share_cell(entry and entry.clipped, _why(layer, entry, "clipped"), 3),
        _cell_of(layer, entry, "sqnr_db", ".1f"),
        _cell_of(layer, weight, "sqnr_db", ".1f"),
        _cell(layer.output_sqnr_db, ".1f", layer.unknown.get("output_sqnr_db", "")),
        _share_cell(layer.macs_share, layer.unknown.get("macs", ""), 1),
        Cell(layer.engine or "–", layer.engine, layer.unknown.get("engine", "")),
    )
    return Row(number, layer, cells)


def _cell_of(layer: LayerRecord, tensor: TensorRecord | None, field: str, form: str) -> Cell:
    return _cell(tensor and getattr(tensor, field), form, _why(layer, tensor, field))


def _why(layer: LayerRecord, tensor: TensorRecord | None, field: str) -> str:
    if tensor is None:
        return layer.unknown.get("tensors", "it has no such quantizer")
    return tensor.unknown.get(field, "")


def _cell(value: float | None, form: str, why: str) -> Cell:
    return Cell(format_number(value, form), value, why if value is None else "")


def _share_cell(value: float | None, why: str, digits: int) -> Cell:
    return Cell(format_share(value, digits), value, why if value is None else "")


def _shorten(value: Any) -> Any:
    """Numbers with a few digits, for the page."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    return [_shorten(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class CensusGroup:
    """Layers of one operator with the same verdict."""

    op_type: str
    verdict: str
    reason: str
    names: tuple[str, ...]
    is_bad: bool


def _list_census(layers: Iterable[Mapping[str, Any]]) -> list[CensusGroup]:
    """Alike layers of the engine together, those that are not as expected first."""
    groups: dict[tuple[bool, str, str, str], list[str]] = {}
    for layer in layers:
        is_bad = layer["expected_int8"] and not layer["int8"]
        verdict = "int8" if layer["int8"] else "NOT int8, though quantized" if is_bad else "float"
        key = (not is_bad, verdict, layer["op_type"], layer["reason"])
        groups.setdefault(key, []).append(layer["module"] or layer["node"])
    return [
        CensusGroup(op_type, verdict, reason or "as expected", tuple(names), not is_good)
        for (is_good, verdict, op_type, reason), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
    ]


@dataclass(frozen=True)
class Skipped:
    """What is not int8, or was not done, for one reason."""

    stage: str
    what: str
    reason: str
    names: tuple[str, ...]
    is_bad: bool = False


def list_skipped(report: StoredReport) -> list[Skipped]:
    """Whatever was left out by any stage, and why; what nobody wanted first."""
    data = report.data
    found = [("swap", m["type"], m["reason"], m["name"], m["action"] == "missed")
             for m in data["swap"]["modules"] if m["action"] != "quantize"]  # fmt: skip
    found += [("rewire", call["function"], call["reason"], call["name"], False)
              for call in data["rewire"]["operations"] if call["action"] == "float"]  # fmt: skip
    found += [("fold", "BatchNorm", pair["reason"], pair["batchnorm"], False) for pair in data["fold"] if not pair["folded"]]
    found += [("calibrate", "quantizer", each["note"], each["name"], True) for each in data["calibration"] if each["note"]]
    left = {name for step in data["analysis"]["steps"] for name in step["layers"] or [step["layer"]]}
    left |= {name for name, precision in data["analysis"]["pinned"].items() if precision == "float"}
    found += [("analyze", each.kind, each.reason, each.name, False) for each in report.layers if each.name in left]
    found += [("check", f"{each['rule']} {each['severity']}", each["message"], each["node"], each["severity"] != "info")
              for each in data["check"]["findings"]]  # fmt: skip
    found += [("build", "warning", text, "engine", False) for text in data["build"]["warnings"]]
    return _group(found)


def _group(found: Iterable[tuple[str, str, str, str, bool]]) -> list[Skipped]:
    groups: dict[tuple[str, str, str, bool], list[str]] = {}
    for stage, what, reason, name, is_bad in found:
        groups.setdefault((stage, what, reason, is_bad), []).append(name or "the model")
    entries = [Skipped(stage, what, reason, tuple(names), bad) for (stage, what, reason, bad), names in groups.items()]
    return sorted(entries, key=lambda entry: not entry.is_bad)


def _list_commands(report: StoredReport) -> list[tuple[str, str]]:
    """Purpose and command: what made the run, and what can be done with it."""
    data = report.data
    folder, onnx = str(report.path.parent), str(data["check"]["path"])
    sm = data["build"]["sm"]
    build = ["qdq", "build", onnx, *(["--sm", str(sm)] if sm else [])]
    own: Sequence[tuple[str, Sequence[str]]] = [
        ("check the file again", ["qdq", "check", onnx]),
        ("build the engine again", build),
        ("why a layer is as it is", ["qdq", "explain", folder, report.layers[0].name if report.layers else "LAYER"]),
    ]
    return [
        ("this run", data["command"]),
        *((purpose, shlex.join(command)) for purpose, command in own),
        *((f"on the target, {version}", line) for version, line in data["build"]["trtexec"].items()),
    ]
