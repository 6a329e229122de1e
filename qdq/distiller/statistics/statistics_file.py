"""The YAML file of the statistics: an entry for each layer, with a record for each input and for the output."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qdq.distiller.files.file_kinds import STATISTICS_FILE, describe_kind
from qdq.distiller.files.yaml_text import write_yaml
from qdq.distiller.settings.values import as_number, describe_value
from qdq.distiller.statistics.records import LayerStatistics, ModelStatistics, TensorRecord
from qdq.errors import ArgumentError, ArgumentTypeError, DataError
from qdq.files import as_path, guard_files, write_atomic
from qdq.schema import read_yaml
from qdq.text import printable

_FIX = f"give the {STATISTICS_FILE} that collecting statistics has written."
_NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
_REQUIRED = _NUMBERS[:4]
_KEYS = tuple(field.name for field in fields(TensorRecord))


def save_statistics(path: Path | str, statistics: ModelStatistics) -> Path:
    """Write statistics as YAML, atomically.

    Args:
        path: The file.
        statistics: The statistics.

    Raises:
        ArgumentError: It cannot be written.
    """
    path = as_path(path, "path")
    guard_files(outputs=[path])
    content = {}
    for name, layer in statistics.items():
        content[name] = plain_layer(layer)
    return write_atomic(path, write_yaml(content))


def plain_layer(layer: LayerStatistics) -> dict[str, Any]:
    """The statistics of a layer as plain values, as they are in files.

    Args:
        layer: The statistics.
    """
    inputs = {position: _plain_record(record) for position, record in layer.inputs.items()}
    return {"inputs": inputs, "output": _plain_record(layer.output)}


def _plain_record(record: TensorRecord) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if value not in (None, "")}


def read_statistics(source: Path | str | Mapping[str, Any]) -> ModelStatistics:
    """Statistics from a file, or from a dictionary with the content of such a file.

    Args:
        source: The file; or name of a layer -> its statistics, as `LayerStatistics` or as in the file. Other keys of a
            record are ignored.

    Raises:
        ArgumentError: The file does not exist.
        ArgumentTypeError: Neither a file nor a dictionary.
        DataError: The file is damaged, or of another kind.
    """
    if isinstance(source, Mapping):
        return _read_layers(source, "the statistics")
    if not isinstance(source, str | Path):
        raise ArgumentTypeError(
            f"the statistics are of type {type(source).__name__}; expected a file or a dictionary.",
            _FIX,
        )
    path = Path(source)
    if not os.path.exists(path):  # False also for a name that no file can have
        raise ArgumentError(f"the statistics file {printable(path)} does not exist.", _FIX)
    label = printable(path)
    content = read_yaml(path, _FIX)
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{label} has no statistics: it is {describe_value(content)}.", _FIX)
    return _read_layers(content, label)


def _read_layers(content: Mapping[str, Any], label: str) -> ModelStatistics:
    """The statistics of all layers.

    Raises:
        DataError: The content is damaged, or of another kind.
    """
    statistics = {}
    for name, entry in content.items():
        if isinstance(entry, LayerStatistics):
            statistics[name] = entry
            continue
        if not isinstance(entry, Mapping) or "output" not in entry:
            raise _refuse_kind(content, name, label)
        statistics[name] = _read_layer(entry, f"{label}: {printable(name)}")
    return statistics


def _refuse_kind(content: Mapping[str, Any], name: str, label: str) -> DataError:
    """The error for content that has an entry without statistics."""
    kind = describe_kind(content)
    if kind and not kind.startswith("statistics"):
        return DataError(f"{label} has no statistics. It is {kind}.", _FIX)
    return DataError(f"{label} is damaged: {printable(name)} has no output statistics.", _FIX)


def _read_layer(entry: Mapping[str, Any], place: str) -> LayerStatistics:
    inputs = entry.get("inputs") or {}
    if not isinstance(inputs, Mapping):
        raise _damaged(f"{place}.inputs", inputs, "positions with records")
    records = {}
    for key, record in inputs.items():
        position = str(key)
        if not (position.isascii() and position.isdecimal()):
            raise _damaged(f"{place}.inputs", key, "a position: 0, 1, ...")
        records[int(position)] = _read_record(record, f"{place}.inputs.{position}")
    return LayerStatistics(records, _read_record(entry["output"], f"{place}.output"))


def _read_record(record: Any, place: str) -> TensorRecord:
    """A record, without the keys that other programs have added."""
    if isinstance(record, TensorRecord):
        return record
    if not isinstance(record, Mapping):
        raise _damaged(place, record, "a record with min, max and more")
    missing = [key for key in _REQUIRED if record.get(key) is None]
    if missing:
        raise DataError(f"{place} is damaged: {', '.join(missing)} missing.", _FIX)
    values: dict[str, Any] = {}
    for key in _KEYS:
        value = record.get(key)
        if value is not None:
            values[key] = _read_value(key, value, place)
    result = TensorRecord(**values)
    if result.min > result.max:
        raise DataError(f"{place} is damaged: min {result.min} is above max {result.max}.", _FIX)
    return result


def _read_value(key: str, value: Any, place: str) -> Any:
    if key == "shape":
        return str(value)
    number = as_number(value)
    if math.isnan(number):
        raise _damaged(f"{place}.{key}", value, "a number")
    if key in ("std", "b", "total_numel") and number < 0:
        raise _damaged(f"{place}.{key}", value, "a number of at least 0")
    return int(number) if key == "total_numel" else number


def _damaged(place: str, value: Any, expected: str) -> DataError:
    return DataError(f"{place} is {describe_value(value)}; expected {expected}.", _FIX)
