"""The tables of the page: layers with their details, the census of the engine, skipped entries, commands."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qdq.observers.solve import SOLVERS
from qdq.product_types import LOW_TYPES, word_of
from qdq.report.load import StoredReport
from qdq.report.records import LayerRecord, MethodRange, TensorRecord
from qdq.report.wording import (
    NOTHING,
    describe_layer,
    describe_tensor,
    format_number,
    format_percent,
    name_layer,
    title_of,
)
from qdq.text import group_names

_FORMAT_WORDS = {"fp8": LOW_TYPES["FP8"]}
"""Name of a format in plans -> the word for it in a report, where they differ."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table of layers.

    Args:
        text: The text that it shows.
        value: The value for sorting; None if it is unknown.
        note: Why it is unknown; "" if it is not.
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
    """One row for each layer."""
    return [Row(number, layer, _list_cells(layer)) for number, layer in enumerate(layers)]


def _list_cells(layer: LayerRecord) -> tuple[Cell, ...]:
    """The cells after number, name, kind and type, in the order of the columns."""
    unknown = layer.unknown
    return (
        _gain_cell(layer),
        _tensor_cell(layer, "input", "amax", "{:.4g}".format),
        _method_cell(layer),
        _tensor_cell(layer, "input", "clipped", partial(format_percent, digits=3)),
        _tensor_cell(layer, "input", "sqnr_db", "{:.1f}".format),
        _tensor_cell(layer, "weight", "sqnr_db", "{:.1f}".format),
        _cell(layer.output_sqnr_db, "{:.1f}".format, unknown.get("output_sqnr_db", "")),
        _cell(layer.macs_share, format_percent, unknown.get("macs", "")),
        _cell(layer.engine, str, unknown.get("engine", "")),
    )


def _gain_cell(layer: LayerRecord) -> Cell:
    """The gain of the outputs with the layer in float."""
    sensitivity = layer.sensitivity
    if sensitivity is None:
        return Cell(NOTHING, None, layer.unknown.get("sensitivity", "not measured"))
    reason = "not finite" if sensitivity.is_exact else "only estimated, not measured"
    return _cell(sensitivity.gain, "{:.3g}".format, reason)


def _method_cell(layer: LayerRecord) -> Cell:
    """The method that computed the range of the input."""
    tensor = layer.tensor("input")
    if tensor is not None and not tensor.method:
        return Cell(NOTHING, None, tensor.unknown.get("amax", ""))
    return _tensor_cell(layer, "input", "method", str)


def _tensor_cell(layer: LayerRecord, role: str, field: str, write: Callable[[Any], str]) -> Cell:
    """A figure of one of the quantizers of a layer.

    Args:
        layer: The layer.
        role: Role of the quantizer.
        field: Field of its record.
        write: Formats the value of the field.
    """
    tensor = layer.tensor(role)
    if tensor is None:
        return Cell(NOTHING, None, layer.unknown.get("tensors", "it has no such quantizer"))
    return _cell(getattr(tensor, field), write, tensor.unknown.get(field, ""))


def _cell(value: float | str | None, write: Callable[[Any], str], reason: str) -> Cell:
    """A value, or a dash with the reason.

    Args:
        value: The value; None if it is unknown.
        write: Formats the value.
        reason: Why it is unknown.
    """
    if value is None:
        return Cell(NOTHING, None, reason)
    return Cell(write(value), value)


def list_details(layer: LayerRecord, unit: str) -> dict[str, Any]:
    """The content of an opened layer on the page: texts, and histograms to draw."""
    note = ""
    if "tensors" in layer.unknown:
        note = f"No ranges: {layer.unknown['tensors']}."
    return {
        "facts": describe_layer(layer, unit),
        "why": layer.reason,
        "tensors": [_list_tensor(tensor) for tensor in layer.tensors],
        "note": note,
    }


def _list_tensor(tensor: TensorRecord) -> dict[str, Any]:
    """The content of one quantizer in an opened layer."""
    note = ""
    if "histogram" in tensor.unknown:
        note = f"No histogram: {tensor.unknown['histogram']}."

    methods = [_list_method(name, choice, tensor) for name, choice in tensor.methods.items()]
    return {
        "title": title_of(tensor),
        "facts": describe_tensor(tensor),
        "histogram": tensor.histogram,
        "end": format_number(tensor.histogram_end),
        "methods": methods,
        "note": note,
    }


def _list_method(method: str, choice: MethodRange, tensor: TensorRecord) -> dict[str, Any]:
    """A line in the histogram of a tensor: the range that one method would choose."""
    is_used = method == tensor.method
    place = 0.0
    if tensor.histogram_end:
        place = round(choice.amax / tensor.histogram_end, 4)

    return {
        "name": f"{method} (used)" if is_used else method,
        "range": f"{choice.amax:.4g}",
        "clipped": format_percent(choice.clipped, 3),
        "isUsed": is_used,
        "colour": list(SOLVERS).index(method) if method in SOLVERS else 0,
        "place": place,
    }


@dataclass(frozen=True)
class FormatRow:
    """Layers that got one format.

    Args:
        names: Their names.
        format: "int8", "FP8" or "float".
        reason: Why.
        int8_db: SQNR of the outputs with these layers alone in int8, in dB; None if it was not measured or is infinite.
        fp8_db: The same for FP8.
        difference: How much better FP8 is, in dB; None likewise.
        precisions: What they run in now: the search for sensitive layers comes after the choice.
    """

    names: tuple[str, ...]
    format: str
    reason: str
    int8_db: float | None
    fp8_db: float | None
    difference: float | None
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class FormatTable:
    """The formats that were chosen.

    Args:
        counts: How many layers got each, in words.
        rows: In the order of the model.
    """

    counts: str
    rows: tuple[FormatRow, ...]


def list_formats(report: StoredReport) -> FormatTable | None:
    """The formats that were chosen; None if there was no choice."""
    formats = report.data.get("formats")
    if not formats:
        return None
    precisions = {layer.name: layer.precision for layer in report.layers}
    counts: Counter[str] = Counter()
    rows = []
    for choice in formats["choices"]:
        word = _FORMAT_WORDS.get(choice["format"], choice["format"])
        counts[word] += len(choice["layers"])
        difference = None
        if choice["int8_db"] is not None and choice["fp8_db"] is not None:
            difference = choice["fp8_db"] - choice["int8_db"]
        present = [precisions[name] for name in choice["layers"] if name in precisions]
        row = FormatRow(
            names=tuple(name_layer(name) for name in choice["layers"]),
            format=word,
            reason=choice["reason"],
            int8_db=choice["int8_db"],
            fp8_db=choice["fp8_db"],
            difference=difference,
            precisions=tuple(dict.fromkeys(present)),
        )
        rows.append(row)
    words = ", ".join(f"{count} in {word}" for word, count in counts.items())
    return FormatTable(words, tuple(rows))


@dataclass(frozen=True)
class CensusGroup:
    """Layers of the engine with the same operator, verdict and reason."""

    op_type: str
    verdict: str
    reason: str
    names: tuple[str, ...]
    is_bad: bool


@dataclass(frozen=True)
class _CensusKey:
    """The facts that the layers of a `CensusGroup` have in common."""

    op_type: str
    verdict: str
    reason: str
    is_bad: bool


def list_census(layers: Iterable[Mapping[str, Any]]) -> list[CensusGroup]:
    """Group similar layers of the engine; those that are not as expected come first, then the largest groups."""
    names: defaultdict[_CensusKey, list[str]] = defaultdict(list)
    for layer in layers:
        names[_judge(layer)].append(layer["module"] or layer["node"])

    groups = []
    for key, members in names.items():
        reason = key.reason or "as expected"
        groups.append(CensusGroup(key.op_type, key.verdict, reason, tuple(members), key.is_bad))

    return sorted(groups, key=lambda group: (not group.is_bad, -len(group.names)))


def _judge(layer: Mapping[str, Any]) -> _CensusKey:
    """The type in which a layer of the engine runs, and whether it should run in another one."""
    built, promised = find_types(layer)
    if promised in LOW_TYPES and built != promised:
        verdict = f"NOT {word_of(promised)}, though quantized"
        return _CensusKey(layer["op_type"], verdict, layer["reason"], is_bad=True)
    return _CensusKey(layer["op_type"], word_of(built), layer["reason"], is_bad=False)


def find_types(layer: Mapping[str, Any]) -> tuple[str, str]:
    """The built and the promised type of an entry of `build.layers`; earlier versions recorded int8 only."""
    built = "Int8" if layer["int8"] else ""
    promised = "Int8" if layer["expected_int8"] else ""
    return layer.get("built", built), layer.get("promised", promised)


@dataclass(frozen=True)
class Skipped:
    """Layers that are not int8, or steps that a stage left out, for the same reason."""

    stage: str
    what: str
    reason: str
    names: tuple[str, ...]
    is_bad: bool = False


@dataclass(frozen=True)
class _SkipKey:
    """The facts that the entries of a row of `Skipped` have in common."""

    stage: str
    what: str
    reason: str
    is_bad: bool = False


_Skip = tuple[_SkipKey, str]  # and the name of the layer


def list_skipped(report: StoredReport) -> list[Skipped]:
    """List everything that a stage left out, and why; the unintended entries come first."""
    data = report.data
    skips: list[_Skip] = []
    skips += _list_skips_of_swap(data)
    skips += _list_skips_of_rewire(data)
    skips += _list_skips_of_fold(data)
    skips += _list_skips_of_calibration(data)
    skips += _list_skips_of_analysis(report)
    skips += _list_findings_of_check(data)
    skips += _list_warnings_of_build(data)
    rows = []
    for key, names in group_names(skips).items():
        shown_names = tuple(name_layer(name) for name in names)
        rows.append(Skipped(key.stage, key.what, key.reason, shown_names, key.is_bad))

    return sorted(rows, key=lambda row: not row.is_bad)


def _list_skips_of_swap(data: Mapping[str, Any]) -> list[_Skip]:
    """Modules in float. A missed module is listed only if the summary lists it: others are listed with their calls."""
    missed = set(data["summary"]["missed_modules"])
    skips = []
    for module in data["swap"]["modules"]:
        if module["action"] == "float" or module["name"] in missed:
            is_missed = module["action"] == "missed"
            key = _SkipKey("swap", module["type"], module["reason"], is_missed)
            skips.append((key, module["name"]))

    return skips


def _list_skips_of_rewire(data: Mapping[str, Any]) -> list[_Skip]:
    """Function calls in float."""
    skips = []
    for call in data["rewire"]["operations"]:
        if call["action"] == "float":
            key = _SkipKey("rewire", call["function"], call["reason"])
            skips.append((key, call["name"]))

    return skips


def _list_skips_of_fold(data: Mapping[str, Any]) -> list[_Skip]:
    """BatchNorms that are not part of the layer before them."""
    skips = []
    for pair in data["fold"]:
        if not pair["folded"]:
            key = _SkipKey("fold", "BatchNorm", pair["reason"])
            skips.append((key, pair["batchnorm"]))

    return skips


def _list_skips_of_calibration(data: Mapping[str, Any]) -> list[_Skip]:
    """Quantizers without a range from calibration."""
    skips = []
    for quantizer in data["calibration"]:
        if quantizer["note"]:
            key = _SkipKey("calibrate", "quantizer", quantizer["note"], is_bad=True)
            skips.append((key, quantizer["name"]))

    return skips


def _list_skips_of_analysis(report: StoredReport) -> list[_Skip]:
    """Layers that the search left in float, and layers that the plan pinned to float."""
    analysis = report.data["analysis"]
    float_layers: set[str] = set()
    for step in analysis["steps"]:
        float_layers.update(step["layers"] or [step["layer"]])

    for name, precision in analysis["pinned"].items():
        if precision == "float":
            float_layers.add(name)

    skips = []
    for layer in report.layers:
        if layer.name in float_layers:
            skips.append((_SkipKey("analyze", layer.kind, layer.reason), layer.name))

    return skips


def _list_findings_of_check(data: Mapping[str, Any]) -> list[_Skip]:
    """Findings of the check; infos are intended."""
    skips = []
    for finding in data["check"]["findings"]:
        title = f"{finding['rule']} {finding['severity']}"
        is_bad = finding["severity"] != "info"
        skips.append((_SkipKey("check", title, finding["message"], is_bad), finding["node"]))

    return skips


def _list_warnings_of_build(data: Mapping[str, Any]) -> list[_Skip]:
    return [(_SkipKey("build", "warning", text), "engine") for text in data["build"]["warnings"]]


def list_commands(report: StoredReport) -> list[tuple[str, str]]:
    """Purpose and command: the one that made the run, then those for the next steps."""
    build = report.data["build"]
    onnx = str(report.data["check"]["path"])
    build_command = ["qdq", "build", onnx]
    if build["sm"]:
        build_command += ["--sm", str(build["sm"])]

    example = report.layers[0].name if report.layers else "LAYER"
    explain_command = ["qdq", "explain", str(report.path.parent), example]
    commands = [
        ("this run", report.data["command"]),
        ("check the file again", shlex.join(["qdq", "check", onnx])),
        ("build the engine again", shlex.join(build_command)),
        ("why a layer is in int8 or float", shlex.join(explain_command)),
    ]
    for version, command in build["trtexec"].items():
        commands.append((f"on the target, {version}", command))

    return commands
