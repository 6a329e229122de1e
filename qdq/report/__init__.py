"""What a run did, as one JSON file and one page of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq.analyze import Analysis
from qdq.build import BuildReport
from qdq.calibrate import Range
from qdq.check import CheckReport
from qdq.evaluate import Evaluation
from qdq.export import ExportReport
from qdq.fold import FoldedPair
from qdq.rewire import RewirePlan
from qdq.run import REPORT_FILE, Run, to_jsonable, write_atomic, write_json
from qdq.swap import SwapPlan

if TYPE_CHECKING:
    from qdq.data import ImageBatches
    from qdq.models import LoadedModel


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Args:
        path: The JSON file.
        summary: The numbers that decide, by name.
        findings: What is not as it should be; empty if all is well.
        text: The page that was printed.
    """

    path: Path
    summary: dict[str, Any]
    findings: tuple[str, ...]
    text: str

    @property
    def exit_code(self) -> int:
        """0 if there is nothing to say, else 1."""
        return 1 if self.findings else 0


def write_report(
    run: Run,
    model: LoadedModel,
    calibration: ImageBatches,
    images: ImageBatches,
    folded: list[FoldedPair],
    plan: SwapPlan,
    rewired: RewirePlan,
    ranges: list[Range],
    analysis: Analysis,
    exported: ExportReport,
    check: CheckReport,
    build: BuildReport,
    evaluation: Evaluation,
) -> Report:
    """Write `report.json` and `report.txt` into the run folder, print the page and close the run.

    Args:
        run: The open run.
        model: From `load_model`.
        calibration: What was calibrated on.
        images: What was evaluated on.
        folded: From `fold_batchnorm`.
        plan: From `swap_modules`.
        rewired: From `rewire_operations`.
        ranges: From `calibrate_model`.
        analysis: From `analyze_layers`.
        exported: From `export_onnx`.
        check: From `check_onnx`.
        build: From `build_engine`.
        evaluation: From `evaluate_outputs`.
    """
    run.stage("report")
    title = f"{model.name}, {model.weights}"
    data = {"calibration": calibration.description, "evaluation": images.description, "labels": images.label_note}
    findings = _find(plan, ranges, check, build)
    summary = _summarize(folded, plan, ranges, analysis, check, build, evaluation)
    sections = {
        "model": title,
        "data": data,
        "summary": summary,
        "findings": findings,
        "evaluation": evaluation,
        "analysis": analysis,
        "fold": folded,
        "swap": plan,
        "rewire": rewired,
        "calibration": ranges,
        "export": exported,
        "check": check,
        "build": build,
        "settings": run.settings,
        "seed": run.seed,
        "environment": run.environment,
        "seconds": run.seconds,
    }
    text = _format(title, data, plan, rewired, analysis, check, build, evaluation, findings, run)
    path = write_json(run.folder / REPORT_FILE, to_jsonable(sections))
    write_atomic(run.folder / "report.txt", text + "\n")
    run.finish()
    print(f"\n{text}", flush=True)
    return Report(path, summary, tuple(findings), text)


def _find(plan: SwapPlan, ranges: list[Range], check: CheckReport, build: BuildReport) -> list[str]:
    """What a person must know before shipping."""
    findings = [f"{finding.rule} {finding.node}: {finding.message}" for finding in check.problems]
    findings += [f"{r.name}: {r.note}" for r in ranges if r.note]
    findings += [f"{layer.module}: {layer.reason}" for layer in build.missing_int8]
    return findings


def _summarize(
    folded: list[FoldedPair],
    plan: SwapPlan,
    ranges: list[Range],
    analysis: Analysis,
    check: CheckReport,
    build: BuildReport,
    evaluation: Evaluation,
) -> dict[str, Any]:
    weighted = [module for module in plan.modules if module.weights and (module.mapped or module.action == "missed")]
    return {
        "batchnorms_folded": sum(pair.folded for pair in folded),
        "batchnorms": len(folded),
        "weighted_layers": len(weighted),
        "weighted_layers_swapped": len(plan.weighted),
        "missed_modules": [module.name for module in plan.of("missed")],
        "float_layers": analysis.float_layers,
        "layers_without_range": sorted({r.name.rpartition(".")[0] for r in ranges if r.note}),
        "candidates": {candidate.name: candidate for candidate in evaluation.candidates},
        "parity": check.parity,
        "onnx_megabytes": check.file_bytes / 1e6,
        "engine_megabytes": build.engine_bytes / 1e6,
        "int8_macs": build.int8_share,
        "census_expected_int8": build.expected_int8,
        "census_missing_int8": [layer.module for layer in build.missing_int8],
    }


def _format(
    title: str,
    data: dict[str, str],
    plan: SwapPlan,
    rewired: RewirePlan,
    analysis: Analysis,
    check: CheckReport,
    build: BuildReport,
    evaluation: Evaluation,
    findings: list[str],
    run: Run,
) -> str:
    blocks = [
        ("Model", title),
        ("Data", "\n".join(f"{use}: {what}" for use, what in data.items())),
        ("Layers", plan.format_table()),
        ("Functions", rewired.format_table()),
        ("Sensitivity", analysis.format_table()),
        ("Exported file", check.format_table()),
        ("Engine", build.format_table()),
        ("Result", evaluation.format_table()),
        ("On the target", "\n".join(f"# {version}\n{line}" for version, line in build.trtexec.items())),
        ("Findings", "\n".join(findings) or "none"),
        ("Files", f"{run.folder} ({sum(run.seconds.values()):.0f} s)"),
    ]
    return "\n\n".join(f"{title}\n{_indent(body)}" for title, body in blocks)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
