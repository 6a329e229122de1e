"""The tables of a report: layers with their details, the census of the engine, what was skipped, commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdq.observers.solve import SOLVERS
from qdq.report.load import StoredReport
from qdq.report.records import LayerRecord, TensorRecord
from qdq.report.wording import (
    describe_layer,
    describe_tensor,
    format_number,
    format_share,
    title_of,
)
from qdq.text import group_names


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


def list_rows(layers: Sequence[LayerRecord]) -> list[Row]:
    """A row of each layer."""
    return [_row(number, layer) for number, layer in enumerate(layers)]


def _row(number: int, layer: LayerRecord) -> Row:
    entry, weight, found = layer.tensor("input"), layer.tensor("weight"), layer.sensitivity
    method = entry.method if entry and entry.method else None
    gain = found.gain if found else None
    is_exact = found is not None and found.is_exact
    why_no_gain = layer.unknown.get(
        "sensitivity", "not finite" if is_exact else "only estimated, not measured"
    )
    cells = (
        _cell(gain, ".3g", why_no_gain),
        _cell_of(layer, entry, "amax", ".4g"),
        Cell(method or "–", method, _why(layer, entry, "amax")),
        _share_cell(entry.clipped if entry else None, _why(layer, entry, "clipped"), 3),
        _cell_of(layer, entry, "sqnr_db", ".1f"),
        _cell_of(layer, weight, "sqnr_db", ".1f"),
        _cell(layer.output_sqnr_db, ".1f", layer.unknown.get("output_sqnr_db", "")),
        _share_cell(layer.macs_share, layer.unknown.get("macs", ""), 1),
        Cell(layer.engine or "–", layer.engine, layer.unknown.get("engine", "")),
    )
    return Row(number, layer, cells)


def _cell_of(layer: LayerRecord, tensor: TensorRecord | None, field: str, form: str) -> Cell:
    value = None if tensor is None else getattr(tensor, field)
    return _cell(value, form, _why(layer, tensor, field))


def _why(layer: LayerRecord, tensor: TensorRecord | None, field: str) -> str:
    if tensor is None:
        return layer.unknown.get("tensors", "it has no such quantizer")
    return tensor.unknown.get(field, "")


def _cell(value: float | None, form: str, why: str) -> Cell:
    return Cell(format_number(value, form), value, why if value is None else "")


def _share_cell(value: float | None, why: str, digits: int) -> Cell:
    return Cell(format_share(value, digits), value, why if value is None else "")


def list_details(layer: LayerRecord, unit: str) -> dict[str, Any]:
    """What the page shows of a layer when it is opened: texts, and histograms to draw."""
    return {
        "facts": describe_layer(layer, unit),
        "why": layer.reason,
        "tensors": [_list_tensor(tensor) for tensor in layer.tensors],
        "note": f"No ranges: {layer.unknown['tensors']}." if "tensors" in layer.unknown else "",
    }


def _list_tensor(tensor: TensorRecord) -> dict[str, Any]:
    end = tensor.histogram_end
    methods = [
        {
            "name": f"{method} (used)" if method == tensor.method else method,
            "range": f"{found.amax:.4g}",
            "clipped": format_share(found.clipped, 3),
            "isUsed": method == tensor.method,
            "colour": list(SOLVERS).index(method) if method in SOLVERS else 0,
            "place": round(found.amax / end, 4) if end else 0.0,
        }
        for method, found in tensor.methods.items()
    ]
    return {
        "title": title_of(tensor),
        "facts": describe_tensor(tensor),
        "histogram": tensor.histogram,
        "end": format_number(end),
        "methods": methods,
        "note": f"No histogram: {tensor.unknown['histogram']}."
        if "histogram" in tensor.unknown
        else "",
    }


@dataclass(frozen=True)
class CensusGroup:
    """Layers of one operator with the same verdict."""

    op_type: str
    verdict: str
    reason: str
    names: tuple[str, ...]
    is_bad: bool


def list_census(layers: Iterable[Mapping[str, Any]]) -> list[CensusGroup]:
    """Alike layers of the engine together, those that are not as expected first."""
    groups = [
        CensusGroup(op_type, verdict, reason or "as expected", tuple(names), is_bad)
        for (op_type, verdict, reason, is_bad), names in group_names(map(_judge, layers)).items()
    ]
    return sorted(groups, key=lambda group: (not group.is_bad, -len(group.names)))


def _judge(layer: Mapping[str, Any]) -> tuple[tuple[str, str, str, bool], str]:
    """What is said of a layer of the engine, and its name."""
    is_bad = layer["expected_int8"] and not layer["int8"]
    verdict = "int8" if layer["int8"] else "NOT int8, though quantized" if is_bad else "float"
    return (layer["op_type"], verdict, layer["reason"], is_bad), layer["module"] or layer["node"]


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
    missed = set(data["summary"]["missed_modules"])  # others stand there with their calls
    found = [
        ("swap", m["type"], m["reason"], m["name"], m["action"] == "missed")
        for m in data["swap"]["modules"]
        if m["action"] == "float" or m["name"] in missed
    ]
    found += [
        ("rewire", call["function"], call["reason"], call["name"], False)
        for call in data["rewire"]["operations"]
        if call["action"] == "float"
    ]
    found += [
        ("fold", "BatchNorm", pair["reason"], pair["batchnorm"], False)
        for pair in data["fold"]
        if not pair["folded"]
    ]
    found += [
        ("calibrate", "quantizer", each["note"], each["name"], True)
        for each in data["calibration"]
        if each["note"]
    ]
    left = {
        name for step in data["analysis"]["steps"] for name in step["layers"] or [step["layer"]]
    }
    left |= {name for name, precision in data["analysis"]["pinned"].items() if precision == "float"}
    found += [
        ("analyze", each.kind, each.reason, each.name, False)
        for each in report.layers
        if each.name in left
    ]
    found += [
        (
            "check",
            f"{each['rule']} {each['severity']}",
            each["message"],
            each["node"],
            each["severity"] != "info",
        )
        for each in data["check"]["findings"]
    ]
    found += [("build", "warning", text, "engine", False) for text in data["build"]["warnings"]]
    groups = group_names(
        ((stage, what, reason, is_bad), name or "the model")
        for stage, what, reason, name, is_bad in found
    )
    entries = [
        Skipped(stage, what, reason, tuple(names), is_bad)
        for (stage, what, reason, is_bad), names in groups.items()
    ]
    return sorted(entries, key=lambda entry: not entry.is_bad)


def list_commands(report: StoredReport) -> list[tuple[str, str]]:
    """Purpose and command: what made the run, and what can be done with it."""
    data = report.data
    folder, onnx = str(report.path.parent), str(data["check"]["path"])
    sm = data["build"]["sm"]
    build = ["qdq", "build", onnx, *(["--sm", str(sm)] if sm else [])]
    own: Sequence[tuple[str, Sequence[str]]] = [
        ("check the file again", ["qdq", "check", onnx]),
        ("build the engine again", build),
        (
            "why a layer is as it is",
            ["qdq", "explain", folder, report.layers[0].name if report.layers else "LAYER"],
        ),
    ]
    return [
        ("this run", data["command"]),
        *((purpose, shlex.join(command)) for purpose, command in own),
        *(
            (f"on the target, {version}", line)
            for version, line in data["build"]["trtexec"].items()
        ),
    ]
