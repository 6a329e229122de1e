"""ONNX Runtime's ranges as JSON: `save_tensors_data`, `quantize_static(calibration_cache_path=...)` and the
`calibration.json` of `write_calibration_table`.

Lowest and highest value of each activation, as arrays that name their class (`CLS`) and type. `write_calibration_table`
given a plain dictionary leaves the outer object out; early releases wrote pairs `[lowest, highest]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.range_files.entry import Entry, entry_of_bounds, malformed, number_array, object_of
from qdq.range_files.format import Row, parse_json


def recognize(content: bytes) -> bool:
    """Whether it is JSON with ONNX Runtime's classes, or a dictionary of pairs."""
    if b'"TensorsData"' in content or b'"TensorData"' in content:  # though it be cut off
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


def write(rows: Sequence[Row]) -> str:
    """The file, which `onnxruntime.quantization.load_tensors_data` reads."""
    tensors = {
        row.tensor: {"lowest": _array(-row.amax), "highest": _array(row.amax), "CLS": "TensorData"}
        for row in rows
    }
    method = {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"}
    document = {
        "CLS": "TensorsData",
        "data": tensors,
        "calibration_method": method,
        "smooth_quant": False,
    }
    return json.dumps(document, indent=1) + "\n"


def _read_entry(name: str, value: Any) -> Entry:
    if _is_pair(value):
        bounds = [number_array(name, bound).reshape(()) for bound in value]
    else:
        fields = object_of(name, value)
        if "lowest" not in fields or "highest" not in fields:
            return Entry(problem="the file has its distribution, but no lowest and highest value")
        bounds = [_read_array(f"{name}, {key}", fields[key]) for key in ("lowest", "highest")]
    if bounds[0].shape != bounds[1].shape:
        raise malformed(
            name,
            f"{bounds[0].size} lowest and {bounds[1].size} highest values do not belong together",
        )
    return entry_of_bounds(*bounds)


def _read_array(place: str, value: Any) -> npt.NDArray[np.float64]:
    """An array; one of a single element is a scalar."""
    data = value.get("data") if isinstance(value, dict) else value
    if isinstance(data, list):
        data = _flatten(data)
    array = number_array(place, data)
    return array.reshape(()) if array.size == 1 else array


def _flatten(values: list[Any]) -> list[Any]:
    """Per-channel bounds are nested as deep as the tensor has dimensions."""
    while len(values) and all(isinstance(value, list) for value in values):
        values = [item for value in values for item in value]
    return values


def _array(values: npt.NDArray[np.float32]) -> dict[str, Any]:
    return {"data": values.tolist(), "dtype": str(values.dtype), "CLS": "numpy.array"}


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(item, int | float) for item in value)
    )
