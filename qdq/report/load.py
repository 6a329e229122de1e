"""The report of a run, read back. Needs no torch."""

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
from qdq.run import REPORT_FILE, STATE_FILE
from qdq.schema import describe, read_json, validate
from qdq.text import printable

REPORT_FORMAT = "qdq report 1"
_AGAIN = "run the same command again; it writes a new report."
_GIVE_FOLDER = "give the folder that `qdq ptq --output` wrote."

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredReport:
    """A report as it was written.

    Args:
        path: The JSON file.
        data: All of it.
        layers: The section `layers`.
    """

    path: Path
    data: Mapping[str, Any]
    layers: tuple[LayerRecord, ...]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.absolute().parent.name


def load_report(run: Path | str) -> StoredReport:
    """Read the report of a run.

    Args:
        run: A run folder, or the `report.json` in it.

    Raises:
        ArgumentError: No such folder, no run, or one that has not come to its end.
        DataError: The report cannot be read, is damaged, or was written by an earlier qdq.
    """
    path, data = read_report(run)
    return parse_report(data, path)


def read_report(run: Path | str) -> tuple[Path, Any]:
    """Where the report of a run is, and what JSON it holds.

    Args:
        run: A run folder, or the `report.json` in it.

    Raises:
        ArgumentError: No such folder, no run, or one that has not come to its end.
        DataError: The report cannot be read, or is no JSON of finite numbers.
    """
    run = as_path(run, "run")
    path = (
        run / REPORT_FILE if os.path.isdir(run) else run
    )  # unlike those of Path, they take any name
    if not os.path.isfile(path):
        raise _missing(run)
    return path, read_json(path, _AGAIN if path.name == REPORT_FILE else _GIVE_FOLDER)


def guarded(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns of a report; if values of it contradict each other, the error names the file.

    That each value is there and of its type has been seen to by `parse_report`.

    Raises:
        DataError: A name that the report uses is not in it, or a number is missing that another one asks for.
    """
    try:
        return read()
    except QdqError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{path} is damaged: its entries contradict each other, {what}.", _AGAIN
        ) from error


def _missing(run: Path) -> ArgumentError:
    if not os.path.exists(run):
        return ArgumentError(f"there is no {printable(run)}.", _GIVE_FOLDER)
    try:
        stage = validate(RunState, read_json(run / STATE_FILE, _AGAIN), STATE_FILE, _AGAIN)["stage"]
    except DataError:
        return ArgumentError(
            f"{run} is no run folder: there is no {REPORT_FILE} in it.",
            _GIVE_FOLDER,
        )
    return ArgumentError(
        f"the run {run} has written no report: it got as far as '{stage}'.", _AGAIN
    )


def parse_report(data: Any, path: Path) -> StoredReport:
    """Make sure that a report holds what every reader of it relies on.

    Args:
        data: The content of the file.
        path: The file.

    Raises:
        DataError: It does not.
    """
    if not isinstance(data, dict) or not isinstance(data.get("summary"), dict):
        raise DataError(f"{path} is no report of a run.", _GIVE_FOLDER)
    if data.get("format") != REPORT_FORMAT:
        found = describe(data.get("format", "none"))
        raise DataError(
            f"{path} is of another qdq: its format is {found}, this one reads {REPORT_FORMAT!r}.",
            _AGAIN,
        )
    sections = validate(StoredSections, data, str(path), _AGAIN)
    return StoredReport(path, data, tuple(sections["layers"]))
