"""`qdq gate`: may this run be shipped?"""

from __future__ import annotations

from pathlib import Path


def gate(
    run: Path,
    /,
    *,
    baseline: Path | None = None,
    max_drop: float | None = None,
    max_sqnr_drop: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    min_int8_macs: float | None = None,
    max_size: float | None = None,
    junit: Path | None = None,
    json: Path | None = None,
) -> int:
    """Hold limits against a run, in CI. Needs no torch.

    Prints one line a limit. Exit code 1 when the run misses one, 2 when it cannot be judged, as when it lacks a fact
    that a limit asks for. Judged is the ONNX file.

    Such as:

        qdq gate runs/new --baseline runs/old --max-drop 0.5 --min-int8-macs 0.9 --junit gate.xml

    Args:
        run: Run folder, or a copy of its report.json.
        baseline: Run to compare with, evaluated on the same images.
        max_drop: Points of top-1 that it may lie below the baseline, or below its own float model without one.
        max_sqnr_drop: Decibels of SQNR that it may lie below the baseline.
        min_sqnr: Least SQNR against the float model, in dB.
        min_agreement: Least share of images, 0 to 1, with the float model's top-1.
        min_int8_macs: Least share of multiplications, 0 to 1, in int8 in the engine.
        max_size: Largest ONNX file, in MB.
        junit: Also write the result to this file, as JUnit XML.
        json: Also write the result to this file.
    """
    from qdq.errors import QdqError
    from qdq.files import to_jsonable, write_atomic, write_json
    from qdq.gate import format_junit, format_junit_error, gate_run
    from qdq.run import guard_command, list_run_files

    read = [*list_run_files(run), *([] if baseline is None else list_run_files(baseline))]
    guard_command(inputs=read, outputs=[junit, json])
    try:
        report = gate_run(
            run,
            baseline=baseline,
            max_drop=max_drop,
            max_sqnr_drop=max_sqnr_drop,
            min_sqnr=min_sqnr,
            min_agreement=min_agreement,
            min_int8_macs=min_int8_macs,
            max_size=max_size,
        )
    except QdqError as error:  # results of an earlier run must not pass for this one's
        if junit is not None:
            write_atomic(junit, format_junit_error(run, error))
        if json is not None:
            write_json(json, {"passed": False, "error": str(error)})
        raise
    print(report.format_table())
    if junit is not None:
        write_atomic(junit, format_junit(report))
    if json is not None:
        write_json(json, {"passed": report.passed, **to_jsonable(report)})
    return 0 if report.passed else 1
