"""Reading the report of a run. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qdq.errors import ArgumentError, DataError, QdqError
from qdq.files import as_path
from qdq.report.records import LayerRecord
from qdq.report.sections import RunState, StoredSections
from qdq.run import PAGE_FILE as PAGE_FILE
from qdq.run import REPORT_FILE, STATE_FILE, require_one_target
from qdq.schema import describe, read_json, validate
from qdq.text import printable

REPORT_FORMAT = "qdq report 1"
"""Marks a report that this version can read."""

_RUN_AGAIN = "run the same command again; it writes a new report."
_GIVE_FOLDER = "give the folder that `qdq ptq --output` wrote."

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredReport:
    """A report that was written by a run.

    Args:
        path: The JSON file.
        data: Its content.
        layers: The section `layers`.
    """

    path: Path
    data: Mapping[str, Any]
    layers: tuple[LayerRecord, ...]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.absolute().parent.name

    @property
    def quantized_state(self) -> str:
        """What is not in float is "in int8", or if a layer was in FP8 before the search "quantized"."""
        return "quantized" if self.data["analysis"].get("fp8") else "in int8"


def load_report(run: Path | str) -> StoredReport:
    """Read the report of a run.

    Args:
        run: A run folder, or the `report.json` in it.

    Raises:
        ArgumentError: There is no such folder, it is not a run folder, it is that of several targets, or its run has
            not finished.
        DataError: The report cannot be read, is damaged, or was written by an earlier qdq.
    """
    path, data = read_report(run)
    return parse_report(data, path)


def read_report(run: Path | str) -> tuple[Path, Any]:
    """Find and read the JSON file of a run; the content is not checked.

    Args:
        run: A run folder, or the `report.json` in it.

    Raises:
        ArgumentError: As for `load_report`.
        DataError: The report cannot be read, or is not JSON with finite numbers.
    """
    path = run = as_path(run, "run")
    if os.path.isdir(run):  # unlike the methods of Path, os.path takes any name
        require_one_target(run)
        path = run / REPORT_FILE
    if not os.path.isfile(path):
        raise _explain_missing_report(run)
    fix = _RUN_AGAIN if path.name == REPORT_FILE else _GIVE_FOLDER
    return path, read_json(path, fix)


def guarded(path: Path, read: Callable[[], Result]) -> Result:
    """Call a function that reads a report. If values of the report contradict each other, the error names the file.

    `parse_report` has already checked that each value is present and of its type.

    Args:
        path: The file.
        read: The function.

    Raises:
        DataError: The report uses a name that is not in it, or a number is missing that another one needs.
    """
    try:
        return read()
    except QdqError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{path} is damaged: its entries contradict each other, {reason}.", _RUN_AGAIN
        ) from error


def _explain_missing_report(run: Path) -> ArgumentError:
    """The error for a folder or file that is not a report, or a run without one."""
    if not os.path.exists(run):
        return ArgumentError(f"there is no {printable(run)}.", _GIVE_FOLDER)
    try:
        state = validate(RunState, read_json(run / STATE_FILE, _RUN_AGAIN), STATE_FILE, _RUN_AGAIN)
    except DataError:
        return ArgumentError(
            f"{run} is not a run folder: there is no {REPORT_FILE} in it.", _GIVE_FOLDER
        )

    return ArgumentError(
        f"the run {run} has not written a report: it got as far as '{state['stage']}'.", _RUN_AGAIN
    )


def parse_report(data: Any, path: Path) -> StoredReport:
    """Check that a report holds everything that its readers need.

    Args:
        data: The content of the file.
        path: The file.

    Raises:
        DataError: Something is missing or of another type.
    """
    if not isinstance(data, dict) or not isinstance(data.get("summary"), dict):
        raise DataError(f"{path} is not the report of a run.", _GIVE_FOLDER)
    if data.get("format") != REPORT_FORMAT:
        present_format = describe(data.get("format", "none"))
        raise DataError(
            f"{path} was written by another version of qdq: its format is {present_format}, "
            f"this version reads {REPORT_FORMAT!r}.",
            _RUN_AGAIN,
        )
    sections = validate(StoredSections, data, str(path), _RUN_AGAIN)
    return StoredReport(path, data, tuple(sections["layers"]))
