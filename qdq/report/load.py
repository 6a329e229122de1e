"""The report of a run, read back. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qdq.errors import ArgumentError, DataError, QdqError
from qdq.report.records import LayerRecord, read_layer
from qdq.run import REPORT_FILE, STATE_FILE

PAGE_FILE = "report.html"
REPORT_FORMAT = "qdq report 1"
_SECTIONS: Mapping[str, type] = {
    "model": str, "data": dict, "summary": dict, "findings": list, "evaluation": dict, "analysis": dict, "fold": list,
    "swap": dict, "rewire": dict, "calibration": list, "export": dict, "check": dict, "build": dict, "layers": list,
    "command": str, "settings": dict, "seed": int, "environment": dict, "seconds": dict,
}  # fmt: skip
_AGAIN = "run the same command again; it writes a new report."
_MOST = 2**63  # no whole number of a report is larger, and Python's would not all fit a float

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
        DataError: The report cannot be read, or holds a number that is not finite.
    """
    run = Path(run)
    path = run / REPORT_FILE if run.is_dir() else run
    if not path.is_file():
        raise _missing(run)
    try:
        return path, _clean(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.", _AGAIN) from error


def _clean(value: Any) -> Any:
    """JSON whose text can be written as UTF-8: of half a surrogate pair, as in the name of a file, becomes "?".

    Raises:
        ValueError: A number is not finite, or too large.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > _MOST):
        raise ValueError(
            f"{value:.4g} is no number of a report" if isinstance(value, float) else "a number is too large"
        )
    return value


def guarded(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns of a report; if the report is not as it should be, the error names the file.

    Raises:
        DataError: Something is missing in the report, or is of another kind.
    """
    try:
        return read()
    except QdqError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _missing(run: Path) -> ArgumentError:
    if not run.exists():
        return ArgumentError(f"there is no {run}.", "give the folder that `qdq ptq --output` wrote.")
    try:
        state = json.loads((run / STATE_FILE).read_text(encoding="utf-8"))
        stage = str(state["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return ArgumentError(
            f"{run} is no run folder: there is no {REPORT_FILE} in it.",
            "give the folder that `qdq ptq --output` wrote.",
        )
    return ArgumentError(f"the run {run} has written no report: it got as far as '{stage}'.", _AGAIN)


def parse_report(data: Any, path: Path) -> StoredReport:
    """Make sure that a report holds what every reader of it relies on.

    Args:
        data: The content of the file.
        path: The file.

    Raises:
        DataError: It does not.
    """
    if not isinstance(data, dict) or not isinstance(data.get("summary"), dict):
        raise DataError(f"{path} is no report of a run.", "give the folder that `qdq ptq --output` wrote.")
    if data.get("format") != REPORT_FORMAT:
        found = data.get("format", "none")
        raise DataError(f"{path} is of another qdq: its format is {found!r}, this one reads {REPORT_FORMAT!r}.", _AGAIN)
    wrong = [name for name, kind in _SECTIONS.items() if not isinstance(data.get(name), kind)]
    if wrong:
        raise _damaged(path, f"{', '.join(wrong)} missing or of another kind")
    return StoredReport(path, data, guarded(path, lambda: tuple(map(read_layer, data["layers"]))))


def plain(text: object) -> str:
    """One line without what a terminal, XML or UTF-8 would not take: names and paths are data."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is damaged: {what}.", _AGAIN)
