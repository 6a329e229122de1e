"""`qdq report`: the page of a run again, or several runs side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    *runs: Path,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    json: Path | None = None,
) -> int:
    """Write the page of a run again from its report.json, or one that compares several runs. Needs no torch.

    Such as:

        qdq report runs/ptq -o page.html
        qdq report runs/mse runs/max -o compare.html

    Args:
        runs: One run folder, or several; the others are compared with the first.
        output: The page; report.html in the folder if there is one run, comparison.html here if there are several.
        json: Also write what the page shows to this file.
    """
    from qdq.errors import ArgumentError
    from qdq.files import write_atomic, write_json
    from qdq.report.compare import compare_runs, render_comparison
    from qdq.report.load import PAGE_FILE, load_report
    from qdq.report.page import render_report
    from qdq.run import guard_command, list_run_files
    from qdq.text import MOST_CHARACTERS, printable

    if not runs:
        raise ArgumentError("no run was given.", "name one run folder, or several to compare them.")
    read = [file for run in runs for file in list_run_files(run)]
    guard_command(inputs=read)
    folder = runs[0] if os.path.isdir(runs[0]) else runs[0].parent
    default = folder / PAGE_FILE if len(runs) == 1 else Path("comparison.html")
    path = default if output is None else output
    guard_command(inputs=read, outputs=[path, json], in_place=[(path, default)])
    shown: object
    if len(runs) == 1:
        loaded = load_report(runs[0])
        shown, page = loaded.data, render_report(loaded)
    else:
        comparison = compare_runs(runs)
        shown, page = comparison, render_comparison(comparison)
    print(printable(write_atomic(path, page), MOST_CHARACTERS))
    if json is not None:
        write_json(json, shown)
    return 0
