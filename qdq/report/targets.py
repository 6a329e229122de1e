"""What came back from targets: the `result.json` that `verify.sh` of a bundle writes. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from qdq.errors import DataError
from qdq.files import as_path
from qdq.report.records import Count
from qdq.report.wording import NOTHING
from qdq.schema import describe, read_json, validate
from qdq.text import printable

RESULT_FORMAT = "qdq result 2"
"""Marks a result that this version can read."""

Status = Literal["passed", "failed", "not checked"]

_FIX = "give the result.json that verify.sh of a bundle wrote on the target."


class TargetCheck(TypedDict):
    """An entry of `checks`."""

    name: str
    status: Status
    text: str
    figures: dict[str, Any]


class TargetEnvironment(TypedDict):
    """The entry `environment`."""

    tensorrt: str
    gpu: str
    compute_capability: str
    system: str
    python: str
    numpy: str


class _StoredResult(TypedDict):
    """The fields of `result.json`."""

    format: str
    verdict: Literal["passed", "failed", "could not run"]
    passed: Count
    failed: Count
    not_checked: Count
    model_sha256: str
    environment: TargetEnvironment
    checks: list[TargetCheck]


@dataclass(frozen=True)
class TargetResult:
    """The result of one target.

    Args:
        path: The file.
        data: Its content.
    """

    path: Path
    data: _StoredResult

    @property
    def name(self) -> str:
        """GPU and version of TensorRT."""
        environment = self.data["environment"]
        return printable(f"{environment['gpu']}, TensorRT {environment['tensorrt']}")

    def find_check(self, name: str) -> TargetCheck | None:
        """The check of a name."""
        for check in self.data["checks"]:
            if check["name"] == name:
                return check
        return None

    def figure(self, check: str, name: str) -> float | None:
        """A figure of a check; None if it was not measured."""
        entry = self.find_check(check)
        value = None if entry is None else entry["figures"].get(name)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class TargetCell:
    """A cell of the table of targets.

    Args:
        text: The text that it shows.
        note: More of it, as a tooltip.
        is_bad: Whether a check failed.
    """

    text: str
    note: str = ""
    is_bad: bool = False


@dataclass(frozen=True)
class TargetRow:
    """A row of the table: a fact or a check, and a cell for each target."""

    name: str
    cells: tuple[TargetCell, ...]


def load_targets(paths: Sequence[Path | str], model_sha256: str | None) -> tuple[TargetResult, ...]:
    """Read results of targets.

    Args:
        paths: The files.
        model_sha256: Digest of the ONNX file of the run; None if its report does not tell it.

    Raises:
        DataError: A file cannot be read, is not such a result, or is of a bundle of another ONNX file.
    """
    targets = []
    for path in paths:
        target = _load_target(as_path(path, "target"))
        _require_model(target, model_sha256)
        targets.append(target)
    return tuple(targets)


def _require_model(target: TargetResult, model_sha256: str | None) -> None:
    """Refuse the result of another bundle: its numbers say nothing about this run.

    Raises:
        DataError: It is of another ONNX file than the run, or the run does not tell which one it has.
    """
    if model_sha256 is None:
        raise DataError(
            "the report does not tell which ONNX file it is of: an earlier qdq wrote it.",
            "run the recipe again, make the bundle again, and verify it.",
        )
    bundled = target.data["model_sha256"]
    if bundled != model_sha256:
        raise DataError(
            f"{printable(target.path)} is of another bundle: it was made from an ONNX file with SHA-256 "
            f"{printable(bundled) or 'unknown'}, and that of the run has {printable(model_sha256)}.",
            "give the result.json of the bundle that was made from this run.",
        )


def _load_target(path: Path) -> TargetResult:
    content = read_json(path, _FIX)
    stored_format = content.get("format") if isinstance(content, dict) else None
    if stored_format != RESULT_FORMAT:
        raise DataError(
            f"{printable(path)} is not the result of a target: its format is {describe(stored_format)}, this "
            f"version reads {RESULT_FORMAT!r}.",
            _FIX,
        )
    return TargetResult(path, validate(_StoredResult, content, str(path), _FIX))


def list_target_rows(targets: Sequence[TargetResult]) -> list[TargetRow]:
    """The table of targets: the environment, the times, and every check; a column each."""
    make_cells: dict[str, Callable[[TargetResult], TargetCell]] = {
        "verdict": _verdict_cell,
        "GPU": partial(_environment_cell, key="gpu"),
        "TensorRT": partial(_environment_cell, key="tensorrt"),
        "system": partial(_environment_cell, key="system"),
        "quantized engine, ms": partial(_figure_cell, name="int8_ms"),
        "float engine, ms": partial(_figure_cell, name="float_ms"),
        "speedup": partial(_figure_cell, name="speedup"),
    }
    rows = []
    for title, make_cell in make_cells.items():
        rows.append(TargetRow(title, tuple(map(make_cell, targets))))
    names: dict[str, None] = {}
    for target in targets:
        names.update(dict.fromkeys(check["name"] for check in target.data["checks"]))
    for name in names:
        cells = tuple(_check_cell(target.find_check(name)) for target in targets)
        rows.append(TargetRow(printable(name), cells))
    return rows


def _verdict_cell(target: TargetResult) -> TargetCell:
    data = target.data
    counts = f"{data['passed']} passed, {data['failed']} failed, {data['not_checked']} not checked"
    return TargetCell(data["verdict"], counts, is_bad=data["verdict"] != "passed")


def _environment_cell(
    target: TargetResult, key: Literal["gpu", "tensorrt", "system"]
) -> TargetCell:
    return TargetCell(printable(target.data["environment"][key]))


def _figure_cell(target: TargetResult, name: str) -> TargetCell:
    """A figure of the check of times."""
    value = target.figure("time", name)
    if value is None:
        check = target.find_check("time")
        return TargetCell(NOTHING, "not checked" if check is None else printable(check["text"]))
    return TargetCell(f"{value:.4g}")


def _check_cell(check: TargetCheck | None) -> TargetCell:
    if check is None:
        return TargetCell(NOTHING, "not among the checks of this target")
    text = printable(check["text"], 1000)
    return TargetCell(f"{check['status']}: {text}", is_bad=check["status"] == "failed")
