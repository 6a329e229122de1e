"""`qdq gate`: limits that a run must meet before it is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qdq.cli.workloads import parse_number, parse_numbers
from qdq.errors import QdqError

if TYPE_CHECKING:
    from qdq.gate import GateReport


def gate(
    run: Path,
    /,
    *,
    baseline: Path | None = None,
    max_drop: float | None = None,
    max_sqnr_drop: float | None = None,
    min_sqnr: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    min_agreement: float | None = None,
    min_int8_macs: float | None = None,
    min_fp8_macs: float | None = None,
    max_size: float | None = None,
    min_score: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    max_score_drop: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    target: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    min_speedup: float | None = None,
    max_latency_ms: float | None = None,
    junit: Path | None = None,
    json: Path | None = None,
) -> int:
    """Fail a CI job when a run misses a limit. Needs no torch.

    Prints one line per limit. It checks the result of the ONNX file. The exit code is 1 when the run misses a limit,
    and 2 when a limit cannot be checked, for example because the run has no labels.

    For example:

        qdq gate runs/new --baseline runs/old --max-drop 0.5 --min-int8-macs 0.9 --junit gate.xml

    Args:
        run: Run folder, or a copy of its report.json.
        baseline: Run to compare with, evaluated on the same images.
        max_drop: Largest loss of top-1 against the baseline, in percentage points. Without a baseline the run's own
            float model is the reference.
        max_sqnr_drop: Largest loss of SQNR against the baseline, in dB.
        min_sqnr: Smallest SQNR against the float model, in dB; NAME=DB for that of one of several outputs, may be
            repeated.
        min_agreement: Smallest fraction of images (0 to 1) with the same top-1 as the float model.
        min_int8_macs: Smallest fraction of MACs (0 to 1) that run in int8 in the engine.
        min_fp8_macs: Smallest fraction of MACs (0 to 1) that run in FP8 in the engine.
        max_size: Largest size of the ONNX file, in MB.
        min_score: NAME=VALUE: the smallest value of a metric of the task, such as mAP=0.4. May be repeated.
        max_score_drop: NAME=VALUE: the largest loss of a metric against the baseline, or against the run's own float
            model. May be repeated.
        target: The result.json of one target or several, which verify.sh of the bundle wrote. No check in them may have
            failed.
        min_speedup: Smallest time of the float engine over that of the quantized engine; the worst target
            counts.
        max_latency_ms: Largest time of the quantized engine, in ms; the worst target counts.
        junit: Also write the result to this file, as JUnit XML.
        json: Also write the result to this file.
    """
    from qdq.gate import gate_run
    from qdq.run import guard_command, list_run_files

    inputs = [*list_run_files(run), *target]
    if baseline is not None:
        inputs = [*inputs, *list_run_files(baseline)]
    guard_command(inputs=inputs, outputs=[junit, json])
    try:
        report = gate_run(
            run,
            baseline=baseline,
            max_drop=max_drop,
            max_sqnr_drop=max_sqnr_drop,
            min_sqnr=_parse_min_sqnr(min_sqnr),
            min_agreement=min_agreement,
            min_int8_macs=min_int8_macs,
            min_fp8_macs=min_fp8_macs,
            max_size=max_size,
            min_score=parse_numbers("--min-score", min_score),
            max_score_drop=parse_numbers("--max-score-drop", max_score_drop),
            targets=target,
            min_speedup=min_speedup,
            max_latency_ms=max_latency_ms,
        )
    except QdqError as error:  # the files of an earlier call must not be taken for this result
        _write_error(run, error, junit, json)
        raise
    print(report.format_table())
    _write_report(report, junit, json)
    return 0 if report.passed else 1


def _parse_min_sqnr(texts: tuple[str, ...]) -> float | Mapping[str, float] | None:
    """One number, or NAME=DB for each of several outputs.

    Raises:
        ArgumentError: Anything else.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return parse_number("--min-sqnr", texts[0])
    return parse_numbers("--min-sqnr", texts)


def _write_error(run: Path, error: QdqError, junit: Path | None, json: Path | None) -> None:
    from qdq.files import write_atomic, write_json
    from qdq.gate import format_junit_error

    if junit is not None:
        write_atomic(junit, format_junit_error(run, error))
    if json is not None:
        write_json(json, {"passed": False, "error": str(error)})


def _write_report(report: GateReport, junit: Path | None, json: Path | None) -> None:
    from qdq.files import to_jsonable, write_atomic, write_json
    from qdq.gate import format_junit

    if junit is not None:
        write_atomic(junit, format_junit(report))
    if json is not None:
        write_json(json, {"passed": report.passed, **to_jsonable(report)})
