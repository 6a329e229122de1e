"""Ranges from and for other tools: TensorRT's calibration cache, ONNX Runtime's JSON, AIMET's encodings, QDQ ONNX.

`import_ranges` gives the quantizers of a model the ranges of a file, `export_ranges` writes those of a model; both say
what could not be matched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from qdq.check.load import load_onnx, require_whole
from qdq.errors import ArgumentError, CalibrationError, CheckError
from qdq.files import as_path, guard_files, read_file, write_atomic
from qdq.forward import require_model
from qdq.graph.save import save_model
from qdq.graph.tensors import list_data_files
from qdq.range_files import aimet, onnxruntime_json, tensorrt_cache
from qdq.range_files.format import FileFormat
from qdq.range_files.matching import match_entries
from qdq.range_files.places import list_places
from qdq.range_files.qdq_onnx import read_pairs, write_scales
from qdq.range_files.rows import list_rows, merge_rows
from qdq.text import group_names, list_names

_QDQ = "qdq"
_Result = TypeVar("_Result")
_FILE_FORMATS = {
    "tensorrt": FileFormat(tensorrt_cache.recognize, tensorrt_cache.read, tensorrt_cache.write),
    "onnxruntime": FileFormat(
        onnxruntime_json.recognize, onnxruntime_json.read, onnxruntime_json.write
    ),
    "aimet": FileFormat(aimet.recognize, aimet.read, aimet.write_1_0_0),
    "aimet-0.6.1": FileFormat(aimet.recognize, aimet.read, aimet.write_0_6_1),
}
FORMATS = (*_FILE_FORMATS, _QDQ)


@dataclass(frozen=True)
class RangeImport:
    """Result of `import_ranges`.

    Args:
        path: The file.
        format: Its format.
        matched: Quantizer -> the amax that it has now; one number, or one for each channel.
        notes: Quantizer -> what was changed on the way to that range.
        unmatched: Entry of the file -> why no quantizer has it.
        missing: Quantizer without an entry -> why; its range is what it was. A weight that had none has the maximum of
            each channel, as calibration would give it.
    """

    path: Path
    format: str
    matched: dict[str, float | list[float]]
    notes: dict[str, str]
    unmatched: dict[str, str]
    missing: dict[str, str]

    def format_table(self) -> str:
        """The counts, then what was changed or could not be matched, alike ones in one line."""
        return "\n".join(
            [
                f"{self.path}: {self.format}, {len(self.matched)} quantizers have their range from it",
                *_group("changed", self.notes),
                *_group("quantizers without an entry", self.missing),
                *_group("entries not used", self.unmatched),
            ]
        )


@dataclass(frozen=True)
class RangeExport:
    """Result of `export_ranges`.

    Args:
        path: The file.
        format: Its format.
        written: Quantizer -> the tensors of the file that have its range.
        notes: Quantizer -> what its range is not the same for.
        left_out: Quantizer -> why the file does not have it.
    """

    path: Path
    format: str
    written: dict[str, tuple[str, ...]]
    notes: dict[str, str]
    left_out: dict[str, str]

    def format_table(self) -> str:
        """The counts, then what was changed or left out, alike ones in one line."""
        return "\n".join(
            [
                f"{self.path}: {self.format}, the ranges of {len(self.written)} quantizers",
                *_group("changed", self.notes),
                *_group("left out", self.left_out),
            ]
        )


def import_ranges(
    model: nn.Module, path: Path | str, *, format: str | None = None, onnx: Path | str | None = None
) -> RangeImport:
    """Give the quantizers of a model the ranges that another tool has found; in place, all or none.

    A range that is not symmetric around 0 is widened to one that is. Quantizers that share a range get the largest of
    theirs.

    Args:
        model: A swapped model.
        path: A calibration cache, a JSON file or a QDQ ONNX.
        format: "tensorrt", "onnxruntime", "aimet" or "qdq"; None: by the content.
        onnx: The ONNX file whose tensors `path` names, exported from the same torch model, with or without Q/DQ. Not
            for "qdq", which is that file itself; not needed where an AIMET file names torch modules.

    Returns:
        What was matched, and what was not.

    Raises:
        ArgumentError: An unknown format, a file that does not exist, `onnx` missing or one too many.
        CalibrationError: A file that is damaged or of no known format, a range that is none, or no entry that matches.
        CheckError: An ONNX file that cannot be read.
        StateError: A quantizer has a range of another shape than the one it would get.
    """
    require_model(model)
    path = as_path(path, "path")
    content = _read_bytes(path)
    format = _recognize(path, content) if format is None else _known(format)
    _require_onnx(format, onnx, may_lack=format.startswith("aimet"))
    if format == _QDQ:
        graph = load_onnx(path).model.graph
        entries = _naming(path, lambda: read_pairs(graph))
    else:
        entries = _naming(path, lambda: _FILE_FORMATS[format].read(content))
    places = list_places(
        model, graph if format == _QDQ else load_onnx(Path(onnx)).model.graph if onnx else None
    )
    match = _naming(path, lambda: match_entries(model, places, entries))
    match.apply()
    return RangeImport(path, format, match.ranges(), match.notes, match.unmatched, match.missing)


def export_ranges(
    model: nn.Module, path: Path | str, *, format: str, onnx: Path | str | None = None
) -> RangeExport:
    """Write the ranges of a calibrated model for another tool; the file is written whole or not at all.

    Args:
        model: A swapped and calibrated model.
        path: Where to write.
        format: "tensorrt" (calibration cache), "onnxruntime" (JSON), "aimet" (version 1.0.0), "aimet-0.6.1", or "qdq"
            (the file `onnx`, its pairs with the scales of the model).
        onnx: The ONNX file that says what tensors are called, exported from the same torch model, with or without Q/DQ.
            Needed but for "aimet-0.6.1", which can name torch modules.

    Returns:
        What was written under which name, and what was left out.

    Raises:
        ArgumentError: An unknown format, `onnx` missing, or a path that cannot be written.
        CalibrationError: No quantizer has a range that the file could hold.
        CheckError: `onnx` cannot be read, or holds what would be lost when it is written again.
    """
    require_model(model)
    path = as_path(path, "path")
    _require_onnx(_known(format), onnx, may_lack=format == "aimet-0.6.1", may_have=True)
    data_files = [] if onnx is None else list_data_files(Path(onnx))
    guard_files(
        inputs=[onnx, *data_files],
        outputs=[path],
        in_place=[(path, onnx)] if format == _QDQ else [],
    )
    loaded = None if onnx is None else load_onnx(Path(onnx))
    if loaded is not None and format == _QDQ:
        require_whole(loaded)
    document = None if loaded is None else loaded.model
    places = list_places(model, None if document is None else document.graph)
    holds_channels = format not in ("tensorrt", "onnxruntime")
    rows, left_out = list_rows(
        model, places, holds_channels=holds_channels, int8_only=not format.startswith("aimet")
    )
    notes: dict[str, str] = {}
    content: str | None = None
    if format == _QDQ and document is not None:
        notes, refused = write_scales(document.graph, rows)
        left_out |= refused
        rows = {name: row for name, row in rows.items() if name not in left_out}
    else:
        merged, notes = merge_rows(rows)
        content = _FILE_FORMATS[format].write(merged)
    if not rows:
        reason = next(iter(left_out.values()), "the model has no quantizer")
        raise CalibrationError(
            f"no range to write: {reason}.", "calibrate, and give the ONNX file of this very model."
        )
    if content is not None:
        write_atomic(path, content)
    elif document is not None:
        save_model(document, path)
    written = {name: tuple(row.tensor for row in own) for name, own in rows.items()}
    return RangeExport(path, format, written, notes, left_out)


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ArgumentError(
            f"format is {format!r}; known are {', '.join(FORMATS)}.", "choose one of them."
        )
    return format


def _require_onnx(
    format: str, onnx: Path | str | None, *, may_lack: bool, may_have: bool = False
) -> None:
    if format == _QDQ and onnx is not None and not may_have:
        raise ArgumentError(
            "a QDQ ONNX names its tensors itself; onnx= is one file too many.", "leave onnx= out."
        )
    if onnx is None and not may_lack and (format != _QDQ or may_have):
        raise ArgumentError(
            f"the format {format} has the names of an ONNX file, and onnx= is not given.",
            "give the ONNX file that was calibrated, or one exported from the same torch model.",
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ArgumentError(
            f"cannot read {path}: {error.strerror or error}.", "check the path."
        ) from error


def _recognize(path: Path, content: bytes) -> str:
    """The format of a file by its content."""
    for name, file_format in _FILE_FORMATS.items():
        if file_format.recognize(content):
            return name
    try:
        load_onnx(path)
    except CheckError:
        raise CalibrationError(
            f"{path} is of no known format: no TensorRT calibration cache, ONNX Runtime or AIMET JSON, nor ONNX.",
            "check the path, or name the format to learn more; of the files of ONNX Runtime's write_calibration_table "
            "it is calibration.json.",
        ) from None
    return _QDQ


def _naming(path: Path, step: Callable[[], _Result]) -> _Result:
    """Do something with the content of a file; an error says which file."""
    try:
        return step()
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error.message}", error.fix) from None


def _group(title: str, reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason with the names it stands for."""
    groups = group_names((reason, name) for name, reason in reasons.items())
    lines = [f"{title}: {len(reasons)}"] if reasons else []
    return lines + [
        f"  {len(names)}: {reason} ({list_names(names, 3)})" for reason, names in groups.items()
    ]
