"""Two or more runs side by side: figures, settings, layers and sensitivity. Needs no torch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.errors import ArgumentError
from qdq.report.charts import list_units, unit_of_gain
from qdq.report.load import StoredReport, guarded, load_report
from qdq.report.page import int8_layers, int8_share, render
from qdq.report.records import RULE, LayerRecord, Sensitivity
from qdq.report.wording import format_gain, format_share

TOLERANCE = 0.01  # ranges that differ by less are taken for the same
_FIGURES = re.compile(r"; rank |\b\d")
_BARS = 12  # most sensitive units of each run


@dataclass(frozen=True)
class Figure:
    """A number of every run.

    Args:
        label: What it is.
        values: One for each run; None where a run has none.
        texts: The same in words.
        better: +1 if more is better, -1 if less is, 0 if neither.
    """

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    better: int


@dataclass(frozen=True)
class Setting:
    """A setting in which runs differ; None where a run has none."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class LayerDifference:
    """A layer that is not the same in all runs; None where a run has no such layer, or no range for it.

    Args:
        name: Dotted name.
        kind: Class or function.
        precisions: "int8" or "float".
        reasons: Why.
        ranges: amax of its input.
        weights: amax of its weight.
        methods: How the range of the input was solved.
        gains: What leaving it in float gains.
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
        return len(set(map(_kind_of_reason, self.reasons))) > 1


@dataclass(frozen=True)
class SensitivityRow:
    """A unit that is among the most sensitive of a run.

    Args:
        name: The unit.
        ranks: Its place in each run.
        gains: What leaving it in float gains.
        precisions: What it runs in.
        labels: Gain and interval in words.
        widths: Length of its bar in percent, of the longest one with the same metric.
    """

    name: str
    ranks: tuple[int | None, ...]
    gains: tuple[float | None, ...]
    precisions: tuple[str | None, ...]
    labels: tuple[str, ...]
    widths: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What differs between runs.

    Args:
        runs: Their names.
        models: Their models.
        figures: The summary in numbers.
        settings: Settings, versions and seeds that differ.
        layers: Layers whose precision, method, range or reason differs.
        sensitivity: The most sensitive units of any run.
        units: What gains are in, for each run.
    """

    runs: tuple[str, ...]
    models: tuple[str, ...]
    figures: tuple[Figure, ...]
    settings: tuple[Setting, ...]
    layers: tuple[LayerDifference, ...]
    sensitivity: tuple[SensitivityRow, ...]
    units: tuple[str, ...]


def compare_runs(runs: Sequence[Path | str]) -> Comparison:
    """Hold runs side by side.

    Args:
        runs: Two or more run folders; the others are compared with the first.

    Raises:
        ArgumentError: Fewer than two, or as for `load_report`.
        DataError: As for `load_report`.
    """
    if len(runs) < 2:
        raise ArgumentError(
            f"{len(runs)} run was given; a comparison takes two or more.",
            "name another run folder.",
        )
    reports = [load_report(run) for run in runs]
    for report in reports:  # a damaged one by itself: the error names its file
        guarded(report.path, functools.partial(_compare, [report]))
    return _compare(reports)


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison."""
    return render(
        "compare.html",
        title=f"{len(comparison.runs)} runs side by side",
        comparison=comparison,
        tolerance=TOLERANCE,
    )


def _compare(reports: Sequence[StoredReport]) -> Comparison:
    return Comparison(
        runs=_name_runs(reports),
        models=tuple(str(report.data["model"]) for report in reports),
        figures=tuple(_list_figures(reports)),
        settings=tuple(_list_settings(reports)),
        layers=tuple(_list_layers(reports)),
        sensitivity=tuple(_list_sensitivity(reports)),
        units=tuple(map(unit_of_gain, reports)),
    )


def _name_runs(reports: Sequence[StoredReport]) -> tuple[str, ...]:
    """Names of the folders; of equal ones the path as it was given."""
    counts = Counter(report.name for report in reports)
    return tuple(
        report.name if counts[report.name] == 1 else str(report.path.parent) for report in reports
    )


def _list_figures(reports: Sequence[StoredReport]) -> list[Figure]:
    final = [list(report.data["summary"]["candidates"].values())[-1] for report in reports]
    summaries = [report.data["summary"] for report in reports]

    def figure(
        label: str, values: Sequence[float | None], write: Callable[[float], str], better: int
    ) -> Figure:
        texts = tuple("not known" if value is None else write(value) for value in values)
        return Figure(label, tuple(values), texts, better)

    return [
        figure("layers with weights in int8", [*map(int8_layers, reports)], "{:.0f}".format, 1),
        figure("multiplications in int8", [*map(int8_share, reports)], format_share, 1),
        figure("SQNR of the outputs, dB", [each["sqnr_db"] for each in final], "{:.2f}".format, 1),
        figure("same answer as float", [each["agreement"] for each in final], format_share, 1),
        figure("top-1", [each["top1"] for each in final], format_share, 1),
        figure(
            "SQNR with all in int8, dB",
            [report.data["analysis"]["sqnr_db"] for report in reports],
            "{:.2f}".format,
            1,
        ),
        figure(
            "ONNX file, MB", [each["onnx_megabytes"] for each in summaries], "{:.2f}".format, -1
        ),
        figure("engine, MB", [each["engine_megabytes"] for each in summaries], "{:.2f}".format, -1),
        figure(
            "quantized, but not int8 in the engine",
            [len(each["census_missing_int8"]) for each in summaries],
            "{:.0f}".format,
            -1,
        ),
        figure(
            "findings", [len(report.data["findings"]) for report in reports], "{:.0f}".format, -1
        ),
        figure(
            "seconds of the run",
            [sum(report.data["seconds"].values()) for report in reports],
            "{:.0f}".format,
            0,
        ),
    ]


def _list_settings(reports: Sequence[StoredReport]) -> list[Setting]:
    found = [
        {
            "command": report.data["command"],
            **report.data["settings"],
            "seed": report.data["seed"],
            **report.data["data"],
            **report.data["environment"],
        }
        for report in reports
    ]
    names = dict.fromkeys(name for each in found for name in each)
    settings = [Setting(name, tuple(each.get(name) for each in found)) for name in names]
    return [
        setting
        for setting in settings
        if any(value != setting.values[0] for value in setting.values)
    ]


def _list_layers(reports: Sequence[StoredReport]) -> list[LayerDifference]:
    found = [{layer.name: layer for layer in report.layers} for report in reports]
    names = dict.fromkeys(name for each in found for name in each)
    differences = [_describe_layer([each.get(name) for each in found]) for name in names]
    return [difference for difference in differences if _differs(difference)]


def _describe_layer(layers: Sequence[LayerRecord | None]) -> LayerDifference:
    known = next(layer for layer in layers if layer)
    inputs, weights = (
        [layer.tensor(role) if layer else None for layer in layers] for role in ("input", "weight")
    )
    return LayerDifference(
        name=known.name,
        kind=known.kind,
        precisions=tuple(layer.precision if layer else None for layer in layers),
        reasons=tuple(layer.reason if layer else None for layer in layers),
        ranges=tuple(tensor.amax if tensor else None for tensor in inputs),
        weights=tuple(tensor.amax if tensor else None for tensor in weights),
        methods=tuple(tensor.method if tensor else None for tensor in inputs),
        gains=tuple(
            layer.sensitivity.gain if layer and layer.sensitivity else None for layer in layers
        ),
    )


def _differs(layer: LayerDifference) -> bool:
    if layer.has_other_reason or any(
        len(set(each)) > 1 for each in (layer.precisions, layer.methods)
    ):
        return True
    return any(map(_ranges_differ, (layer.ranges, layer.weights)))


def _kind_of_reason(reason: str | None) -> tuple[str, ...]:
    """What a reason says beside its figures: its rules, and the words before the first number."""
    words = _FIGURES.split(reason or "")[0]
    return words, *RULE.findall(reason or "")


def _ranges_differ(ranges: Sequence[float | None]) -> bool:
    known = [amax for amax in ranges if amax is not None]
    return 0 < len(known) < len(ranges) or max(known, default=0.0) > (1 + TOLERANCE) * min(
        known, default=0.0
    )


def _list_sensitivity(reports: Sequence[StoredReport]) -> list[SensitivityRow]:
    units = [{unit.unit: unit for unit in list_units(report)} for report in reports]
    names = dict.fromkeys(
        name for rank in range(_BARS) for each in units for name in [*each][rank : rank + 1]
    )
    metrics = [unit_of_gain(report) for report in reports]
    longest: dict[str, float] = {}
    for metric, each in zip(metrics, units, strict=True):
        longest[metric] = max(
            [longest.get(metric, 0.0), *(unit.gain or 0.0 for unit in each.values())]
        )
    precisions = [{layer.name: layer.precision for layer in report.layers} for report in reports]

    def width(unit: Sensitivity | None, metric: str) -> float:
        return (
            round(100 * max(unit.gain or 0.0, 0.0) / longest[metric], 2)
            if unit and longest[metric]
            else 0.0
        )

    def precision(unit: Sensitivity | None, each: dict[str, str]) -> str | None:
        return each.get(unit.layers[0]) if unit else None

    rows = []
    for name in names:
        found = [each.get(name) for each in units]
        rows.append(
            SensitivityRow(
                name=name,
                ranks=tuple(unit.rank if unit else None for unit in found),
                gains=tuple(unit.gain if unit else None for unit in found),
                precisions=tuple(map(precision, found, precisions)),
                labels=tuple(format_gain(unit) if unit else "not measured" for unit in found),
                widths=tuple(
                    width(unit, metric) for unit, metric in zip(found, metrics, strict=True)
                ),
            )
        )
    return rows
