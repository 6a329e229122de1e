"""The report of a run: `report.json`, one page of text and one page of HTML. Reading them needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdq.files import to_jsonable, write_atomic, write_json
from qdq.pairs import digest_file
from qdq.report.load import REPORT_FORMAT, load_report
from qdq.report.page import render_report
from qdq.roofline import find_target_sm
from qdq.run import PAGE_FILE, Run
from qdq.statistics import Statistics
from qdq.text import MOST_CHARACTERS, make_printable, printable

if TYPE_CHECKING:
    from torch import nn

    from qdq.accuracy.centering import Centering
    from qdq.accuracy.splitting import Splitting
    from qdq.analyze import Analysis
    from qdq.build import BuildReport
    from qdq.calibrate import Range
    from qdq.check import CheckReport
    from qdq.evaluate import Evaluation
    from qdq.export import ExportReport
    from qdq.fold import FoldedPair
    from qdq.judge import JudgedSteps
    from qdq.mixed import FormatChoice
    from qdq.report.records import LayerRecord
    from qdq.rewire import RewirePlan
    from qdq.swap import SwapPlan

_EXAMPLES = 8  # samples on which the layers are measured


class ReportedSamples(Protocol):
    """Batches to calibrate or to evaluate on, as `load_workload` loads them."""

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def labels(self) -> Sequence[int] | None:
        """Class index of each sample; None if there are none."""

    @property
    def description(self) -> str:
        """Source, number and seed."""

    @property
    def label_note(self) -> str:
        """Source of the labels, or why there are none."""


class ReportedWorkload(Protocol):
    """A model and its data, as returned by `load_workload`."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def weights(self) -> str:
        """Source of the weights."""

    @property
    def module(self) -> nn.Module:
        """The exported model."""

    @property
    def calibration(self) -> ReportedSamples:
        """Samples of the calibration."""

    @property
    def evaluation(self) -> ReportedSamples:
        """Samples of the evaluation."""


class TuningResult(Protocol):
    """The result of fine-tuning, a dataclass; see `write_report`."""

    @property
    def losses(self) -> Sequence[float]:
        """Loss of each step."""

    @property
    def curve(self) -> Sequence[Any]:
        """Measurements with `step` and `metric`, in order."""

    def format_table(self) -> str:
        """The result as text."""


@dataclass(frozen=True)
class Report:
    """The files and the result of `write_report`.

    Args:
        path: The JSON file.
        page: The HTML file.
        summary: The key figures, by name.
        findings: Facts that you must know before shipping; empty if all is well.
        text: The printed report.
    """

    path: Path
    page: Path
    summary: dict[str, Any]
    findings: tuple[str, ...]
    text: str

    @property
    def exit_code(self) -> int:
        """0 without findings, else 1."""
        return 1 if self.findings else 0


@dataclass(frozen=True)
class _StageResults:
    """The results of the stages, as `write_report` gets them."""

    folded: list[FoldedPair]
    plan: SwapPlan
    rewired: RewirePlan
    ranges: list[Range]
    analysis: Analysis
    exported: ExportReport
    check: CheckReport
    build: BuildReport
    evaluation: Evaluation
    tuning: TuningResult | None
    centering: Centering | None
    splitting: Splitting | None
    steps: JudgedSteps | None
    formats: FormatChoice | None


def write_report(
    run: Run,
    workload: ReportedWorkload,
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
    centering: Centering | None = None,
    splitting: Splitting | None = None,
    steps: JudgedSteps | None = None,
    formats: FormatChoice | None = None,
) -> Report:
    """Write `report.json`, `report.html` and `report.txt` into the run folder, print the text and close the run.

    The description of the layers uses the statistics that calibration saved in the folder as `Run.statistics_file`.

    Args:
        run: The open run.
        workload: From `load_workload`: the model and its data.
        folded: From `fold_batchnorm`.
        plan: From `swap_modules`.
        rewired: From `rewire_operations`.
        ranges: From `calibrate_model`.
        analysis: From `analyze_layers`.
        exported: From `export_onnx`.
        check: From `check_onnx`.
        build: From `build_engine`.
        evaluation: From `evaluate_outputs`.
        tuning: From fine-tuning, if there was any.
        centering: From `center_inputs`, if it was called.
        splitting: From `split_channels`, if channels were split.
        steps: From `recover_accuracy`: what every step was worth.
        formats: From `choose_formats`, if formats were chosen.
    """
    run.stage("report")
    results = _StageResults(
        folded=folded,
        plan=plan,
        rewired=rewired,
        ranges=ranges,
        analysis=analysis,
        exported=exported,
        check=check,
        build=build,
        evaluation=evaluation,
        tuning=tuning,
        centering=centering,
        splitting=splitting,
        steps=steps,
        formats=formats,
    )
    layers = _describe_layers(run, workload, results)
    sections = _collect_sections(run, workload, results, layers)
    text = _format_report(run, sections, results)

    path = write_json(run.report_file, sections)
    page = write_atomic(run.page_file, render_report(load_report(path)))
    write_atomic(run.text_file, text + "\n")
    run.finish()
    print(f"\n{text}", flush=True)
    return Report(path, page, sections["summary"], tuple(sections["findings"]), text)


def _describe_layers(
    run: Run, workload: ReportedWorkload, results: _StageResults
) -> list[LayerRecord]:
    """Describe the layers on the first calibration samples."""
    # These need torch, which reading a report does not.
    from qdq.batch import take_samples
    from qdq.report.layers import describe_layers

    statistics = None
    if run.statistics_file.is_file():
        statistics = Statistics.load(run.statistics_file)

    return describe_layers(
        workload.module,
        take_samples(next(iter(workload.calibration)), _EXAMPLES),
        plan=results.plan,
        rewired=results.rewired,
        ranges=results.ranges,
        analysis=results.analysis,
        build=results.build,
        statistics=statistics,
        float_bytes=2 if results.exported.precision else 4,
    )


# report.json


def _add_text(result: Centering | Splitting | TuningResult | None) -> dict[str, Any] | None:
    """A result with its table as `text`; None if there is none."""
    if result is None:
        return None
    return {**to_jsonable(result), "text": result.format_table()}


def _collect_sections(
    run: Run,
    workload: ReportedWorkload,
    results: _StageResults,
    layers: list[LayerRecord],
) -> dict[str, Any]:
    """The content of `report.json`."""
    target = None
    if run.target:
        target = {"name": run.target, "sm": find_target_sm(run.target)}
    return {
        "format": REPORT_FORMAT,
        "target": target,
        "model": f"{workload.name}, {workload.weights}",
        "model_sha256": digest_file(results.check.path),
        "data": _describe_data(workload.calibration, workload.evaluation),
        "summary": _summarize(results, layers),
        "findings": _list_findings(results),
        "evaluation": results.evaluation,
        "formats": results.formats,
        "analysis": results.analysis,
        "steps": results.steps,
        "fold": results.folded,
        "centering": _add_text(results.centering),
        "splitting": _add_text(results.splitting),
        "swap": results.plan,
        "rewire": results.rewired,
        "tuning": _add_text(results.tuning),
        "calibration": results.ranges,
        "export": results.exported,
        "check": results.check,
        "build": results.build,
        "layers": layers,
        "command": run.command,
        "settings": run.settings,
        "seed": run.seed,
        "environment": run.environment,
        "seconds": run.seconds,
    }


def _describe_data(calibration: ReportedSamples, evaluation: ReportedSamples) -> dict[str, str]:
    """Source, number and labels of the samples."""
    data = {
        "calibration": calibration.description,
        "evaluation": evaluation.description,
        "labels": evaluation.label_note,
    }
    if evaluation.labels is not None:
        data["labels_digest"] = _digest(evaluation.labels)
    return data


def _digest(labels: Sequence[int]) -> str:
    """A hash of a set of labelled samples, 16 hexadecimal digits, independent of where the samples are."""
    text = ",".join(str(label) for label in labels)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _summarize(results: _StageResults, layers: list[LayerRecord]) -> dict[str, Any]:
    """Collect the key figures; docs/report.md explains them."""
    check, build = results.check, results.build
    weighted_layers = [layer for layer in layers if layer.weights]
    listed_names = {layer.name for layer in layers}
    missed = [module.name for module in results.plan.of("missed") if module.name in listed_names]
    without_range = {range.name.rpartition(".")[0] for range in results.ranges if range.note}
    return {
        "batchnorms_folded": sum(pair.folded for pair in results.folded),
        "batchnorms": len(results.folded),
        "weighted_layers": len(weighted_layers),
        "weighted_layers_swapped": sum(bool(layer.tensors) for layer in weighted_layers),
        "missed_modules": missed,
        "float_layers": results.analysis.float_layers,
        "layers_without_range": sorted(without_range),
        "candidates": {candidate.name: candidate for candidate in results.evaluation.candidates},
        "parity": check.parity,
        "default_parity": check.default_parity,
        "onnx_megabytes": check.file_bytes / 1e6,
        "engine_megabytes": build.engine_bytes / 1e6,
        "int8_macs": build.int8_share,
        "census_expected_int8": build.expected_int8,
        "census_missing_int8": [layer.module for layer in build.missing_int8],
        "census": build.count_types(),
    }


def _list_findings(results: _StageResults) -> list[str]:
    """List the facts that a user must know before shipping."""
    findings = []
    for problem in results.check.problems:
        findings.append(f"{problem.rule} {problem.node}: {problem.message}")

    for range in results.ranges:
        if range.note:
            findings.append(f"{range.name}: {range.note}")

    for layer in results.build.missing:
        findings.append(f"{layer.module}: {layer.reason}")

    return findings


# report.txt


def _format_report(run: Run, sections: Mapping[str, Any], results: _StageResults) -> str:
    """One block for each stage: a title, and below it its table."""
    missed = sections["summary"]["missed_modules"]
    shown_plan = _hide_missed(results.plan, missed)
    printable_results = make_printable(replace(results, plan=shown_plan))
    data = sections["data"]
    titles_of_data = ("calibration", "evaluation", "labels")
    seconds = sum(run.seconds.values())

    blocks = {
        "Model": sections["model"],
        "Data": _join_lines(f"{title}: {data[title]}" for title in titles_of_data),
    }
    if printable_results.centering is not None:
        blocks["Centered inputs"] = printable_results.centering.format_table()
    if printable_results.splitting is not None:
        blocks["Split channels"] = printable_results.splitting.format_table()
    blocks |= {
        "Layers": printable_results.plan.format_table(),
        "Functions": printable_results.rewired.format_table(),
    }
    if printable_results.formats is not None:
        blocks["Formats"] = printable_results.formats.format_table()
    blocks["Sensitivity"] = printable_results.analysis.format_table()
    if printable_results.steps is not None:
        blocks["Steps"] = printable_results.steps.format_table()
    if printable_results.tuning is not None:
        blocks["Fine-tuning"] = printable_results.tuning.format_table()
    blocks |= {
        "Exported file": printable_results.check.format_table(),
        "Engine": printable_results.build.format_table(),
        "Result": printable_results.evaluation.format_table(),
        "On the target": _format_commands(results.build.trtexec),
        "Findings": _join_lines(sections["findings"]) or "none",
        "Files": f"{run.folder} ({seconds:.0f} s); open {PAGE_FILE} in a browser",
    }
    text = "\n\n".join(_format_block(title, body) for title, body in blocks.items())
    return _join_lines(text.split("\n"))


def _hide_missed(plan: SwapPlan, missed: Sequence[str]) -> SwapPlan:
    """A plan that does not list the missed modules whose calls are listed; their MACs still count.

    Args:
        plan: The plan.
        missed: Names of the others.
    """
    modules = []
    for module in plan.modules:
        is_hidden = module.action == "missed" and module.name not in missed
        modules.append(replace(module, action="calls") if is_hidden else module)

    return replace(plan, modules=tuple(modules))


def _format_commands(commands: Mapping[str, str]) -> str:
    """Two lines for each version of TensorRT, because a command is too long for a table."""
    lines = []
    for version, command in commands.items():
        lines += [f"# {version}", command]
    return _join_lines(lines)


def _format_block(title: str, body: str) -> str:
    """A title, and below it the indented body."""
    lines = [title]
    for line in body.splitlines():
        lines.append(f"  {line}")

    return "\n".join(lines)


def _join_lines(lines: Iterable[str]) -> str:
    """Join lines. A line break in a foreign text does not begin a new line."""
    return "\n".join(printable(line, MOST_CHARACTERS) for line in lines)
