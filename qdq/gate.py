"""Is a run good enough to ship? Checks its report.json against limits, for CI. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qdq.errors import ArgumentError, DataError, QdqError
from qdq.files import as_path
from qdq.product_types import LOW_TYPES
from qdq.report.load import guarded, read_report
from qdq.report.sections import JudgedSections
from qdq.report.targets import TargetResult, load_targets
from qdq.schema import validate
from qdq.text import MOST_CHARACTERS, printable

_ROUNDING = 1e-9  # of float64: 84.8 - 84.4 is not more than 0.4
_FLOAT32_ROUNDING = 1e-5  # relative, of a score of the float model on another machine
_SHOWN_LAYERS = 3

# Decimals of a value, and of a fraction. A value gets more if it would look like the limit that it misses.
_DIGITS = 2
_FRACTION_DIGITS = 4
_MOST_DIGITS = 12


@dataclass(frozen=True)
class GateCheck:
    """One limit and the value of the run.

    Args:
        name: The limit as the command line spells it, "max-drop".
        limit: The limit (see `gate_run` for the units).
        value: The value of the run, in the same unit.
        passed: Whether the run meets the limit.
        message: The value, what it was compared with, and the limit, in one line.
    """

    name: str
    limit: float
    value: float
    passed: bool
    message: str


@dataclass(frozen=True)
class GateReport:
    """Result of `gate_run`.

    Args:
        run: The run, as it was given.
        baseline: The run it was compared with, or None.
        checks: One for each limit.
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
        """Whether the run meets all limits."""
        return not self.failures

    def format_table(self) -> str:
        """One line for each limit, then the verdict."""
        lines = []
        for check in self.checks:
            outcome = "pass" if check.passed else "FAIL"
            lines.append(f"{outcome}  {check.name}: {check.message}")

        missed, total = len(self.failures), len(self.checks)
        lines.append(f"{printable(self.run)}: {missed} of {total} limits missed")
        return "\n".join(lines)


def gate_run(
    run: Path | str,
    *,
    baseline: Path | str | None = None,
    max_drop: float | None = None,
    max_sqnr_drop: float | None = None,
    min_sqnr: float | Mapping[str, float] | None = None,
    min_agreement: float | None = None,
    min_int8_macs: float | None = None,
    min_fp8_macs: float | None = None,
    max_size: float | None = None,
    min_score: Mapping[str, float] | None = None,
    max_score_drop: Mapping[str, float] | None = None,
    targets: Sequence[Path | str] = (),
    min_speedup: float | None = None,
    max_latency_ms: float | None = None,
) -> GateReport:
    """Check a run against limits. The last row of its result table is checked: the ONNX file in the recipe.

    Args:
        run: Run folder, or a copy of its report.json.
        baseline: Another run on the same images: its folder, or a copy of its report.json.
        max_drop: Largest drop in top-1 from the baseline, in points (0 to 100); without a baseline from the
            run's own float model.
        max_sqnr_drop: Largest drop in SQNR from the baseline, in dB.
        min_sqnr: Smallest SQNR of the outputs against the float model, in dB: of several outputs, that of the worst.
            Or the smallest of each output by name, `{"scores": 20}`.
        min_agreement: Smallest fraction of images (0 to 1) with the same top-1 answer as the float model.
        min_int8_macs: Smallest fraction of all MACs (0 to 1) that runs in int8 in the engine.
        min_fp8_macs: Likewise in FP8.
        max_size: Largest ONNX file, in MB (10^6 bytes).
        min_score: Smallest value of a metric of the task by its name, `{"mAP": 0.4}`.
        max_score_drop: Largest drop of a metric from the baseline, in its own unit; without a baseline from the
            run's own float model.
        targets: Files result.json that `verify.sh` of the run's bundle wrote. No check in them may have failed.
        min_speedup: Smallest time of the float16 engine over that of the quantized engine; the worst target counts.
        max_latency_ms: Largest time of the quantized engine, in ms; the worst target counts.

    Raises:
        ArgumentError: No limit, a limit out of its range, only one of a baseline and a limit that compares with it, or
            no report.
        DataError: The report is damaged, is of other images than the baseline's, or lacks a value that a limit needs.
    """
    arguments = {
        "max_drop": max_drop,
        "max_sqnr_drop": max_sqnr_drop,
        "min_sqnr": min_sqnr,
        "min_agreement": min_agreement,
        "min_int8_macs": min_int8_macs,
        "min_fp8_macs": min_fp8_macs,
        "max_size": max_size,
        "min_score": min_score,
        "max_score_drop": max_score_drop,
        "min_speedup": min_speedup,
        "max_latency_ms": max_latency_ms,
    }
    limits: dict[_Limit, float] = {}
    for name, limit in arguments.items():
        if isinstance(limit, Mapping):
            limits |= {_Limit(name, part): value for part, value in limit.items()}
        elif limit is not None:
            limits[_Limit(name)] = limit
    _check_limits(limits, has_baseline=baseline is not None, has_targets=bool(targets))

    run = as_path(run, "run")
    facts = _RunFacts(run, targets)
    if baseline is None:
        checks = guarded(facts.path, lambda: _check_run(limits, facts, None))
        return GateReport(run, None, checks)

    baseline = as_path(baseline, "baseline")
    baseline_facts = _RunFacts(baseline)
    _require_same_images(facts, baseline_facts)
    checks = guarded(facts.path, lambda: _check_run(limits, facts, baseline_facts))
    return GateReport(run, baseline, checks)


# JUnit


def format_junit(report: GateReport) -> bytes:
    """The checks as JUnit XML for CI servers, one test case for each limit.

    It has the elements and attributes that Ant's schema requires and Jenkins' schema allows. The host name is left out.
    """
    root, suite = _new_suite(tests=len(report.checks), failures=len(report.failures))
    for check in report.checks:
        case = _add_case(suite, report.run, check.name)
        if not check.passed:
            _add_outcome(case, "failure", "limit", check.message)

    return _finish_suite(root, suite, report.format_table())


def format_junit_error(run: Path | str, error: QdqError) -> bytes:
    """A run that could not be checked, as JUnit XML: one test case with an error.

    Args:
        run: The run, as it was given.
        error: The reason.
    """
    message = printable(error, MOST_CHARACTERS)
    root, suite = _new_suite(tests=1, errors=1)
    case = _add_case(suite, run, "gate")
    _add_outcome(case, "error", type(error).__name__, message)
    return _finish_suite(root, suite, message)


def _new_suite(tests: int, failures: int = 0, errors: int = 0) -> tuple[Element, Element]:
    """The root and the suite in it."""
    root = Element("testsuites")
    attributes = {
        "name": "qdq gate",
        "package": "qdq",
        "id": "0",
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "hostname": "localhost",
        "tests": str(tests),
        "failures": str(failures),
        "errors": str(errors),
        "time": "0",
    }
    suite = SubElement(root, "testsuite", attributes)
    SubElement(suite, "properties")
    return root, suite


def _add_case(suite: Element, run: Path | str, name: str) -> Element:
    """Add a test case that passes."""
    return SubElement(suite, "testcase", {"classname": printable(run), "name": name, "time": "0"})


def _add_outcome(case: Element, outcome: str, kind: str, message: str) -> None:
    """Mark a test case; `outcome` is "failure" or "error"."""
    element = SubElement(case, outcome, {"type": kind, "message": message})
    element.text = message


def _finish_suite(root: Element, suite: Element, output: str) -> bytes:
    SubElement(suite, "system-out").text = output
    SubElement(suite, "system-err")
    indent(root)
    xml: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return xml


# The report


class _RunFacts:
    """The report of a run. A value that it lacks is an error, never a pass.

    Args:
        run: Run folder, or the file.
        targets: Files with results of targets.

    Raises:
        ArgumentError: There is no report.
        DataError: The file is not the report of a run, or a result is of another bundle.
    """

    def __init__(self, run: Path, targets: Sequence[Path | str] = ()) -> None:
        self.run = run
        self.path, content = read_report(run)
        fix = "give the report.json of a run, or run qdq ptq again."
        validate(JudgedSections, content, str(self.path), fix)
        self._content: dict[str, Any] = content
        self.targets = load_targets(targets, content.get("model_sha256")) if targets else ()
        candidates = content["evaluation"]["candidates"]
        self.reference: dict[str, Any] = candidates[0]
        self.result: dict[str, Any] = candidates[-1]

    def get(self, *keys: str) -> Any:
        """A value by its keys from the top; None if one is missing."""
        value: Any = self._content
        for key in keys:
            if value is None:
                return None
            value = value.get(key)

        return value

    def require(self, value: float | None, title: str, fix: str) -> float:
        """A value that a limit needs.

        Raises:
            DataError: It is None.
        """
        if value is None:
            raise DataError(f"{self.run} has no {title}, and a limit asks for it.", fix)
        return float(value)

    def top1(self, candidate: dict[str, Any]) -> float:
        """Top-1 of a row of the result table, in percent."""
        title = f"top-1 of {candidate['name']}"
        fix = "evaluate on images with labels, or use min_agreement."
        return 100 * self.require(candidate.get("top1"), title, fix)

    def score(self, candidate: dict[str, Any], metric: str) -> float:
        """A metric of the task of a row of the result table."""
        scores = candidate.get("scores") or {}
        names = ", ".join(scores)
        fix = f"name one of {names}." if names else "evaluate with a metric: qdq ptq --metric."
        return self.require(scores.get(metric), f"{metric} of {candidate['name']}", fix)

    @property
    def float_scores(self) -> dict[str, float]:
        """Top-1, top-5 and the metrics of the task of the float model, without those that were not measured."""
        scores = {name: self.reference.get(name) for name in ("top1", "top5")}
        scores |= self.reference.get("scores") or {}
        return {name: score for name, score in scores.items() if score is not None}

    @property
    def outputs(self) -> dict[str, float | None]:
        """SQNR of each output of the result in dB, if there are several; None is infinite."""
        return {entry["name"]: entry["sqnr_db"] for entry in self.result.get("outputs") or ()}

    def times(self, figure: str, title: str, fix: str) -> list[tuple[float, str]]:
        """A figure of the check of times of each target, and what the target is.

        Args:
            figure: Its key.
            title: What it is, for the message.
            fix: What to do if a target has none.

        Raises:
            DataError: A target has none.
        """
        values = []
        for target in self.targets:
            value = target.figure("time", figure)
            if value is None:
                check = target.find_check("time")
                reason = "it has no check of times" if check is None else check["text"]
                raise DataError(
                    f"{target.path} has no {title}, and a limit asks for it: {reason}.",
                    fix,
                )
            values.append((value, f"{target.name} ({target.path})"))
        return values

    def sqnr(self) -> float:
        """SQNR of the result, in dB."""
        title = f"finite SQNR of {self.result['name']}"
        fix = "leave out the limit on the SQNR: nothing is quantized."
        return self.require(self.result.get("sqnr_db"), title, fix)


class _Limit(NamedTuple):
    """What a limit is on.

    Args:
        name: The argument of `gate_run`.
        part: The output of the model, or the metric of the task; empty for all.
    """

    name: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.name} of {printable(self.part)}" if self.part else self.name


def _check_limits(limits: Mapping[_Limit, float], *, has_baseline: bool, has_targets: bool) -> None:
    if not limits and not has_targets:
        raise ArgumentError(
            "no limit is given, and without one every run passes.",
            "give --max-drop 0.5, for example.",
        )
    for name, limit in limits.items():
        rule = _RULES[name.name]
        is_in_range = rule.low <= limit <= rule.high
        if not is_in_range or math.isinf(limit):
            unit = ", a fraction" if rule.high == 1 else ""
            raise ArgumentError(
                f"{name} is {limit:g}; it must lie between {rule.low:g} and {rule.high:g}{unit}.",
                "correct the limit.",
            )

    names = {name.name for name in limits}
    if names & {"min_speedup", "max_latency_ms"} and not has_targets:
        raise ArgumentError(
            "a limit on times is given, but no result of a target.",
            "give the result.json that verify.sh of the bundle wrote: --target result.json.",
        )
    if "max_sqnr_drop" in names and not has_baseline:
        raise ArgumentError(
            "max_sqnr_drop is given, but no baseline.", "give one, or use min_sqnr."
        )
    compares = bool(names & {"max_drop", "max_sqnr_drop", "max_score_drop"})
    if has_baseline and not compares:
        raise ArgumentError(
            "a baseline is given, but no limit that compares with it.",
            "add max_drop, max_sqnr_drop or max_score_drop.",
        )


def _require_same_images(run: _RunFacts, baseline: _RunFacts) -> None:
    """Require the same number of images and the same labels; if a run has no digest of them, the same float scores.

    The location of the images does not matter, nor does the float model that was quantized.

    Raises:
        DataError: The images differ.
    """
    count, baseline_count = (facts.get("evaluation", "images") for facts in (run, baseline))
    marks, baseline_marks = (facts.get("data", "labels_digest") for facts in (run, baseline))
    if marks is None or baseline_marks is None:
        marks, baseline_marks = run.float_scores, baseline.float_scores

    is_same_count = count is not None and count == baseline_count
    if is_same_count and _are_close(marks, baseline_marks):
        return
    raise DataError(
        f"the runs {run.run} and {baseline.run} were not evaluated on the same images: {count!r} and "
        f"{baseline_count!r} images, identified by {marks!r} and {baseline_marks!r} "
        "(labels, or the scores in float).",
        "evaluate both with the same data, --eval-images and --seed.",
    )


def _are_close(marks: Any, baseline_marks: Any) -> bool:
    """Whether two marks are equal; scores may differ by the rounding of float32, which depends on the machine."""
    if not isinstance(marks, Mapping) or not isinstance(baseline_marks, Mapping):
        return bool(marks == baseline_marks)
    if set(marks) != set(baseline_marks):
        return False
    return all(
        math.isclose(value, baseline_marks[name], rel_tol=_FLOAT32_ROUNDING)
        for name, value in marks.items()
    )


# The checks


class _Measured(NamedTuple):
    """A value of a run, as a number and as text."""

    value: float
    text: str


@dataclass(frozen=True)
class _Rule:
    """How one limit is checked.

    Args:
        measure: Measures a run, with or without a baseline, and formats the value with a number of decimals.
        low: Smallest limit that makes sense.
        high: Largest limit that makes sense.
        unit: Unit of the limit, after a space.
        is_maximum: Whether the value must not be above the limit; otherwise it must not be below.
    """

    measure: Callable[[_RunFacts, _RunFacts | None, int], _Measured]
    low: float
    high: float
    unit: str = ""
    is_maximum: bool = False


def _check_run(
    limits: Mapping[_Limit, float], run: _RunFacts, baseline: _RunFacts | None
) -> tuple[GateCheck, ...]:
    checks = [_check_limit(name, limit, run, baseline) for name, limit in limits.items()]
    return tuple(checks + [_check_target(target) for target in run.targets])


def _check_target(target: TargetResult) -> GateCheck:
    """No check of a target may have failed, and it must have run."""
    data = target.data
    texts = []
    for check in data["checks"]:
        if check["status"] == "failed":
            texts.append(f"{check['name']}: {check['text']}")
    counts = f"{data['passed']} passed, {data['failed']} failed, {data['not_checked']} not checked"
    message = "; ".join([f"{target.name}: {data['verdict']}, {counts}", *texts[:_SHOWN_LAYERS]])
    passed = data["verdict"] == "passed"
    return GateCheck(
        "target", 0.0, float(data["failed"]), passed, printable(message, MOST_CHARACTERS)
    )


def _check_limit(
    name: _Limit, limit: float, run: _RunFacts, baseline: _RunFacts | None
) -> GateCheck:
    rule = _RULES[name.name]
    measure = rule.measure
    title = name.name.replace("_", "-")
    if name.part:
        measure = partial(_PART_MEASURES[name.name], name.part)
        title = f"{title} of {printable(name.part)}"
    value, text = measure(run, baseline, _DIGITS)
    excess = value - limit if rule.is_maximum else limit - value
    passed = excess <= _ROUNDING
    if not passed:
        value, text = measure(run, baseline, _count_digits(value, limit))
        if name.name in ("min_int8_macs", "min_fp8_macs"):
            text += _name_float_layers(run)

    bound = "at most" if rule.is_maximum else "at least"
    message = printable(f"{text}; {bound} {limit:.12g}{rule.unit}", MOST_CHARACTERS)
    return GateCheck(title, limit, value, passed, message)


def _count_digits(value: float, limit: float) -> int:
    """The number of decimals with which a value does not look like the limit that it misses."""
    for digits in range(_DIGITS, _MOST_DIGITS):
        if round(value, digits) != round(limit, digits):
            return digits

    return _MOST_DIGITS


def _measure_drop(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    top1 = run.top1(run.result)
    if baseline is None:
        reference, reference_name = run.top1(run.reference), run.reference["name"]
    else:
        reference = baseline.top1(baseline.result)
        reference_name = f"the baseline {baseline.run}"

    difference = _describe_difference(top1, reference, "points", digits)
    text = (
        f"top-1 of {run.result['name']} is {top1:.{digits}f} %, "
        f"{difference} {reference_name} ({reference:.{digits}f} %)"
    )
    return _Measured(reference - top1, text)


def _measure_sqnr_drop(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    assert baseline is not None  # noqa: S101  # `_check_limits` requires one
    sqnr, reference = run.sqnr(), baseline.sqnr()
    difference = _describe_difference(sqnr, reference, "dB", digits)
    text = (
        f"SQNR of {run.result['name']} is {sqnr:.{digits}f} dB, "
        f"{difference} the baseline {baseline.run} ({reference:.{digits}f} dB)"
    )
    return _Measured(reference - sqnr, text)


def _describe_difference(value: float, reference: float, unit: str, digits: int) -> str:
    distance = abs(reference - value)
    if distance <= _ROUNDING:
        return "the same as"
    side = "below" if value < reference else "above"
    return f"{distance:.{digits}f} {unit} {side}"


def _measure_sqnr(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    sqnr = run.sqnr()
    text = f"SQNR of {run.result['name']} is {sqnr:.{digits}f} dB"
    return _Measured(sqnr, text + _name_worst_output(run))


def _name_worst_output(run: _RunFacts) -> str:
    """The output whose SQNR is that of a run with several outputs."""
    decibels = {name: value for name, value in run.outputs.items() if value is not None}
    if not decibels:
        return ""
    return f" ({min(decibels, key=decibels.__getitem__)}, the worst of {len(run.outputs)} outputs)"


def _measure_output_sqnr(
    output: str, run: _RunFacts, baseline: _RunFacts | None, digits: int
) -> _Measured:
    """The SQNR of one of several outputs."""
    names = ", ".join(run.outputs)
    fix = f"name one of {names}." if names else "it has one output: give min_sqnr as a number."
    title = f"finite SQNR of the output {output} of {run.result['name']}"
    sqnr = run.require(run.outputs.get(output), title, fix)
    return _Measured(sqnr, f"SQNR of {output} of {run.result['name']} is {sqnr:.{digits}f} dB")


def _measure_score(
    metric: str, run: _RunFacts, baseline: _RunFacts | None, digits: int
) -> _Measured:
    """The value of a metric of the task."""
    score = run.score(run.result, metric)
    return _Measured(score, f"{metric} of {run.result['name']} is {_format_score(score, digits)}")


def _measure_score_drop(
    metric: str, run: _RunFacts, baseline: _RunFacts | None, digits: int
) -> _Measured:
    """The drop of a metric of the task from the baseline, or from the float model."""
    score = run.score(run.result, metric)
    if baseline is None:
        reference, reference_name = run.score(run.reference, metric), run.reference["name"]
    else:
        reference = baseline.score(baseline.result, metric)
        reference_name = f"the baseline {baseline.run}"
    text = (
        f"{metric} of {run.result['name']} is {_format_score(score, digits)}, "
        f"and {_format_score(reference, digits)} of {reference_name}"
    )
    return _Measured(reference - score, text)


def _format_score(score: float, digits: int) -> str:
    return f"{score:.{max(digits, _FRACTION_DIGITS)}f}"


def _refuse_whole(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    """A limit on a metric that is not named."""
    raise ArgumentError("a limit on a score names no metric.", 'give {"mAP": 0.4}, for example.')


def _measure_agreement(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    name = run.result["name"]
    fix = "run qdq ptq again; several outputs, and one that is not [N, classes], have none."
    agreement = run.require(run.result.get("agreement"), f"agreement of {name}", fix)
    fraction = f"{agreement:.{max(digits, _FRACTION_DIGITS)}f}"
    text = f"{name} agrees with {run.reference['name']} on {fraction} of the images"
    return _Measured(agreement, text)


def _measure_int8_macs(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    fix = "run qdq ptq again, with an engine: runs of an earlier version lack it."
    int8_macs = run.require(run.get("summary", "int8_macs"), "fraction of MACs in int8", fix)
    fraction = f"{int8_macs:.{max(digits, _FRACTION_DIGITS)}f}"
    text = f"{fraction} of the MACs run in int8{_count_unknown(run)}"
    return _Measured(int8_macs, text)


def _measure_fp8_macs(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    fix = "run qdq ptq again, with an engine: runs of an earlier version lack it."
    census = run.get("summary", "census")
    stored = None
    if census is not None:
        stored = census["FP8"]["macs"] if "FP8" in census else 0.0
    fp8_macs = run.require(stored, "fraction of MACs in FP8", fix)
    fraction = f"{fp8_macs:.{max(digits, _FRACTION_DIGITS)}f}"
    text = f"{fraction} of the MACs run in FP8{_count_unknown(run)}"
    return _Measured(fp8_macs, text)


def _count_unknown(run: _RunFacts) -> str:
    """How many nodes a fraction of the MACs does not count; "" if it counts all of them."""
    sizes = run.get("build", "coverage", "layers") or ()
    num_unknown = sum(size["share"] is None for size in sizes)
    if not num_unknown:
        return ""
    return f" ({num_unknown} nodes of unknown work are not counted)"


def _measure_size(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    megabytes = run.get("summary", "onnx_megabytes")
    size = run.require(megabytes, "size of its ONNX file", "run qdq ptq again.")
    return _Measured(size, f"the ONNX file has {size:.{digits}f} MB")


def _measure_speedup(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    fix = "make the bundle with --with-float, and run verify.sh again."
    speedup, target = min(run.times("speedup", "speedup", fix))
    return _Measured(
        speedup, f"the quantized engine is {speedup:.{digits}f} times as fast as float on {target}"
    )


def _measure_latency(run: _RunFacts, baseline: _RunFacts | None, digits: int) -> _Measured:
    fix = "run verify.sh again, and see why its check of times was not done."
    latency, target = max(run.times("int8_ms", "time of the quantized engine", fix))
    return _Measured(latency, f"the quantized engine takes {latency:.{digits}f} ms on {target}")


_RULES = {
    "max_drop": _Rule(_measure_drop, 0.0, 100.0, " points", is_maximum=True),
    "max_sqnr_drop": _Rule(_measure_sqnr_drop, 0.0, math.inf, " dB", is_maximum=True),
    "min_sqnr": _Rule(_measure_sqnr, -math.inf, math.inf, " dB"),
    "min_agreement": _Rule(_measure_agreement, 0.0, 1.0),
    "min_int8_macs": _Rule(_measure_int8_macs, 0.0, 1.0),
    "min_fp8_macs": _Rule(_measure_fp8_macs, 0.0, 1.0),
    "max_size": _Rule(_measure_size, 0.0, math.inf, " MB", is_maximum=True),
    "min_score": _Rule(_refuse_whole, -math.inf, math.inf),
    "max_score_drop": _Rule(_refuse_whole, 0.0, math.inf, is_maximum=True),
    "min_speedup": _Rule(_measure_speedup, 0.0, math.inf),
    "max_latency_ms": _Rule(_measure_latency, 0.0, math.inf, " ms", is_maximum=True),
}

_PART_MEASURES = {
    "min_sqnr": _measure_output_sqnr,
    "min_score": _measure_score,
    "max_score_drop": _measure_score_drop,
}
"""Measures of one output, or of one metric."""


def _name_float_layers(run: _RunFacts) -> str:
    """The layers with the most MACs that are in float, with their fraction and the reason."""
    fractions = {}
    for size in run.get("build", "coverage", "layers") or ():
        fractions[size["name"]] = size["share"] or 0.0

    layers = []
    for layer in run.get("build", "layers") or ():
        if layer.get("int8") is False and layer.get("built") not in LOW_TYPES:
            layers.append(layer)

    layers.sort(key=lambda layer: -fractions.get(layer.get("node"), 0.0))

    texts = []
    for layer in layers[:_SHOWN_LAYERS]:
        name = layer.get("module") or layer.get("node")
        fraction = fractions.get(layer.get("node"), 0.0)
        texts.append(f"{name} ({fraction:.4f}, {layer.get('reason')})")

    if not texts:
        return ""
    return f"; the largest layers in float are {', '.join(texts)}"
