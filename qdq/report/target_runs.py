"""The result of a run for several targets: one table, and the page that compares them. Reading it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq.files import to_jsonable, write_atomic, write_json
from qdq.report.compare import TOLERANCE, Comparison, compare_runs
from qdq.report.load import StoredReport, guarded, load_report
from qdq.report.page import final_candidate, layers_in, link_file, read_census, render
from qdq.report.wording import format_number, format_percent
from qdq.run import PAGE_FILE, Run, list_targets
from qdq.text import MOST_CHARACTERS, printable

if TYPE_CHECKING:
    from qdq.report import Report

TARGETS_FORMAT = "qdq targets 1"
"""Marks the `report.json` of a run for several targets."""

_PRECISIONS = ("int8", "FP8", "float")  # those of a `LayerRecord`
_NO_TIME = "not predicted"


@dataclass(frozen=True)
class TargetSummary:
    """What a run came to for one of its targets.

    Args:
        target: Its name, which is that of its folder.
        sm: Its compute capability, 89 for 8.9.
        layers: "int8", "FP8" and "float" -> number of layers with weights.
        sqnr_db: SQNR of the outputs of the ONNX file, in dB; None if it is infinite.
        agreement: Fraction of the samples with the same answer as float; None if the outputs are no classes.
        top1: Top-1 accuracy, 0 to 1; None without labels.
        scores: Metrics of the task by name; None if one is undefined.
        low_macs: Fraction of the MACs that the engine computes in 8 bit, 0 to 1; None if no size is known.
        engine_megabytes: Size of the engine.
        engine_sm: The compute capability that it was built for; None for the GPU of the machine.
        engine_note: Why it was not built for the target; "" if it was.
        missing: Number of layers that were quantized and run in another type.
        predicted_ms: Predicted time of the file in milliseconds; None if the rates of the GPU are not known.
        predicted_ratio: How many times as fast as fp16 that is; None likewise.
        num_findings: What you must know before shipping.
    """

    target: str
    sm: int
    layers: Mapping[str, int]
    sqnr_db: float | None
    agreement: float | None
    top1: float | None
    scores: Mapping[str, float | None]
    low_macs: float | None
    engine_megabytes: float
    engine_sm: int | None
    engine_note: str
    missing: int
    predicted_ms: float | None
    predicted_ratio: float | None
    num_findings: int

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Title and text of each column. Metrics have the names that the user gave, also that of another column."""
        predicted = _NO_TIME
        if self.predicted_ms is not None:
            predicted = f"{self.predicted_ms:.3f} ms, {self.predicted_ratio:.2f}x fp16"
        engine = f"{self.engine_megabytes:.1f} MB"
        if self.engine_note:
            engine += " *"
        if self.missing:
            engine += f", {self.missing} not in 8 bit"
        cells = [("target", printable(self.target)), ("SM", str(self.sm))]
        cells += [(title, str(count)) for title, count in self.layers.items()]
        cells.append(("SQNR dB", format_number(self.sqnr_db, ".2f", "no error")))
        for title, fraction in (("agreement", self.agreement), ("top-1", self.top1)):
            if fraction is not None:
                cells.append((title, format_percent(fraction)))
        for name, score in self.scores.items():
            cells.append((printable(name), format_number(score, ".4f")))
        cells.append(("8-bit MACs", format_percent(self.low_macs)))
        cells += [
            ("engine", engine),
            ("predicted", predicted),
            ("findings", str(self.num_findings)),
        ]
        return cells


@dataclass(frozen=True)
class TargetRuns:
    """What a run came to for several targets.

    Args:
        folder: The run folder.
        targets: One for each, in the order of --target.
        comparison: The same runs side by side, layer by layer.
    """

    folder: Path
    targets: tuple[TargetSummary, ...]
    comparison: Comparison

    def format_table(self) -> str:
        """A line for each target, then why an engine is not the one of its target."""
        rows = [[title for title, _ in self.targets[0].cells]]
        rows += [[text for _, text in target.cells] for target in self.targets]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [f"{row[0]:{widths[0]}}"]
            cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        return "\n".join([*lines, *self.list_notes()])

    def list_notes(self) -> list[str]:
        """What the table does not say: why an engine is not the one of its target."""
        notes = []
        for target in self.targets:
            if target.engine_note:
                notes.append(f"* {printable(target.target)}: {printable(target.engine_note, 1000)}")
        return notes

    def render(self, page: Path) -> str:
        """The page: the table with links to the pages of the targets, and the comparison of the targets.

        Args:
            page: The file that it will be, for the links.
        """
        links = {}
        for target in self.targets:
            target_page = self.folder / target.target / PAGE_FILE
            if target_page.is_file():
                links[target.target] = link_file(target_page, page)
        return render(
            "compare.html",
            title=f"{len(self.targets)} targets side by side",
            comparison=self.comparison,
            tolerance=TOLERANCE,
            targets=self,
            links=links,
        )

    def list_facts(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {"format": TARGETS_FORMAT, "targets": to_jsonable(self.targets)}


@dataclass(frozen=True)
class TargetsReport:
    """The files and the result of `write_targets`.

    Args:
        path: The JSON file.
        page: The HTML file.
        text: The printed table.
        findings: Facts that you must know before shipping, each with its target in front.
    """

    path: Path
    page: Path
    text: str
    findings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 without findings, else 1."""
        return 1 if self.findings else 0


def write_targets(run: Run, reports: Sequence[Report]) -> TargetsReport:
    """Write the table of the targets into the run folder as JSON, text and page, print it and close the run.

    Args:
        run: The open run.
        reports: What `write_report` returned for each of its targets, in their order.
    """
    run.stage("targets")
    runs = load_target_runs(run.folder)
    findings = []
    for target, report in zip(run.targets, reports, strict=True):
        findings += [f"{target}: {finding}" for finding in report.findings]
    lines = ["Targets", *(f"  {line}" for line in runs.format_table().splitlines())]
    lines += ["", "Findings"]
    lines += [f"  {printable(finding, MOST_CHARACTERS)}" for finding in findings] or ["  none"]
    lines += ["", "Files"]
    for target in run.targets:
        lines.append(f"  {printable(run.folder / target)}: the files of {target}")
    lines.append(f"  {printable(run.folder)}: the table; open {PAGE_FILE} in a browser")
    text = "\n".join(lines)

    path = write_json(run.report_file, runs.list_facts())
    page = write_atomic(run.page_file, runs.render(run.page_file))
    write_atomic(run.text_file, text + "\n")
    run.finish()
    print(f"\n{text}", flush=True)
    return TargetsReport(path, page, text, tuple(findings))


def load_target_runs(run: Path) -> TargetRuns:
    """Read what a run came to for each of its targets.

    Args:
        run: The folder of a run for several targets.

    Raises:
        ArgumentError: A target has no report yet.
        DataError: As for `load_report`.
    """
    folders = [run / target for target in list_targets(run)]
    summaries = []
    for folder in folders:
        report = load_report(folder)
        summaries.append(guarded(report.path, partial(_summarize, report)))
    return TargetRuns(run, tuple(summaries), compare_runs(folders))


def _summarize(report: StoredReport) -> TargetSummary:
    """The figures of one target."""
    data, final = report.data, final_candidate(report)
    target, build = data["target"], data["build"]
    census = read_census(report).values()
    macs = [entry["macs"] for entry in census if entry["macs"] is not None]
    payoff = data["check"].get("payoff")
    return TargetSummary(
        target=target["name"],
        sm=target["sm"],
        layers={word: layers_in(report, word) for word in _PRECISIONS},
        sqnr_db=final["sqnr_db"],
        agreement=final["agreement"],
        top1=final["top1"],
        scores=final.get("scores") or {},
        low_macs=sum(macs) if macs else None,
        engine_megabytes=data["summary"]["engine_megabytes"],
        engine_sm=build["sm"],
        engine_note=_explain_engine(target["sm"], build),
        missing=sum(len(entry["missing"]) for entry in census),
        predicted_ms=payoff["int8"] / 1e3 if payoff else None,
        predicted_ratio=payoff["ratio"] if payoff else None,
        num_findings=len(data["findings"]),
    )


def _explain_engine(sm: int, build: Mapping[str, Any]) -> str:
    """Why an engine was not built for its target; "" if it was."""
    name = f"{build['backend']} {build['backend_version']}"
    if build["sm"] is None:
        return f"{name} builds for the GPU of this machine; report.txt has the trtexec line for SM {sm}"
    if build["sm"] != sm:
        return (
            f"{name} cannot build for SM {sm}, and built for SM {build['sm']} instead; report.txt has the trtexec line "
            "for the target"
        )
    return ""
