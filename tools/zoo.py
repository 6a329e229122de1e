"""The zoo sweep: torchvision's families and timm's architectures, each from float module to TensorRT-RTX engine.

python tools/zoo.py [--models 'torchvision/*' levit_128s] [--precision fp32 fp16] [--json FILE] [--resume] [--timeout S]

Every model runs in a process of its own: a crash, a kill for memory or a hang costs one row. Weights are random (seed
0), images are noise. A model that plain `torch.onnx.export` cannot export is shown and not counted.
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
from pathlib import Path
from typing import Any

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.run import describe_environment

ROW_FILE = "row.json"
# Failures that are no fault of qdq, by name, with the reason that the table prints. Everything else must pass.
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
    """Sweep the zoo and print one line a model; exit code 1 if one that can be exported in float does not pass.

    Args:
        models: Names or patterns such as 'timm/*' or 'res*'; all if not given.
        precision: What the float rest is exported in: fp32, fp16.
        json: Also write the rows there, after each model.
        resume: Keep the rows of FILE and run what is not there or did not pass.
        timeout: Seconds for one model.
        keep: Keep the ONNX files and logs here, a folder a model.
    """
    from zoo_models import select_models  # imports torch, which --help shall not wait for

    names = select_models(models)
    if not names:
        raise qdq.ArgumentError(
            f"no model matches {' '.join(models)}.", "look at the list in tools/zoo_models.py."
        )
    rows = _read_rows(json) if resume and json else {}
    for number, name in enumerate(names, 1):
        if (
            name in rows
            and not verdict(rows[name]).startswith("FAIL")
            and _has_all(rows[name], precision)
        ):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = keep / name.replace("/", "_") if keep else Path(scratch)
            rows[name] = _run_one(name, folder, precision, timeout)
        print(f"[{number}/{len(names)}] {format_row(rows[name])}", flush=True)
        if json:
            write_json(json, {"rows": list(rows.values()), "environment": describe_environment()})
    chosen = [rows[name] for name in names]
    print(format_table(chosen))
    return 1 if any(verdict(row).startswith("FAIL") for row in chosen) else 0


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {row["name"]: row for row in json_module.loads(path.read_text())["rows"]}


def _has_all(row: dict[str, Any], precisions: tuple[str, ...]) -> bool:
    found = row.get("precisions", {})
    return not is_countable(row) or all(p in found for p in precisions)


def _run_one(name: str, folder: Path, precision: tuple[str, ...], timeout: int) -> dict[str, Any]:
    """The row of one model, from its own process; complete even if that process ended before its time."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROW_FILE).unlink(missing_ok=True)
    ended, peak_mb = _start(
        folder, timeout, [name, "--folder", str(folder), "--precision", *precision]
    )
    row: dict[str, Any] = {"name": name, "stage": "start", "error": None, "precisions": {}}
    if (folder / ROW_FILE).is_file():
        row = json_module.loads((folder / ROW_FILE).read_text())
    if ended and not row["error"]:
        row["error"] = ended
    for result in row["precisions"].values():
        if result.get("rtx_ok") is False:  # does TensorRT take the float file?
            if "float_rtx_error" not in row:
                found, _ = _start(folder, timeout, [name, "--folder", str(folder), "--build-float"])
                row["float_rtx_error"] = found
            result["rtx_float_refused"] = bool(row["float_rtx_error"])
    row["peak_mb"] = peak_mb
    row["total_seconds"] = round(time.perf_counter() - began, 1)
    return row


def _start(folder: Path, timeout: int, arguments: list[str]) -> tuple[str, int]:
    """Run `zoo_one.py` in a session of its own; how it ended ("" if well), and its peak memory in MB."""
    log = folder / ("float_build.log" if "--build-float" in arguments else "log")
    command = [sys.executable, str(Path(__file__).with_name("zoo_one.py")), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _die_first(process.pid)
            deadline = time.monotonic() + timeout
            while True:
                found, status, usage = os.wait4(process.pid, os.WNOHANG)
                if found:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if time.monotonic() > deadline:
                    return f"timeout after {timeout} s", 0
                time.sleep(0.2)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    peak_mb = usage.ru_maxrss // 1024
    if process.returncode == 0:
        return "", peak_mb
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name} (peak {peak_mb} MB)", peak_mb
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [f"exit code {process.returncode}"])[-1][:500], peak_mb


def _die_first(pid: int) -> None:
    """Let the kernel choose the model's process when memory runs out, not this one."""
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    except OSError:
        return


def is_countable(row: dict[str, Any]) -> bool:
    """Whether plain float export can export the model; it is asked where anything failed."""
    return bool(row.get("float_export", True))


def verdict(row: dict[str, Any]) -> str:
    """`pass`, `explained`, `not exportable` or `FAIL: why`."""
    if not is_countable(row):
        return "not exportable"
    faults = find_faults(row)
    if not faults:
        return "pass"
    return "explained" if row["name"] in EXPLAINED else f"FAIL: {'; '.join(faults)}"


def find_faults(row: dict[str, Any]) -> list[str]:
    """What keeps a row from passing."""
    faults = [f"{row['stage']}: {row['error']}"] if row["error"] else []
    for precision, result in row["precisions"].items():
        if findings := [f for f in result.get("findings", ()) if f["severity"] != "info"]:
            rules = Counter(f["rule"] for f in findings)
            faults.append(
                f"{precision} findings {dict(rules)}: {findings[0]['node']} {findings[0]['message']}"
            )
        if result.get("ort_error"):
            faults.append(f"{precision} ONNX Runtime: {result['ort_error']}")
        if result.get("parity_ok") is False and not _is_exporters(row, result):
            faults.append(
                f"{precision} SQNR {result['sqnr_db']} dB, {result['required_db']:.1f} required"
            )
        if result.get("rtx_ok") is False and not result.get("rtx_float_refused"):
            faults.append(f"{precision} RTX: {result['rtx_error']}")
    required = min(
        60.0, row.get("float_floor_db", 999.0) - 20
    )  # some random networks amplify rounding that much
    if row.get("fold_sqnr_db", 999) < required:
        faults.append(f"folding changes the outputs: SQNR {row['fold_sqnr_db']} dB")
    if row.get("restored_sqnr_db", 999) < required:
        faults.append(f"restored modules give other outputs: SQNR {row['restored_sqnr_db']} dB")
    return faults


def _is_exporters(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the plain float file, in ONNX Runtime, is as far from torch as the quantized one."""
    return bool(row.get("float_sqnr_db", 999) < result["sqnr_db"] + 3)


def describe_notes(row: dict[str, Any]) -> list[str]:
    """What a reader should know of a row that is no fault."""
    notes = [EXPLAINED[row["name"]]] if row["name"] in EXPLAINED else []
    if not is_countable(row):
        notes.append(f"plain float export: {row['fixed_export_error'][:160]}")
    if row.get("float_export") == "fixed":
        notes.append("fixed batch, as in float")
    if row.get("batchnorm_warmed"):
        notes.append(
            "BatchNorm statistics from data"
            + (", still degenerate" if row.get("degenerate") else "")
        )
    if row.get("float_ort_error"):
        notes.append(f"float file in ONNX Runtime: {row['float_ort_error'][:120]}")
    elif row.get("float_sqnr_db", 999) < 60:
        notes.append(
            f"plain float file against torch {row['float_sqnr_db']} dB: torch's exporter or ONNX Runtime"
        )
    if products := row.get("float"):
        rules = Counter(_shorten_reason(reason) for reason in products.values())
        notes.append(
            "float by rule: " + ", ".join(f"{count} {rule}" for rule, count in rules.most_common())
        )
    if (left := len(row.get("left_float", ()))) > 0:
        notes.append(f"{left} quantizers left float by calibration")
    for precision, result in row["precisions"].items():
        notes += _describe_precision(row, precision, result)
    return notes


def _describe_precision(row: dict[str, Any], precision: str, result: dict[str, Any]) -> list[str]:
    notes = []
    if result.get("parity_ok") and result["sqnr_db"] < 30:
        notes.append(
            f"{precision} SQNR below 30 is rounding ties: their floor is {result['tie_floor_db']:.1f} dB"
        )
    unpredicted = result.get("unpredicted", {})
    counts = [f"{len(nodes)} {kind}" for kind, nodes in unpredicted.items() if nodes]
    if counts:
        notes.append(f"{precision} int8 against the prediction: {', '.join(counts)}")
    if result.get("rtx_float_refused"):
        notes.append(f"TensorRT-RTX refuses the float file too: {row['float_rtx_error'][:160]}")
    return notes


def _shorten_reason(reason: str) -> str:
    """The id of the rule that a reason names, or its beginning."""
    found = re.search(r"\((R-[^)]+)\)", reason)
    return found[1] if found else reason[:40]


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


def _cells(row: dict[str, Any]) -> list[str]:
    results = list(row["precisions"].values())

    def each(key: str, form: str = "{}") -> str:
        return (
            "|".join(
                form.format(result[key]) if result.get(key) is not None else "-"
                for result in results
            )
            or "-"
        )

    lost = "|".join(
        str(len(result["missing_int8"])) if "missing_int8" in result else "-" for result in results
    )
    return [
        row["name"],
        "|".join(f"{r.get('int8', '-')}/{r.get('weighted', '-')}" for r in results[:1]) or "-",
        "|".join(f"{r['mac_share']:.0%}" for r in results[:1] if r.get("mac_share") is not None)
        or "-",
        "|".join(f"{r.get('q', '-')}/{r.get('dq', '-')}" for r in results) or "-",
        "|".join(_count_findings(r) for r in results) or "-",
        each("sqnr_db", "{:.1f}"),
        each("tie_floor_db", "{:.1f}"),
        "|".join({True: "yes", False: "no"}.get(r.get("rtx_ok"), "-") for r in results) or "-",
        lost or "-",
        f"{row.get('total_seconds', 0):.0f}",
    ]


def _count_findings(result: dict[str, Any]) -> str:
    """Errors and warnings, and infos behind a plus sign."""
    if "findings" not in result:
        return "-"
    infos = sum(finding["severity"] == "info" for finding in result["findings"])
    return f"{len(result['findings']) - infos}+{infos}"


def format_row(row: dict[str, Any]) -> str:
    """One row by itself."""
    return "  ".join([*_cells(row), verdict(row), *describe_notes(row)])


def format_table(rows: list[dict[str, Any]]) -> str:
    """All rows in columns, and the sum in the last line."""
    table = [[*_cells(row), verdict(row), "; ".join(describe_notes(row))] for row in rows]
    lines = [list(_COLUMNS), *table]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS) - 2)]
    text = [
        "  ".join(
            [
                *(cell.ljust(width) for cell, width in zip(line[:-2], widths, strict=True)),
                *line[-2:],
            ]
        ).rstrip()
        for line in lines
    ]
    counts = Counter(verdict(row).partition(":")[0] for row in rows)
    countable = len(rows) - counts["not exportable"]
    text.append(
        f"passed {counts['pass']} of {countable} that plain float export can export"
        f" ({counts['explained']} explained, {counts['FAIL']} failed; {counts['not exportable']} cannot be exported)"
    )
    return "\n".join(text)


if __name__ == "__main__":
    run_command(zoo)
