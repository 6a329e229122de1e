"""Is a run good enough to ship? Limits held against its report.json, for CI; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qdq.errors import ArgumentError, DataError, QdqError
from qdq.files import as_path
from qdq.report.load import guarded, read_report
from qdq.report.sections import JudgedSections
from qdq.schema import validate
from qdq.text import MOST_CHARACTERS, printable

_ROUNDING = 1e-9  # of float64: 84.8 - 84.4 is no more than 0.4
_SHOWN_LAYERS = 3
_DIGITS, _SHARE_DIGITS = (
    2,
    4,
)  # decimals of what is found, and of a share; more where it would look like the limit


@dataclass(frozen=True)
class GateCheck:
    """One limit and what was found.

    Args:
        name: The limit as the command line spells it, "max-drop".
        limit: Its value, in the unit of the limit (see `gate_run`).
        found: What the run has, in the same unit.
        passed: Whether the run keeps the limit.
        message: What was found, where, and the limit, in one line.
    """

    name: str
    limit: float
    found: float
    passed: bool
    message: str


@dataclass(frozen=True)
class GateReport:
    """Result of `gate_run`.

    Args:
        run: The run, as it was given.
        baseline: The run it was compared with, None without.
        checks: Every limit that was asked for.
    """

    run: Path
    baseline: Path | None
    checks: tuple[GateCheck, ...]

    @property
    def failures(self) -> tuple[GateCheck, ...]:
        """The limits that the run misses."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether it keeps all."""
        return not self.failures

    def format_table(self) -> str:
        """One line a limit, then the verdict."""
        lines = [
            f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.message}"
            for check in self.checks
        ]
        verdict = f"{printable(self.run)}: {len(self.failures)} of {len(self.checks)} limits missed"
        return "\n".join([*lines, verdict])


def gate_run(
    run: Path | str,
    *,
    baseline: Path | str | None = None,
    max_drop: float | None = None,
    max_sqnr_drop: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    min_int8_macs: float | None = None,
    max_size: float | None = None,
) -> GateReport:
    """Hold limits against what a run found. Judged is its last candidate, the ONNX file in the recipe.

    Args:
        run: Run folder, or a copy of its report.json.
        baseline: Another run, on the same images, likewise.
        max_drop: Points of top-1 (0 to 100) that it may lie below the baseline; below its own float model without one.
        max_sqnr_drop: Decibels of SQNR that it may lie below the baseline.
        min_sqnr: Least SQNR of the outputs against the float model, in dB.
        min_agreement: Least share of images (0 to 1) with the float model's top-1.
        min_int8_macs: Least share of all multiplications (0 to 1) that runs in int8 in the engine.
        max_size: Largest ONNX file, in MB (10^6 bytes).

    Raises:
        ArgumentError: No limit, one out of its range, or one of limit and baseline without the other; no report.
        DataError: A damaged report, of other images than the baseline's, or without a fact that a limit asks for.
    """
    given = {
        "max_drop": max_drop,
        "max_sqnr_drop": max_sqnr_drop,
        "min_sqnr": min_sqnr,
        "min_agreement": min_agreement,
        "min_int8_macs": min_int8_macs,
        "max_size": max_size,
    }
    limits = {name: limit for name, limit in given.items() if limit is not None}
    _check_limits(limits, has_baseline=baseline is not None)
    run = as_path(run, "run")
    baseline = None if baseline is None else as_path(baseline, "baseline")
    judged = _Facts(run)
    other = None if baseline is None else _Facts(baseline)
    if other is not None:
        _require_same_images(judged, other)
    checks = guarded(
        judged.path,
        lambda: tuple(_judge(name, limit, judged, other) for name, limit in limits.items()),
    )
    return GateReport(run, baseline, checks)


def format_junit(report: GateReport) -> bytes:
    """The checks as JUnit XML, one test case a limit, as CI servers read it.

    With the elements and attributes that Ant's schema requires and Jenkins' allows; the host is not told.
    """
    root, suite = _new_suite(tests=len(report.checks), failures=len(report.failures))
    for check in report.checks:
        _add_case(
            suite, report.run, check.name, "" if check.passed else "failure", "limit", check.message
        )
    return _finish_suite(root, suite, report.format_table())


def format_junit_error(run: Path | str, error: QdqError) -> bytes:
    """A run that could not be judged as JUnit XML: one test case with an error.

    Args:
        run: The run, as it was given.
        error: Why.
    """
    root, suite = _new_suite(tests=1, errors=1)
    _add_case(suite, run, "gate", "error", type(error).__name__, printable(error, MOST_CHARACTERS))
    return _finish_suite(root, suite, printable(error, MOST_CHARACTERS))


def _new_suite(tests: int, failures: int = 0, errors: int = 0) -> tuple[Element, Element]:
    root = Element("testsuites")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    names = {
        "name": "qdq gate",
        "package": "qdq",
        "id": "0",
        "timestamp": now,
        "hostname": "localhost",
    }
    counts = {"tests": str(tests), "failures": str(failures), "errors": str(errors), "time": "0"}
    suite = SubElement(root, "testsuite", {**names, **counts})
    SubElement(suite, "properties")
    return root, suite


def _add_case(
    suite: Element, run: Path | str, name: str, outcome: str, kind: str, message: str
) -> None:
    """One test case; `outcome` is "failure", "error", or "" if it passed."""
    case = SubElement(suite, "testcase", {"classname": printable(run), "name": name, "time": "0"})
    if outcome:
        SubElement(case, outcome, {"type": kind, "message": message}).text = message


def _finish_suite(root: Element, suite: Element, output: str) -> bytes:
    SubElement(suite, "system-out").text = output
    SubElement(suite, "system-err")
    indent(root)
    xml: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return xml


class _Facts:
    """The report of a run; a fact that it lacks is an error, never a pass.

    Args:
        run: Run folder, or the file.

    Raises:
        ArgumentError: No report.
        DataError: None of a run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path, content = read_report(run)
        validate(
            JudgedSections,
            content,
            str(self.path),
            "give the report.json of a run, or run qdq ptq again.",
        )
        self._content: dict[str, Any] = content
        candidates = content["evaluation"]["candidates"]
        self.reference: dict[str, Any] = candidates[0]
        self.result: dict[str, Any] = candidates[-1]

    def get(self, *keys: str) -> Any:
        """A value by its keys from the top; None if one is missing."""
        value: Any = self._content
        for key in keys:
            value = None if value is None else value.get(key)
        return value

    def require(self, value: float | None, what: str, fix: str) -> float:
        """A number that is there.

        Raises:
            DataError: It is not.
        """
        if value is None:
            raise DataError(f"{self.run} has no {what}, and a limit asks for it.", fix)
        return float(value)

    def top1(self, candidate: dict[str, Any]) -> float:
        """In percent."""
        what, fix = (
            f"top-1 of {candidate['name']}",
            "evaluate on images with labels, or use min_agreement.",
        )
        return 100 * self.require(candidate.get("top1"), what, fix)

    def sqnr(self) -> float:
        """Of the result, in dB."""
        what, fix = (
            f"finite SQNR of {self.result['name']}",
            "leave out the limit on the SQNR: nothing is quantized.",
        )
        return self.require(self.result.get("sqnr_db"), what, fix)


def _check_limits(limits: dict[str, float], *, has_baseline: bool) -> None:
    if not limits:
        raise ArgumentError(
            "no limit is given, and without one every run passes.", "give --max-drop 0.5, say."
        )
    for name, limit in limits.items():
        low, high = _RANGES[name]
        if not low <= limit <= high or math.isinf(limit):
            share = ", a share" if high == 1 else ""
            raise ArgumentError(
                f"{name} is {limit:g}; it must lie between {low:g} and {high:g}{share}.",
                "correct the limit.",
            )
    if "max_sqnr_drop" in limits and not has_baseline:
        raise ArgumentError(
            "max_sqnr_drop is given, but no baseline.", "give one, or use min_sqnr."
        )
    if has_baseline and not limits.keys() & {"max_drop", "max_sqnr_drop"}:
        raise ArgumentError(
            "a baseline is given, but no limit that compares with it.",
            "add max_drop or max_sqnr_drop.",
        )


def _require_same_images(judged: _Facts, other: _Facts) -> None:
    """As many images with the same labels; where a run holds no digest of them, the same accuracy in float.

    Where the images lie does not matter, nor which float model was quantized.
    """
    counts = [facts.get("evaluation", "images") for facts in (judged, other)]
    marks = [facts.get("data", "labels_digest") for facts in (judged, other)]
    if None in marks:
        marks = [
            [facts.reference.get(name) for name in ("top1", "top5")] for facts in (judged, other)
        ]
    if counts[0] is None or counts[0] != counts[1] or marks[0] != marks[1]:
        raise DataError(
            f"the runs {judged.run} and {other.run} were not evaluated on the same images: {counts[0]!r} and "
            f"{counts[1]!r} of them, known by {marks[0]!r} and {marks[1]!r} (labels, or top-1 and top-5 in float).",
            "evaluate both with the same data, --eval-images and --seed.",
        )


def _judge(name: str, limit: float, judged: _Facts, other: _Facts | None) -> GateCheck:
    measure, is_most = _MEASURES[name], name.startswith("max")
    found, text = measure(judged, other, _DIGITS)
    passed = (found - limit if is_most else limit - found) <= _ROUNDING
    if not passed:
        found, text = measure(judged, other, _digits_apart(found, limit))
    if name == "min_int8_macs" and not passed:
        text += _name_float_layers(judged)
    bound = f"at {'most' if is_most else 'least'} {limit:.12g}"
    return GateCheck(
        name.replace("_", "-"),
        limit,
        found,
        passed,
        printable(f"{text}; {bound}{_UNITS.get(name, '')}", MOST_CHARACTERS),
    )


def _digits_apart(found: float, limit: float) -> int:
    """Decimals with which two different numbers do not look the same."""
    return next(
        (digits for digits in range(_DIGITS, 12) if round(found, digits) != round(limit, digits)),
        12,
    )


def _measure_drop(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    found = judged.top1(judged.result)
    base = judged.top1(judged.reference) if other is None else other.top1(other.result)
    whose = judged.reference["name"] if other is None else f"the baseline {other.run}"
    compared = _compare(found, base, "points", digits)
    return (
        base - found,
        f"top-1 of {judged.result['name']} is {compared} {whose} ({base:.{digits}f} %)",
    )


def _measure_sqnr_drop(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    assert other is not None  # noqa: S101  # `_check_limits` has seen to it
    found, base = judged.sqnr(), other.sqnr()
    compared = (
        f"{_compare(found, base, 'dB', digits)} the baseline {other.run} ({base:.{digits}f} dB)"
    )
    return base - found, f"SQNR of {judged.result['name']} is {compared}"


def _compare(found: float, base: float, unit: str, digits: int) -> str:
    sign = "%" if unit == "points" else unit
    if abs(base - found) <= _ROUNDING:
        return f"{found:.{digits}f} {sign}, as that of"
    where = "below" if found < base else "above"
    return f"{found:.{digits}f} {sign}, {abs(base - found):.{digits}f} {unit} {where}"


def _measure_sqnr(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    return judged.sqnr(), f"SQNR of {judged.result['name']} is {judged.sqnr():.{digits}f} dB"


def _measure_agreement(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    name = judged.result["name"]
    value = judged.require(
        judged.result.get("agreement"), f"agreement of {name}", "run qdq ptq again."
    )
    share = f"{value:.{max(digits, _SHARE_DIGITS)}f}"
    return value, f"{name} agrees with {judged.reference['name']} on {share} of the images"


def _measure_int8_macs(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    fix = "run qdq ptq again, with an engine: runs of an earlier version lack it."
    value = judged.require(judged.get("summary", "int8_macs"), "share of MACs in int8", fix)
    return value, f"{value:.{max(digits, _SHARE_DIGITS)}f} of the multiplications run in int8"


def _measure_size(judged: _Facts, other: _Facts | None, digits: int) -> tuple[float, str]:
    value = judged.require(
        judged.get("summary", "onnx_megabytes"), "size of its ONNX file", "run qdq ptq again."
    )
    return value, f"the ONNX file has {value:.{digits}f} MB"


_MEASURES: dict[str, Callable[[_Facts, _Facts | None, int], tuple[float, str]]] = {
    "max_drop": _measure_drop,
    "max_sqnr_drop": _measure_sqnr_drop,
    "min_sqnr": _measure_sqnr,
    "min_agreement": _measure_agreement,
    "min_int8_macs": _measure_int8_macs,
    "max_size": _measure_size,
}
_RANGES = {
    "max_drop": (0.0, 100.0),
    "max_sqnr_drop": (0.0, math.inf),
    "min_sqnr": (-math.inf, math.inf),
    "min_agreement": (0.0, 1.0),
    "min_int8_macs": (0.0, 1.0),
    "max_size": (0.0, math.inf),
}
_UNITS = {"max_drop": " points", "max_sqnr_drop": " dB", "min_sqnr": " dB", "max_size": " MB"}


def _name_float_layers(judged: _Facts) -> str:
    """The layers with the most work that are not in int8, with the reason."""
    sizes = {
        row["name"]: row["share"] or 0.0 for row in judged.get("build", "coverage", "layers") or ()
    }
    rows = [row for row in judged.get("build", "layers") or () if row.get("int8") is False]
    rows.sort(key=lambda row: -sizes.get(row.get("node"), 0.0))
    shown = [
        f"{row.get('module') or row.get('node')} ({sizes.get(row.get('node'), 0.0):.4f}, {row.get('reason')})"
        for row in rows[:_SHOWN_LAYERS]
    ]
    return f"; in float most of all {', '.join(shown)}" if shown else ""
