"""`qdq report`: write the page of a run again, or compare several runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    *runs: Path,
    target: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    json: Path | None = None,
) -> int:
    """Write the page of a run again from its report.json, or a page that compares several runs. Needs no torch.

    For example:

        qdq report runs/ptq -o page.html
        qdq report runs/mse runs/max -o compare.html
        qdq report runs/ptq --target l4/result.json orin/result.json

    Args:
        runs: One run folder, or several; the first is the reference of the comparison. The page of a run for several
            targets compares these.
        target: The result.json of one target or several, which verify.sh of the bundle wrote; for one run only.
        output: The page; by default report.html in the run folder for one run, comparison.html in the current folder
            for several.
        json: Also write the contents of the page to this file.
    """
    from qdq.errors import ArgumentError
    from qdq.files import write_atomic, write_json
    from qdq.run import guard_command, list_run_files
    from qdq.text import MOST_CHARACTERS, printable

    if not runs:
        raise ArgumentError("no run was given.", "name one run folder, or several to compare them.")
    if target and len(runs) > 1:
        raise ArgumentError(
            "--target is given, and several runs.", "name the run that the bundle was made from."
        )
    inputs: list[Path] = [*target]
    for run in runs:
        inputs += list_run_files(run)
    guard_command(inputs=inputs)  # before `_default_page` looks at the inputs
    default_page = _default_page(runs)
    page_file = default_page if output is None else output
    guard_command(inputs=inputs, outputs=[page_file, json], in_place=[(page_file, default_page)])
    page, content = _render(runs, target, page_file)
    print(printable(write_atomic(page_file, page), MOST_CHARACTERS))
    if json is not None:
        write_json(json, content)
    return 0


def _default_page(runs: tuple[Path, ...]) -> Path:
    from qdq.report.load import PAGE_FILE

    if len(runs) > 1:
        return Path("comparison.html")
    folder = runs[0] if os.path.isdir(runs[0]) else runs[0].parent
    return folder / PAGE_FILE


def _render(
    runs: tuple[Path, ...], target: tuple[Path, ...], page_file: Path
) -> tuple[str, object]:
    """The page for a file, and its contents for JSON."""
    from qdq.report.compare import compare_runs, render_comparison
    from qdq.report.load import load_report
    from qdq.report.page import render_report
    from qdq.report.target_runs import load_target_runs
    from qdq.report.targets import load_targets
    from qdq.run import list_targets

    if len(runs) == 1 and list_targets(runs[0]) and not target:
        targets = load_target_runs(runs[0])
        return targets.render(page_file), targets.list_facts()
    if len(runs) == 1:
        loaded = load_report(runs[0])
        results = load_targets(target, loaded.data.get("model_sha256"))
        content = dict(loaded.data)
        if results:
            content["targets"] = [result.data for result in results]
        return render_report(loaded, results, page_file), content
    comparison = compare_runs(runs)
    return render_comparison(comparison), comparison
