"""Two or more runs side by side: figures, settings, layers and sensitivity. Needs no torch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qdq.errors import ArgumentError
from qdq.product_types import list_low_types, word_of
from qdq.report.charts import list_units, unit_of_gain
from qdq.report.load import StoredReport, guarded, load_report
from qdq.report.page import final_candidate, layers_in, read_census, render
from qdq.report.records import RULE, LayerRecord, Sensitivity
from qdq.report.wording import format_gain, format_percent
from qdq.text import printable

TOLERANCE = 0.01
"""Ranges that differ by a smaller fraction count as equal."""

_FIGURES = re.compile(r"; rank |\b\d")
_BARS = 12  # most sensitive units of each run


@dataclass(frozen=True)
class Figure:
    """A number of every run.

    Args:
        label: Its name.
        values: One for each run; None if a run has none. texts: The same as text.
        better: +1 if more is better, -1 if less is, 0 if neither.
    """

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    better: int


@dataclass(frozen=True)
class Setting:
    """A setting that differs between runs; None if a run does not have it."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class LayerDifference:
    """A layer that is not the same in all runs; None if a run has no such layer, or no range for it.

    Args:
        name: Dotted name.
        kind: Class or function.
        precisions: "int8", "FP8" or "float".
        reasons: Why.
        ranges: amax of its input.
        weights: amax of its weight.
        methods: The methods that computed the range of the input.
        gains: Gain of the outputs with it in float.
    """

    name: str
    kind: str
    precisions: tuple[str | None, ...]
    reasons: tuple[str | None, ...]
    ranges: tuple[float | None, ...]
    weights: tuple[float | None, ...]
    methods: tuple[str | None, ...]
    gains: tuple[float | None, ...]

    @property
    def has_other_reason(self) -> bool:
        """Whether the reasons differ in more than figures."""
        return len({_strip_figures(reason) for reason in self.reasons}) > 1


@dataclass(frozen=True)
class SensitivityRow:
    """A layer or group that is among the most sensitive of a run.

    Args:
        name: Its name.
        ranks: Its place in each run.
        gains: Gain of the outputs with it in float.
        precisions: "int8", "FP8" or "float".
        labels: Gain and interval as text.
        widths: Length of its bar, in percent of the longest bar with the same metric.
    """

    name: str
    ranks: tuple[int | None, ...]
    gains: tuple[float | None, ...]
    precisions: tuple[str | None, ...]
    labels: tuple[str, ...]
    widths: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The differences between runs.

    Args:
        runs: Their names.
        models: Their models.
        figures: The summary in numbers.
        settings: Settings, versions and seeds that differ.
        layers: Layers whose precision, method, range or reason differs.
        sensitivity: The most sensitive layers and groups of any run.
        units: The unit of the gains, for each run.
    """

    runs: tuple[str, ...]
    models: tuple[str, ...]
    figures: tuple[Figure, ...]
    settings: tuple[Setting, ...]
    layers: tuple[LayerDifference, ...]
    sensitivity: tuple[SensitivityRow, ...]
    units: tuple[str, ...]


def compare_runs(runs: Sequence[Path | str]) -> Comparison:
    """Compare runs side by side.

    Args:
        runs: Two or more run folders; the others are compared with the first.

    Raises:
        ArgumentError: Fewer than two runs, or as for `load_report`.
        DataError: As for `load_report`.
    """
    if len(runs) < 2:
        raise ArgumentError(
            f"{len(runs)} run was given; a comparison takes two or more.",
            "name another run folder.",
        )
    reports = [load_report(run) for run in runs]
    # Each by itself first, so that the error of a damaged one names its file.
    for report in reports:
        guarded(report.path, functools.partial(_compare, [report]))

    return _compare(reports)


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison."""
    return render(
        "compare.html",
        title=f"{len(comparison.runs)} runs side by side",
        comparison=comparison,
        tolerance=TOLERANCE,
        targets=None,
    )


def _compare(reports: Sequence[StoredReport]) -> Comparison:
    """Compare reports that have been read."""
    return Comparison(
        runs=tuple(_name_runs(reports)),
        models=tuple(str(report.data["model"]) for report in reports),
        figures=tuple(_list_figures(reports)),
        settings=tuple(_list_settings(reports)),
        layers=tuple(_list_layers(reports)),
        sensitivity=tuple(_list_sensitivity(reports)),
        units=tuple(map(unit_of_gain, reports)),
    )


def _name_runs(reports: Sequence[StoredReport]) -> list[str]:
    """Names of the folders; if two are equal, their paths."""
    counts = Counter(report.name for report in reports)
    names = []
    for report in reports:
        is_unique = counts[report.name] == 1
        names.append(report.name if is_unique else str(report.path.parent))

    return names


@dataclass(frozen=True)
class _Summary:
    """The key figures of one run."""

    sqnr_db: float | None
    agreement: float | None
    top1: float | None
    all_quantized_sqnr_db: float | None
    onnx_megabytes: float
    engine_megabytes: float
    findings: int
    seconds: float

    @classmethod
    def of(cls, report: StoredReport) -> _Summary:
        """The numbers of one report."""
        summary, final = report.data["summary"], final_candidate(report)
        return cls(
            sqnr_db=final["sqnr_db"],
            agreement=final["agreement"],
            top1=final["top1"],
            all_quantized_sqnr_db=report.data["analysis"]["sqnr_db"],
            onnx_megabytes=summary["onnx_megabytes"],
            engine_megabytes=summary["engine_megabytes"],
            findings=len(report.data["findings"]),
            seconds=sum(report.data["seconds"].values()),
        )


@dataclass(frozen=True)
class _Column:
    """How one field of `_Summary` is shown; `better` as in `Figure`, and `{state}` is "in int8" or "quantized"."""

    field: str
    label: str
    write: Callable[[float], str]
    better: int


_COLUMNS = (
    _Column("sqnr_db", "SQNR of the outputs, dB", "{:.2f}".format, 1),
    _Column("agreement", "same answer as float", format_percent, 1),
    _Column("top1", "top-1", format_percent, 1),
    _Column(
        "all_quantized_sqnr_db", "SQNR with all {state} in the analysis, dB", "{:.2f}".format, 1
    ),
    _Column("onnx_megabytes", "ONNX file, MB", "{:.2f}".format, -1),
    _Column("engine_megabytes", "engine, MB", "{:.2f}".format, -1),
    _Column("findings", "findings", "{:.0f}".format, -1),
    _Column("seconds", "seconds of the run", "{:.0f}".format, 0),
)


def _list_figures(reports: Sequence[StoredReport]) -> list[Figure]:
    """List the key figures, one row for each, with a value for each run."""
    summaries = [_Summary.of(report) for report in reports]
    states = {report.quantized_state for report in reports}
    state = states.pop() if len(states) == 1 else "quantized"
    figures = _list_type_figures(reports)
    for column in _COLUMNS:
        values = tuple(getattr(summary, column.field) for summary in summaries)
        texts = tuple(_write_value(value, column) for value in values)
        label = column.label.format(state=state)
        figures.append(Figure(label, values, texts, column.better))

    return figures + _list_output_figures(reports)


def _list_type_figures(reports: Sequence[StoredReport]) -> list[Figure]:
    """The layers and multiplications in each type that a run has; a run without the type has none of them."""
    tables = [read_census(report) for report in reports]
    figures = []
    for type_name in list_low_types(name for table in tables for name in table):
        word = word_of(type_name)
        entries = [table.get(type_name) for table in tables]
        numbers: dict[_Column, list[float | None]] = {
            _Column("", f"layers with weights in {word}", "{:.0f}".format, 1): [
                layers_in(report, word) for report in reports
            ],
            _Column("", f"multiplications in {word}", format_percent, 1): [
                entry["macs"] if entry is not None else 0.0 for entry in entries
            ],
            _Column("", f"quantized, but not {word} in the engine", "{:.0f}".format, -1): [
                len(entry["missing"]) if entry is not None else 0 for entry in entries
            ],
        }
        for column, values in numbers.items():
            texts = tuple(_write_value(value, column) for value in values)
            figures.append(Figure(column.label, tuple(values), texts, column.better))
    return figures


def _list_output_figures(reports: Sequence[StoredReport]) -> list[Figure]:
    """The SQNR of each output of runs with several outputs."""
    tables = []
    for report in reports:
        outputs = final_candidate(report).get("outputs") or ()
        tables.append({output["name"]: output["sqnr_db"] for output in outputs})
    figures = []
    for name in _union_of_keys(tables):
        column = _Column("", f"SQNR of {printable(name)}, dB", "{:.2f}".format, 1)
        values = tuple(table.get(name) for table in tables)
        texts = tuple(_write_value(value, column) for value in values)
        figures.append(Figure(column.label, values, texts, column.better))
    return figures


def _write_value(value: float | None, column: _Column) -> str:
    if value is None:
        return "not known"
    return column.write(value)


def _list_settings(reports: Sequence[StoredReport]) -> list[Setting]:
    """The settings, and the facts about data and versions, that are not the same in all runs."""
    tables = [_collect_settings(report) for report in reports]
    settings = []
    for name in _union_of_keys(tables):
        values = tuple(table.get(name) for table in tables)
        is_same = values.count(values[0]) == len(values)
        if not is_same:
            settings.append(Setting(name, values))

    return settings


def _collect_settings(report: StoredReport) -> dict[str, Any]:
    """Everything that could explain why runs differ, in one table."""
    return {
        "command": report.data["command"],
        **report.data["settings"],
        "seed": report.data["seed"],
        **report.data["data"],
        **report.data["environment"],
    }


def _union_of_keys(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of all tables, in order of appearance."""
    keys: dict[str, None] = {}
    for table in tables:
        keys.update(dict.fromkeys(table))

    return list(keys)


def _list_layers(reports: Sequence[StoredReport]) -> list[LayerDifference]:
    """List the layers that differ, in the order of execution."""
    tables = [{layer.name: layer for layer in report.layers} for report in reports]
    differences = []
    for name in _union_of_keys(tables):
        difference = _describe_layer([table.get(name) for table in tables])
        if _differs(difference):
            differences.append(difference)

    return differences


class _LayerFacts(NamedTuple):
    """The facts about a layer in one run; all None if the run has no such layer."""

    precision: str | None = None
    reason: str | None = None
    input_amax: float | None = None
    weight_amax: float | None = None
    method: str | None = None
    gain: float | None = None


def _collect_facts(layer: LayerRecord | None) -> _LayerFacts:
    """Collect the facts about a layer in one run."""
    if layer is None:
        return _LayerFacts()
    inputs, weight = layer.tensor("input"), layer.tensor("weight")
    return _LayerFacts(
        precision=layer.precision,
        reason=layer.reason,
        input_amax=None if inputs is None else inputs.amax,
        weight_amax=None if weight is None else weight.amax,
        method=None if inputs is None else inputs.method,
        gain=None if layer.sensitivity is None else layer.sensitivity.gain,
    )


def _describe_layer(layers: Sequence[LayerRecord | None]) -> LayerDifference:
    """Describe one layer in all runs; at least one of them has it."""
    example = next(layer for layer in layers if layer is not None)
    facts = map(_collect_facts, layers)
    precisions, reasons, ranges, weights, methods, gains = zip(*facts, strict=True)
    return LayerDifference(
        name=example.name,
        kind=example.kind,
        precisions=precisions,
        reasons=reasons,
        ranges=ranges,
        weights=weights,
        methods=methods,
        gains=gains,
    )


def _differs(layer: LayerDifference) -> bool:
    """Whether type, method, reason or a range differs."""
    has_other_type = len(set(layer.precisions)) > 1
    has_other_method = len(set(layer.methods)) > 1
    if has_other_type or has_other_method or layer.has_other_reason:
        return True
    return _ranges_differ(layer.ranges) or _ranges_differ(layer.weights)


def _strip_figures(reason: str | None) -> tuple[str, ...]:
    """A reason without its figures: the words before the first number, then its rules."""
    text = reason or ""
    words = _FIGURES.split(text)[0]
    return words, *RULE.findall(text)


def _ranges_differ(ranges: Sequence[float | None]) -> bool:
    """Whether only some runs have a range, or the ranges differ by more than the tolerance."""
    present = [amax for amax in ranges if amax is not None]
    if not present:
        return False
    if len(present) < len(ranges):
        return True
    return max(present) > (1 + TOLERANCE) * min(present)


class _Ranking:
    """The layers and groups that one run ranked, by name, the most sensitive first."""

    def __init__(self, report: StoredReport) -> None:
        self.units = {unit.unit: unit for unit in list_units(report)}
        self.precisions = {layer.name: layer.precision for layer in report.layers}
        self.metric = unit_of_gain(report)


class _Bar(NamedTuple):
    """One layer or group in one run; the defaults if the run has not ranked it."""

    rank: int | None = None
    gain: float | None = None
    precision: str | None = None
    label: str = "not measured"
    width: float = 0.0


def _list_sensitivity(reports: Sequence[StoredReport]) -> list[SensitivityRow]:
    """List the most sensitive layers and groups, with a bar for each run."""
    rankings = [_Ranking(report) for report in reports]
    longest = _find_longest_gains(rankings)
    rows = []
    for name in _name_most_sensitive(rankings):
        bars = [_draw_bar(ranking, name, longest[ranking.metric]) for ranking in rankings]
        ranks, gains, precisions, labels, widths = zip(*bars, strict=True)
        rows.append(SensitivityRow(name, ranks, gains, precisions, labels, widths))

    return rows


def _draw_bar(ranking: _Ranking, name: str, longest: float) -> _Bar:
    """The bar of a layer or group in one run.

    Args:
        ranking: Of the run.
        name: Of the layer or group.
        longest: The largest gain with the same metric, whose bar has full length.
    """
    unit = ranking.units.get(name)
    if unit is None:
        return _Bar()
    width = 100 * _positive_gain(unit) / longest if longest else 0.0
    precision = ranking.precisions.get(unit.layers[0])
    return _Bar(unit.rank, unit.gain, precision, format_gain(unit), round(width, 2))


def _positive_gain(unit: Sensitivity) -> float:
    """The gain as the length of a bar: zero for a loss or an unknown gain."""
    return max(unit.gain or 0.0, 0.0)


def _find_longest_gains(rankings: Sequence[_Ranking]) -> dict[str, float]:
    """Metric -> the largest gain of all runs that ranked by it."""
    longest: dict[str, float] = {}
    for ranking in rankings:
        longest.setdefault(ranking.metric, 0.0)
        for unit in ranking.units.values():
            longest[ranking.metric] = max(longest[ranking.metric], _positive_gain(unit))

    return longest


def _name_most_sensitive(rankings: Sequence[_Ranking]) -> list[str]:
    """The most sensitive unit of each run, then the second of each, and so on; each name once."""
    names: dict[str, None] = {}
    for rank in range(_BARS):
        for ranking in rankings:
            for name in list(ranking.units)[rank : rank + 1]:
                names[name] = None

    return list(names)
