"""The zoo sweep: torchvision's families and timm's architectures, each from float module to TensorRT-RTX engine.

python tools/zoo.py [--models 'torchvision/*' levit_128s] [--precision fp32 fp16] [--json FILE] [--resume] [--timeout S]

Every model runs in a separate process: a crash, a kill for memory or a hang costs one row. Weights are random (seed 0),
images are noise. A model that plain `torch.onnx.export` cannot export is shown but not counted.
"""

from __future__ import annotations

import json as json_module
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.run import describe_environment

ROW_FILE = "row.json"
# Failures that qdq does not cause, by name of the model, with the reason that the table prints. All others must pass.
EXPLAINED: dict[str, str] = {
    "torchvision/s3d": "every layer is a Conv3d, which stays in float by default (R-CONV-7)",
}


def zoo(
    *,
    models: tuple[str, ...] = (),
    precision: tuple[str, ...] = ("fp32",),
    json: Path | None = None,
    resume: bool = False,
    timeout: PositiveInt = 900,
    keep: Path | None = None,
) -> int:
    """Sweep the zoo and print one line per model; exit code 1 if one that can be exported in float does not pass.

    Args:
        models: Names or patterns such as 'timm/*' or 'res*'; all by default.
        precision: Types of the layers in float in the exported files: fp32, fp16.
        json: Also write the rows to this file, after each model.
        resume: Keep the rows of this file that passed, and run the other models.
        timeout: Seconds for one model.
        keep: Keep the ONNX files and logs in this folder, with one folder per model.
    """
    from zoo_models import select_models  # imports torch, for which --help should not wait

    names = select_models(models)
    if not names:
        raise qdq.ArgumentError(
            f"no model matches {' '.join(models)}.", "look at the list in tools/zoo_models.py."
        )
    rows: dict[str, dict[str, Any]] = {}
    if resume and json:
        rows = _read_rows(json)
    for number, name in enumerate(names, 1):
        if name in rows and _is_finished(rows[name], precision):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = keep / name.replace("/", "_") if keep else Path(scratch)
            rows[name] = _run_model(name, folder, precision, timeout)
        print(f"[{number}/{len(names)}] {format_row(rows[name])}", flush=True)
        if json:
            write_json(json, {"rows": list(rows.values()), "environment": describe_environment()})

    selected = [rows[name] for name in names]
    print(format_table(selected))
    return 1 if any(judge_row(row).startswith("FAIL") for row in selected) else 0


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier sweep, by name of the model."""
    if not path.is_file():
        return {}
    rows = json_module.loads(path.read_text())["rows"]
    return {row["name"]: row for row in rows}


def _is_finished(row: dict[str, Any], precisions: tuple[str, ...]) -> bool:
    """Whether a row need not be measured again: it did not fail and has all precisions."""
    if judge_row(row).startswith("FAIL"):
        return False
    return not is_countable(row) or set(precisions) <= set(row.get("precisions", {}))


# One model


def _run_model(name: str, folder: Path, precision: tuple[str, ...], timeout: int) -> dict[str, Any]:
    """The row of one model, from its own process; it is complete even if that process was killed."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    row_file = folder / ROW_FILE
    row_file.unlink(missing_ok=True)
    arguments = [name, "--folder", str(folder), "--precision", *precision]
    failure, peak_mb = _start(folder / "log", timeout, arguments)
    row: dict[str, Any] = {"name": name, "stage": "start", "error": None, "precisions": {}}
    if row_file.is_file():
        row = json_module.loads(row_file.read_text())
    if failure and not row["error"]:
        row["error"] = failure

    for result in row["precisions"].values():
        if result.get("rtx_ok") is not False:
            continue
        if "float_rtx_error" not in row:  # check whether TensorRT refuses the float file too
            arguments = [name, "--folder", str(folder), "--build-float"]
            row["float_rtx_error"], _ = _start(folder / "float_build.log", timeout, arguments)
        result["rtx_float_refused"] = bool(row["float_rtx_error"])
    row["peak_mb"] = peak_mb
    row["total_seconds"] = round(time.perf_counter() - began, 1)
    return row


def _start(log: Path, timeout: int, arguments: list[str]) -> tuple[str, int]:
    """Run `zoo_one.py` in its own session.

    Returns:
        Why it failed ("" if it did not), and its peak memory in MB.
    """
    command = [sys.executable, str(Path(__file__).with_name("zoo_one.py")), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _die_first(process.pid)
            peak_mb = _wait(process, timeout)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if peak_mb is None:
        return f"timeout after {timeout} s", 0
    return _describe_end(process.returncode, peak_mb, log), peak_mb


def _wait(process: subprocess.Popen[bytes], timeout: int) -> int | None:
    """Wait for the end of a process; its peak memory in MB, or None if it takes longer than the timeout."""
    deadline = time.monotonic() + timeout
    while time.monotonic() <= deadline:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss // 1024
        time.sleep(0.2)
    return None


def _describe_end(exit_code: int, peak_mb: int, log: Path) -> str:
    """Why a process failed: its signal, or the last error in its log; "" if it did not fail."""
    if exit_code == 0:
        return ""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name} (peak {peak_mb} MB)"
    lines = log.read_text(errors="replace").rstrip().splitlines()
    for line in reversed(lines):
        if line.startswith("error:"):
            return line[:500]
    return lines[-1][:500] if lines else f"exit code {exit_code}"


def _die_first(pid: int) -> None:
    """Make the kernel kill the model's process when memory runs out, not this one."""
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    except OSError:
        return


# The verdict on a row


def is_countable(row: dict[str, Any]) -> bool:
    """Whether plain float export can export the model; it is tried only if something else failed."""
    return bool(row.get("float_export", True))


def judge_row(row: dict[str, Any]) -> str:
    """`pass`, `explained`, `not exportable` or `FAIL: why`."""
    if not is_countable(row):
        return "not exportable"
    faults = find_faults(row)
    if not faults:
        return "pass"
    if row["name"] in EXPLAINED:
        return "explained"
    return f"FAIL: {'; '.join(faults)}"


def find_faults(row: dict[str, Any]) -> list[str]:
    """The reasons why a row does not pass."""
    faults = []
    if row["error"]:
        faults.append(f"{row['stage']}: {row['error']}")
    for precision, result in row["precisions"].items():
        faults += _find_precision_faults(row, precision, result)
    # Some random networks amplify rounding so much that the floor itself is low.
    required_db = min(60.0, row.get("float_floor_db", 999.0) - 20)
    if row.get("fold_sqnr_db", 999) < required_db:
        faults.append(f"folding changes the outputs: SQNR {row['fold_sqnr_db']} dB")
    if row.get("restored_sqnr_db", 999) < required_db:
        faults.append(f"restored modules give other outputs: SQNR {row['restored_sqnr_db']} dB")
    return faults


def _find_precision_faults(
    row: dict[str, Any], precision: str, result: dict[str, Any]
) -> list[str]:
    faults = []
    findings = [item for item in result.get("findings", ()) if item["severity"] != "info"]
    if findings:
        counts = dict(Counter(map(itemgetter("rule"), findings)))
        example = f"{findings[0]['node']} {findings[0]['message']}"
        faults.append(f"{precision} findings {counts}: {example}")
    if result.get("ort_error"):
        faults.append(f"{precision} ONNX Runtime: {result['ort_error']}")
    if result.get("parity_ok") is False and not _is_exporter_fault(row, result):
        required = f"{result['required_db']:.1f}"
        faults.append(f"{precision} SQNR {result['sqnr_db']} dB, {required} required")
    if result.get("rtx_ok") is False and not result.get("rtx_float_refused"):
        faults.append(f"{precision} RTX: {result['rtx_error']}")
    return faults


def _is_exporter_fault(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the plain float file, in ONNX Runtime, is as far from torch as the quantized file."""
    return bool(row.get("float_sqnr_db", 999) < result["sqnr_db"] + 3)


# Notes


def describe_notes(row: dict[str, Any]) -> list[str]:
    """Remarks on a row that are not faults."""
    notes = []
    if row["name"] in EXPLAINED:
        notes.append(EXPLAINED[row["name"]])
    notes += _describe_float_export(row)
    float_products = row.get("float")
    if float_products:
        rules = Counter(map(_shorten_reason, float_products.values()))
        counts = ", ".join(f"{count} {rule}" for rule, count in rules.most_common())
        notes.append(f"float by rule: {counts}")
    num_uncalibrated = len(row.get("left_float", ()))
    if num_uncalibrated:
        notes.append(f"{num_uncalibrated} quantizers left float by calibration")
    for precision, result in row["precisions"].items():
        notes += _describe_precision(row, precision, result)
    return notes


def _describe_float_export(row: dict[str, Any]) -> list[str]:
    """Remarks on the float model and on its plain export."""
    notes = []
    if not is_countable(row):
        notes.append(f"plain float export: {row['fixed_export_error'][:160]}")
    if row.get("float_export") == "fixed":
        notes.append("fixed batch, as in float")
    if row.get("batchnorm_warmed"):
        still = ", still degenerate" if row.get("degenerate") else ""
        notes.append(f"BatchNorm statistics from data{still}")
    if row.get("float_ort_error"):
        notes.append(f"float file in ONNX Runtime: {row['float_ort_error'][:120]}")
    elif row.get("float_sqnr_db", 999) < 60:
        difference = f"plain float file against torch {row['float_sqnr_db']} dB"
        notes.append(f"{difference}: torch's exporter or ONNX Runtime")
    return notes


def _describe_precision(row: dict[str, Any], precision: str, result: dict[str, Any]) -> list[str]:
    notes = []
    if result.get("parity_ok") and result["sqnr_db"] < 30:
        floor = f"{result['tie_floor_db']:.1f} dB"
        notes.append(f"{precision} SQNR below 30 is rounding ties: their floor is {floor}")
    unpredicted = result.get("unpredicted", {})
    counts = [f"{len(nodes)} {kind}" for kind, nodes in unpredicted.items() if nodes]
    if counts:
        notes.append(f"{precision} int8 against the prediction: {', '.join(counts)}")
    if result.get("rtx_float_refused"):
        notes.append(f"TensorRT-RTX refuses the float file too: {row['float_rtx_error'][:160]}")
    return notes


def _shorten_reason(reason: str) -> str:
    """The id of the rule that a reason names, or the beginning of the reason."""
    rule = re.search(r"\((R-[^)]+)\)", reason)
    return rule[1] if rule else reason[:40]


# The table

_COLUMNS = (
    "model",
    "int8/all",
    "MACs",
    "Q/DQ",
    "find",
    "SQNR",
    "floor",
    "RTX",
    "lost",
    "s",
    "verdict",
    "note",
)


def format_row(row: dict[str, Any]) -> str:
    """One row by itself."""
    return "  ".join([*_format_cells(row), judge_row(row), *describe_notes(row)])


def format_table(rows: list[dict[str, Any]]) -> str:
    """All rows in columns, with the totals in the last line."""
    table = [list(_COLUMNS)]
    for row in rows:
        table.append([*_format_cells(row), judge_row(row), "; ".join(describe_notes(row))])
    num_aligned = len(_COLUMNS) - 2  # verdict and note are not padded
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:num_aligned]
    lines = []
    for line in table:
        aligned = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        lines.append("  ".join([*aligned, *line[num_aligned:]]).rstrip())

    counts: Counter[str] = Counter()
    for row in rows:
        verdict, _, _ = judge_row(row).partition(":")
        counts[verdict] += 1
    num_countable = len(rows) - counts["not exportable"]
    lines.append(
        f"passed {counts['pass']} of {num_countable} that plain float export can export"
        f" ({counts['explained']} explained, {counts['FAIL']} failed; {counts['not exportable']} cannot be exported)"
    )
    return "\n".join(lines)


def _format_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row except verdict and note; several precisions are separated by a bar."""
    results = list(row["precisions"].values())
    return [
        row["name"],
        _join_cells(_format_int8, results[:1]),
        _join_cells(_format_macs, results[:1]),
        _join_cells(_format_nodes, results),
        _join_cells(_count_findings, results),
        _join_cells(_format_sqnr, results),
        _join_cells(_format_floor, results),
        _join_cells(_format_rtx, results),
        _join_cells(_count_missing, results),
        f"{row.get('total_seconds', 0):.0f}",
    ]


def _join_cells(
    format_result: Callable[[dict[str, Any]], str], results: list[dict[str, Any]]
) -> str:
    return "|".join(map(format_result, results)) or "-"


def _format_int8(result: dict[str, Any]) -> str:
    return f"{result.get('int8', '-')}/{result.get('weighted', '-')}"


def _format_macs(result: dict[str, Any]) -> str:
    fraction = result.get("mac_share")
    return "-" if fraction is None else f"{fraction:.0%}"


def _format_nodes(result: dict[str, Any]) -> str:
    return f"{result.get('q', '-')}/{result.get('dq', '-')}"


def _count_findings(result: dict[str, Any]) -> str:
    """Errors and warnings, and infos after a plus sign."""
    if "findings" not in result:
        return "-"
    num_infos = sum(finding["severity"] == "info" for finding in result["findings"])
    return f"{len(result['findings']) - num_infos}+{num_infos}"


def _format_sqnr(result: dict[str, Any]) -> str:
    return _format_db(result.get("sqnr_db"))


def _format_floor(result: dict[str, Any]) -> str:
    return _format_db(result.get("tie_floor_db"))


def _format_db(decibels: float | None) -> str:
    return "-" if decibels is None else f"{decibels:.1f}"


def _format_rtx(result: dict[str, Any]) -> str:
    if "rtx_ok" not in result:
        return "-"
    return "yes" if result["rtx_ok"] else "no"


def _count_missing(result: dict[str, Any]) -> str:
    """Number of layers that should run in int8 and do not."""
    return str(len(result["missing_int8"])) if "missing_int8" in result else "-"


if __name__ == "__main__":
    run_command(zoo)
