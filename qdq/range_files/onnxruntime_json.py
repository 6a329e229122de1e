"""ONNX Runtime's ranges as JSON: `save_tensors_data`, `quantize_static(calibration_cache_path=...)` and the
`calibration.json` of `write_calibration_table`.

The lowest and highest value of each activation, as arrays that name their class (`CLS`) and type. With a plain
dictionary, `write_calibration_table` omits the outer object; early releases wrote pairs `[lowest, highest]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.range_files.entry import Entry, entry_of_bounds, malformed, number_array, object_of
from qdq.range_files.format import Row, parse_json


def recognize(content: bytes) -> bool:
    """Whether the content is JSON with ONNX Runtime's classes, or a dictionary of pairs.

    A truncated file is recognized by its classes, so that `read` can say what is wrong with it.
    """
    if b'"TensorsData"' in content or b'"TensorData"' in content:  # also if it is truncated
        return True
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and any(map(_is_pair, data.values()))


def read(content: bytes) -> dict[str, Entry]:
    """The entries by tensor name.

    Raises:
        CalibrationError: Another structure.
    """
    data = object_of("the file", parse_json(content))
    if data.get("CLS") == "TensorsData":
        data = object_of("data", data.get("data"))
    return {name: _read_entry(name, value) for name, value in data.items()}


def _read_entry(name: str, value: Any) -> Entry:
    """The range between the lowest and the highest value of a tensor.

    Args:
        name: The tensor.
        value: A pair, or an object with the two arrays.

    Raises:
        CalibrationError: Another structure.
    """
    if _is_pair(value):
        low, high = (number_array(name, bound).reshape(()) for bound in value)
        return entry_of_bounds(low, high)
    fields = object_of(name, value)
    if "lowest" not in fields or "highest" not in fields:
        return Entry(problem="the file has its distribution, but no lowest and highest value")
    low = _read_array(f"{name}, lowest", fields["lowest"])
    high = _read_array(f"{name}, highest", fields["highest"])
    if low.shape != high.shape:
        raise malformed(
            name,
            f"{low.size} lowest and {high.size} highest values do not match",
        )
    return entry_of_bounds(low, high)


def _read_array(place: str, value: Any) -> npt.NDArray[np.float64]:
    """An array; a single element becomes a scalar.

    Args:
        place: Its position in the file, for messages.
        value: An object with the key "data", or the data itself.

    Raises:
        CalibrationError: It contains something other than numbers.
    """
    data = value.get("data") if isinstance(value, dict) else value
    if isinstance(data, list):
        data = _flatten(data)
    array = number_array(place, data)
    return array.reshape(()) if array.size == 1 else array


def _flatten(values: list[Any]) -> list[Any]:
    """A flat list of all numbers.

    Bounds of channels are nested as deeply as the tensor has dimensions.
    """
    while values and all(isinstance(value, list) for value in values):
        values = list(chain.from_iterable(values))
    return values


def _is_pair(value: Any) -> bool:
    """Whether a value is `[lowest, highest]`, two numbers."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(item, int | float) for item in value)


def write(rows: Sequence[Row]) -> str:
    """The content of a file, which `onnxruntime.quantization.load_tensors_data` reads."""
    tensors = {}
    for row in rows:
        tensors[row.tensor] = {
            "lowest": _write_array(-row.amax),
            "highest": _write_array(row.amax),
            "CLS": "TensorData",
        }
    document = {
        "CLS": "TensorsData",
        "data": tensors,
        "calibration_method": {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"},
        "smooth_quant": False,
    }
    return json.dumps(document, indent=1) + "\n"


def _write_array(values: npt.NDArray[np.float32]) -> dict[str, Any]:
    """An array in ONNX Runtime's form."""
    return {"data": values.tolist(), "dtype": str(values.dtype), "CLS": "numpy.array"}
