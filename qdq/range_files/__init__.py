"""Exchange ranges with other tools: TensorRT's calibration cache, ONNX Runtime's JSON, AIMET's encodings, QDQ ONNX.

`import_ranges` gives the quantizers of a model the ranges of a file. `export_ranges` writes the ranges of a model. Both
list what could not be matched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from qdq.check.load import load_onnx, require_whole
from qdq.errors import ArgumentError, CalibrationError, CheckError
from qdq.files import as_path, guard_files, read_file, write_atomic
from qdq.forward import require_model
from qdq.graph.save import save_model
from qdq.graph.tensors import list_data_files
from qdq.range_files import aimet, onnxruntime_json, tensorrt_cache
from qdq.range_files.entry import Entry
from qdq.range_files.format import FileFormat, Row
from qdq.range_files.matching import match_entries
from qdq.range_files.places import list_places
from qdq.range_files.qdq_onnx import read_pairs, write_scales
from qdq.range_files.rows import list_rows, merge_rows
from qdq.text import group_names, list_names

_QDQ = "qdq"
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
        notes: Quantizer -> what was changed to get that range.
        unmatched: Entry of the file -> why it has no quantizer.
        missing: Quantizer without an entry -> why; its range did not change. A weight without a range got the maximum
            of each channel, as calibration would give it.
    """

    path: Path
    format: str
    matched: dict[str, float | list[float]]
    notes: dict[str, str]
    unmatched: dict[str, str]
    missing: dict[str, str]

    def format_table(self) -> str:
        """The counts, then what was changed or could not be matched, with one line for each reason."""
        lines = [
            f"{self.path}: {self.format}, {len(self.matched)} quantizers have their range from it"
        ]
        lines += _group("changed", self.notes)
        lines += _group("quantizers without an entry", self.missing)
        lines += _group("entries not used", self.unmatched)
        return "\n".join(lines)


@dataclass(frozen=True)
class RangeExport:
    """Result of `export_ranges`.

    Args:
        path: The file.
        format: Its format.
        written: Quantizer -> the tensors of the file that have its range.
        notes: Quantizer -> why the file has another range for it.
        left_out: Quantizer -> why the file does not have it.
    """

    path: Path
    format: str
    written: dict[str, tuple[str, ...]]
    notes: dict[str, str]
    left_out: dict[str, str]

    def format_table(self) -> str:
        """The counts, then what was changed or left out, with one line for each reason."""
        lines = [f"{self.path}: {self.format}, the ranges of {len(self.written)} quantizers"]
        lines += _group("changed", self.notes)
        lines += _group("left out", self.left_out)
        return "\n".join(lines)


def import_ranges(
    model: nn.Module, path: Path | str, *, format: str | None = None, onnx: Path | str | None = None
) -> RangeImport:
    """Give the quantizers of a model the ranges from another tool; in place, all or none.

    A range that is not symmetric around 0 is widened to one that is. Quantizers that share a range get their largest
    one.

    Args:
        model: A swapped model.
        path: A calibration cache, a JSON file or a QDQ ONNX.
        format: "tensorrt", "onnxruntime", "aimet" or "qdq"; None: by the content.
        onnx: The ONNX file whose tensors `path` names, exported from the same torch model, with or without Q/DQ. Not
            for "qdq", where `path` is this file; not needed if an AIMET file names torch modules.

    Returns:
        The matched and the unmatched ranges.

    Raises:
        ArgumentError: An unknown format, a file that does not exist, `onnx` missing or not needed.
        CalibrationError: A file that is damaged or of an unknown format, an invalid range, or no entry that matches.
        CheckError: An ONNX file that cannot be read.
        StateError: A quantizer has a range of another shape than the new one.
    """
    require_model(model)
    path = as_path(path, "path")
    content = _read_bytes(path)
    if format is None:
        format = _recognize(path, content)
    _require_format(format)
    _require_import_onnx(format, onnx)

    onnx_path = path if format == _QDQ else onnx
    graph = None if onnx_path is None else load_onnx(Path(onnx_path)).model.graph
    places = list_places(model, graph)
    with _naming(path):
        match = match_entries(model, places, _read_entries(format, content, graph))
    match.apply()
    return RangeImport(path, format, match.ranges(), match.notes, match.unmatched, match.missing)


def export_ranges(
    model: nn.Module, path: Path | str, *, format: str, onnx: Path | str | None = None
) -> RangeExport:
    """Write the ranges of a calibrated model for another tool; the file is written completely or not at all.

    Args:
        model: A swapped and calibrated model.
        path: Where to write.
        format: "tensorrt" (calibration cache), "onnxruntime" (JSON), "aimet" (version 1.0.0), "aimet-0.6.1", or "qdq"
            (the file `onnx` with the scales of the model in its pairs).
        onnx: The ONNX file with the names of the tensors, exported from the same torch model, with or without Q/DQ.
            Required except for "aimet-0.6.1", which can name torch modules.

    Returns:
        The ranges that were written, with their names, and those that were left out.

    Raises:
        ArgumentError: An unknown format, `onnx` missing, or a path that cannot be written.
        CalibrationError: No quantizer has a range for the file.
        CheckError: `onnx` cannot be read, or contains parts that would be lost when it is rewritten.
    """
    require_model(model)
    path = as_path(path, "path")
    _require_format(format)
    _require_export_onnx(format, onnx)
    document = _load_document(path, format, onnx)
    places = list_places(model, None if document is None else document.graph)
    rows, left_out = list_rows(
        model,
        places,
        holds_channels=format not in ("tensorrt", "onnxruntime"),
        int8_only=not format.startswith("aimet"),
    )
    if format == _QDQ and document is not None:
        notes, refused = write_scales(document.graph, rows)
        left_out |= refused
        for name in refused:
            rows.pop(name, None)
        _require_rows(rows, left_out)
        save_model(document, path)
    else:
        merged, notes = merge_rows(rows)
        content = _FILE_FORMATS[format].write(merged)
        _require_rows(rows, left_out)
        write_atomic(path, content)

    written = {}
    for name, rows_of_quantizer in rows.items():
        written[name] = tuple(row.tensor for row in rows_of_quantizer)
    return RangeExport(path, format, written, notes, left_out)


def _load_document(path: Path, format: str, onnx: Path | str | None) -> ir.Model | None:
    """Load the ONNX file, after checking that writing `path` does not overwrite it."""
    data_files = [] if onnx is None else list_data_files(Path(onnx))
    may_replace = [(path, onnx)] if format == _QDQ else []
    guard_files(inputs=[onnx, *data_files], outputs=[path], in_place=may_replace)
    if onnx is None:
        return None
    loaded = load_onnx(Path(onnx))
    if format == _QDQ:
        require_whole(loaded)
    return loaded.model


def _require_rows(rows: Mapping[str, Sequence[Row]], left_out: Mapping[str, str]) -> None:
    """Refuse to write a file without any range; the message gives the first reason."""
    if not rows:
        reason = next(iter(left_out.values()), "the model has no quantizer")
        raise CalibrationError(
            f"no range to write: {reason}.",
            "calibrate, and give the ONNX file that was exported from this model.",
        )


def _require_format(format: str) -> None:
    """Refuse an unknown format."""
    if format not in FORMATS:
        raise ArgumentError(
            f"format is {format!r}; expected one of {', '.join(FORMATS)}.", "choose one of them."
        )


def _require_import_onnx(format: str, onnx: Path | str | None) -> None:
    """Refuse an ONNX file that is missing or not needed.

    Args:
        format: A known format.
        onnx: The argument of `import_ranges`.

    Raises:
        ArgumentError: The message says what to do.
    """
    if format == _QDQ and onnx is not None:
        raise ArgumentError(
            "a QDQ ONNX file contains the tensor names itself; do not pass onnx=.", "omit onnx=."
        )
    if format != _QDQ and not format.startswith("aimet"):
        _require_onnx(format, onnx)


def _require_export_onnx(format: str, onnx: Path | str | None) -> None:
    """Refuse a missing ONNX file; only one format can name torch modules.

    Args:
        format: A known format.
        onnx: The argument of `export_ranges`.

    Raises:
        ArgumentError: The message says what to do.
    """
    if format != "aimet-0.6.1":
        _require_onnx(format, onnx)


def _require_onnx(format: str, onnx: Path | str | None) -> None:
    """Refuse a missing ONNX file."""
    if onnx is None:
        raise ArgumentError(
            f"the format {format} uses names of an ONNX file, but onnx= is missing.",
            "give the ONNX file that was calibrated, or one exported from the same torch model.",
        )


def _read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ArgumentError: The file cannot be read.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise ArgumentError(
            f"cannot read {path}: {error.strerror or error}.", "check the path."
        ) from error


def _read_entries(format: str, content: bytes, graph: ir.Graph | None) -> dict[str, Entry]:
    """The entries of a file; those of a QDQ ONNX come from its graph."""
    if format == _QDQ and graph is not None:
        return read_pairs(graph)
    return _FILE_FORMATS[format].read(content)


def _recognize(path: Path, content: bytes) -> str:
    """The format of a file by its content.

    Args:
        path: The file.
        content: Its content.

    Raises:
        CalibrationError: The format is unknown.
    """
    for name, file_format in _FILE_FORMATS.items():
        if file_format.recognize(content):
            return name
    try:
        load_onnx(path)
    except CheckError:
        raise CalibrationError(
            f"{path} has an unknown format: it is not a TensorRT cache, ONNX Runtime JSON, AIMET JSON or ONNX.",
            "check the path, or pass format= to get the reason; of ONNX Runtime's write_calibration_table "
            "files, use calibration.json.",
        ) from None
    return _QDQ


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the name of the file to errors about its content."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error.message}", error.fix) from None


def _group(title: str, reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the names that it applies to."""
    if not reasons:
        return []
    lines = [f"{title}: {len(reasons)}"]
    groups = group_names((reason, name) for name, reason in reasons.items())
    for reason, names in groups.items():
        lines.append(f"  {len(names)}: {reason} ({list_names(names, 3)})")
    return lines
