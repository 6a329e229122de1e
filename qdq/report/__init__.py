"""What a run did: `report.json`, one page of text, one page of HTML. Reading them again needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdq.files import to_jsonable, write_atomic, write_json
from qdq.report.load import PAGE_FILE, REPORT_FORMAT, load_report
from qdq.report.page import render_report
from qdq.run import REPORT_FILE, STATISTICS_FILES, Run
from qdq.statistics import Statistics
from qdq.text import MOST_CHARACTERS, make_printable, printable

if TYPE_CHECKING:
    from qdq.analyze import Analysis
    from qdq.build import BuildReport
    from qdq.calibrate import Range
    from qdq.check import CheckReport
    from qdq.evaluate import Evaluation
    from qdq.export import ExportReport
    from qdq.fold import FoldedPair
    from qdq.report.records import LayerRecord
    from qdq.rewire import RewirePlan
    from qdq.swap import PlannedModule, SwapPlan
    from qdq.workloads.classification.batches import ImageBatches
    from qdq.workloads.classification.models import LoadedModel

_EXAMPLES = 8  # images that the layers are looked at with


class TuningResult(Protocol):
    """What fine-tuning returned, a dataclass; see `write_report`."""

    @property
    def losses(self) -> Sequence[float]:
        """Loss of each step."""

    @property
    def curve(self) -> Sequence[Any]:
        """Measurements with `step` and `metric`, in order."""

    def format_table(self) -> str:
        """For a person."""


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Args:
        path: The JSON file.
        page: The HTML file.
        summary: The numbers that decide, by name.
        findings: What is not as it should be; empty if all is well.
        text: The page that was printed.
    """

    path: Path
    page: Path
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
    *,
    tuning: TuningResult | None = None,
) -> Report:
    """Write `report.json`, `report.html` and `report.txt` into the run folder, print the latter and close the run.

    Statistics that calibration saved in the folder as `calibration.safetensors` go into the description of the layers.

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
        tuning: From fine-tuning, where there was one.
    """
    from qdq.report.layers import (
        describe_layers,
    )  # with torch, which reading a report does not need

    run.stage("report")
    layers = describe_layers(
        model.module,
        calibration.images[:_EXAMPLES],
        plan=plan,
        rewired=rewired,
        ranges=ranges,
        analysis=analysis,
        build=build,
        statistics=_load_statistics(run.folder / STATISTICS_FILES[0]),
        float_bytes=2 if exported.precision else 4,
    )
    title = f"{model.name}, {model.weights}"
    data = {
        "calibration": calibration.description,
        "evaluation": images.description,
        "labels": images.label_note,
    }
    digest = {} if images.labels is None else {"labels_digest": _digest(images.labels)}
    findings = _find(plan, ranges, check, build)
    summary = _summarize(folded, plan, layers, ranges, analysis, check, build, evaluation)
    sections = {
        "format": REPORT_FORMAT,
        "model": title,
        "data": {**data, **digest},
        "summary": summary,
        "findings": findings,
        "evaluation": evaluation,
        "analysis": analysis,
        "fold": folded,
        "swap": plan,
        "rewire": rewired,
        "tuning": None
        if tuning is None
        else {**to_jsonable(tuning), "text": tuning.format_table()},
        "calibration": ranges,
        "export": exported,
        "check": check,
        "build": build,
        "layers": layers,
        "command": run.command,
        "settings": run.settings,
        "seed": run.seed,
        "environment": run.environment,
        "seconds": run.seconds,
    }
    shown = replace(plan, modules=_without_decided(plan, summary["missed_modules"]))
    text = _format(
        title, data, shown, rewired, analysis, tuning, check, build, evaluation, findings, run
    )
    path = write_json(run.folder / REPORT_FILE, sections)
    page = write_atomic(run.folder / PAGE_FILE, render_report(load_report(path)))
    write_atomic(run.folder / "report.txt", text + "\n")
    run.finish()
    print(f"\n{text}", flush=True)
    return Report(path, page, summary, tuple(findings), text)


def _digest(labels: Sequence[int]) -> str:
    """What tells one set of labelled images from another, wherever it lies, in 16 hexadecimal digits."""
    return hashlib.sha256(",".join(map(str, labels)).encode()).hexdigest()[:16]


def _load_statistics(path: Path) -> Statistics | None:
    return Statistics.load(path) if path.is_file() else None


def _find(plan: SwapPlan, ranges: list[Range], check: CheckReport, build: BuildReport) -> list[str]:
    """What a person must know before shipping."""
    findings = [f"{finding.rule} {finding.node}: {finding.message}" for finding in check.problems]
    findings += [f"{r.name}: {r.note}" for r in ranges if r.note]
    findings += [f"{layer.module}: {layer.reason}" for layer in build.missing_int8]
    return findings


def _summarize(
    folded: list[FoldedPair],
    plan: SwapPlan,
    layers: list[LayerRecord],
    ranges: list[Range],
    analysis: Analysis,
    check: CheckReport,
    build: BuildReport,
    evaluation: Evaluation,
) -> dict[str, Any]:
    weighted = [layer for layer in layers if layer.weights]
    names = {layer.name for layer in layers}
    return {
        "batchnorms_folded": sum(pair.folded for pair in folded),
        "batchnorms": len(folded),
        "weighted_layers": len(weighted),
        "weighted_layers_swapped": sum(bool(layer.tensors) for layer in weighted),
        "missed_modules": [module.name for module in plan.of("missed") if module.name in names],
        "float_layers": analysis.float_layers,
        "layers_without_range": sorted({r.name.rpartition(".")[0] for r in ranges if r.note}),
        "candidates": {candidate.name: candidate for candidate in evaluation.candidates},
        "parity": check.parity,
        "default_parity": check.default_parity,
        "onnx_megabytes": check.file_bytes / 1e6,
        "engine_megabytes": build.engine_bytes / 1e6,
        "int8_macs": build.int8_share,
        "census_expected_int8": build.expected_int8,
        "census_missing_int8": [layer.module for layer in build.missing_int8],
    }


def _without_decided(plan: SwapPlan, missed: list[str]) -> tuple[PlannedModule, ...]:
    """The modules of a plan but those whose products all stand among the functions."""
    return tuple(
        module for module in plan.modules if module.action != "missed" or module.name in missed
    )


def _format(
    title: str,
    data: dict[str, str],
    plan: SwapPlan,
    rewired: RewirePlan,
    analysis: Analysis,
    tuning: TuningResult | None,
    check: CheckReport,
    build: BuildReport,
    evaluation: Evaluation,
    findings: list[str],
    run: Run,
) -> str:
    plan, rewired, analysis, tuning, check, build, evaluation = make_printable(
        (plan, rewired, analysis, tuning, check, build, evaluation)
    )
    blocks = [
        ("Model", title),
        (
            "Data",
            "\n".join(f"{use}: {printable(what, MOST_CHARACTERS)}" for use, what in data.items()),
        ),
        ("Layers", plan.format_table()),
        ("Functions", rewired.format_table()),
        ("Sensitivity", analysis.format_table()),
        *([] if tuning is None else [("Fine-tuning", tuning.format_table())]),
        ("Exported file", check.format_table()),
        ("Engine", build.format_table()),
        ("Result", evaluation.format_table()),
        (
            "On the target",
            "\n".join(f"# {version}\n{line}" for version, line in build.trtexec.items()),
        ),
        (
            "Findings",
            "\n".join(printable(finding, MOST_CHARACTERS) for finding in findings) or "none",
        ),
        (
            "Files",
            f"{run.folder} ({sum(run.seconds.values()):.0f} s); open {PAGE_FILE} in a browser",
        ),
    ]
    text = "\n\n".join(f"{title}\n{_indent(body)}" for title, body in blocks)
    return "\n".join(printable(line, MOST_CHARACTERS) for line in text.split("\n"))


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
