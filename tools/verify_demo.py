"""Compare the report of `make demo` with what the demo promises; exit code 1 if a figure is missed.

python tools/verify_demo.py runs/demo/report.json [--json FILE]
"""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import Any

from qdq.cli.main import run_command
from qdq.files import write_json


def verify_demo(report: Path, /, *, json: Path | None = None) -> int:
    """Print one line for each promised figure: what was promised, what was reached.

    Args:
        report: The report.json of a demo run.
        json: Also write the lines there.
    """
    summary = loads(report.read_text())["summary"]
    lines = list(_compare(summary))
    for line in lines:
        print(
            f"{'ok  ' if line['ok'] else 'MISS'}  {line['what']}: {line['reached']} (promised {line['promised']})"
        )
    if json:
        write_json(json, lines)
    return 0 if all(line["ok"] for line in lines) else 1


def _compare(summary: dict[str, Any]) -> list[dict[str, Any]]:
    all_int8 = summary["candidates"]["all int8"]
    mixed = summary["candidates"]["mixed"]
    rows = [
        ("weighted layers swapped", summary["weighted_layers_swapped"], "==", 50),
        ("all int8: SQNR dB", all_int8["sqnr_db"], ">=", 17.3),
        ("all int8: agreement", all_int8["agreement"], ">=", 0.975),
        ("layers left in float", len(summary["float_layers"]), "<=", 4),
        ("after the analysis: SQNR dB", mixed["sqnr_db"], ">=", 21.5),
        ("ONNX Runtime against torch: agreement", summary["parity"]["agreement"], ">=", 0.99),
        ("ONNX Runtime against torch: SQNR dB", summary["parity"]["sqnr_db"], ">=", 30.0),
        ("ONNX file MB", summary["onnx_megabytes"], "<=", 5.5),
        ("layers that should run in int8 and do not", len(summary["census_missing_int8"]), "==", 0),
    ]
    holds = {"==": lambda a, b: a == b, ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    return [
        {
            "what": what,
            "reached": reached,
            "promised": f"{sign} {limit}",
            "ok": bool(holds[sign](reached, limit)),
        }
        for what, reached, sign, limit in rows
    ]


if __name__ == "__main__":
    run_command(verify_demo)
