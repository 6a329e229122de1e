"""Compare the report of `make demo` with the targets of the demo; exit code 1 if a target is missed.

python tools/verify_demo.py runs/demo/report.json [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any, Literal

from qdq.cli.main import run_command
from qdq.files import write_json


@dataclass(frozen=True)
class Target:
    """A figure of the report and its target."""

    what: str
    reached: float
    sign: Literal["==", ">=", "<="]
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether the figure reaches its target."""
        if self.sign == "==":
            return self.reached == self.limit
        if self.sign == ">=":
            return self.reached >= self.limit
        return self.reached <= self.limit


def verify_demo(report: Path, /, *, json: Path | None = None) -> int:
    """Print one line for each target: the figure that was reached, and the target.

    Args:
        report: The report.json of a demo run.
        json: Also write the lines to this file.
    """
    summary = loads(report.read_text())["summary"]
    targets = list_targets(summary)
    lines: list[dict[str, Any]] = []
    for target in targets:
        status = "ok  " if target.is_met else "MISS"
        promised = f"{target.sign} {target.limit}"
        print(f"{status}  {target.what}: {target.reached} (promised {promised})")
        lines.append(
            {
                "what": target.what,
                "reached": target.reached,
                "promised": promised,
                "ok": target.is_met,
            }
        )
    if json:
        write_json(json, lines)
    return 0 if all(target.is_met for target in targets) else 1


def list_targets(summary: dict[str, Any]) -> list[Target]:
    """The targets of the demo, with the figures of a report."""
    all_int8 = summary["candidates"]["all int8"]
    mixed = summary["candidates"]["mixed"]
    parity = summary["parity"]
    num_missing = len(summary["census_missing_int8"])
    return [
        Target("weighted layers swapped", summary["weighted_layers_swapped"], "==", 50),
        Target("all int8: SQNR dB", all_int8["sqnr_db"], ">=", 17.3),
        Target("all int8: agreement", all_int8["agreement"], ">=", 0.975),
        Target("layers left in float", len(summary["float_layers"]), "<=", 4),
        Target("mixed: SQNR dB", mixed["sqnr_db"], ">=", 25.3),
        Target("mixed: agreement", mixed["agreement"], ">=", 0.988),
        Target("ONNX Runtime against torch: agreement", parity["agreement"], ">=", 0.99),
        Target("ONNX Runtime against torch: SQNR dB", parity["sqnr_db"], ">=", 30.0),
        Target("ONNX file MB", summary["onnx_megabytes"], "<=", 5.5),
        Target("layers that should run in int8 and do not", num_missing, "==", 0),
    ]


if __name__ == "__main__":
    run_command(verify_demo)
