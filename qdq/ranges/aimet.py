"""AIMET's encodings: JSON of versions 0.4 to 2.0.0, tensors or torch modules by name.

0.6.1 is a dictionary of tensors, or of modules with `input` and `output` (the `_torch.encodings` file); 1.0.0 a list
with `bw`, `is_sym` and `enc_type`; 2.0.0 has the words of QuantizeLinear. Up to 1.0.0 the offset is the negative of an
unsigned zero point: `value = (code + offset) * scale` with codes from 0, and -128 says symmetric int8.
Source: the encoding format specification in AIMET's documentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qdq.ranges.entry import Entry, add_entry, entry_of_codes, malformed, number_array, object_of
from qdq.ranges.format import Row, parse_json

_SECTIONS = ("activation_encodings", "param_encodings", "encodings")
MODULE_INPUT, MODULE_OUTPUT = "{}.input.0", "{}.output.0"
"""What the entries of a torch module's tensors are called here."""


def recognize(content: bytes) -> bool:
    """Whether one of the sections stands in it."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(
        f'"{section}"'.encode() in content for section in _SECTIONS
    )


def read(content: bytes) -> dict[str, Entry]:
    """The entries by tensor name; those of torch modules as "MODULE.input.0" and "MODULE.output.0".

    Raises:
        CalibrationError: Another structure, or an encoding that is none.
    """
    data = object_of("the file", parse_json(content))
    entries: dict[str, Entry] = {}
    for section in _SECTIONS:
        for name, encoding in _named(section, data.get(section, {})):
            place = f"{section}, {name}"
            add_entry(entries, name, _read_encoding(place, encoding), place)
    return entries


def _named(section: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a section with its encoding."""
    if isinstance(content, list):
        for number, encoding in enumerate(content):
            name = object_of(f"{section}[{number}]", encoding).get("name")
            if not isinstance(name, str):
                raise malformed(f"{section}[{number}]", "it has no name")
            yield name, encoding
        return
    for name, encoding in object_of(section, content).items():
        if not isinstance(encoding, dict) or "scale" in encoding:
            yield name, encoding
            continue
        for side in ("input", "output"):  # of a torch module
            for index, inner in object_of(f"{section}, {name}.{side}", encoding.get(side, {})).items():
                yield f"{name}.{side}.{index}", inner


def _read_encoding(place: str, encoding: Any) -> Entry:
    if isinstance(encoding, list):
        return _read_list(place, [object_of(place, one) for one in encoding])
    fields = object_of(place, encoding)
    if "y_scale" in fields:
        return _read_version_2(place, fields)
    if "bw" in fields:
        return _read_version_1(place, fields)
    return _read_list(place, [fields])


def _read_list(place: str, encodings: Sequence[Any]) -> Entry:
    """Versions up to 0.6.1: an encoding for the tensor, or one for each channel."""
    if not encodings:
        raise malformed(place, "an encoding is expected, found an empty list")
    if any(str(one.get("dtype", "int")).lower() != "int" for one in encodings):
        return Entry(problem="it is encoded as floating point, which has no range")
    widths = {_bits(place, one.get("bitwidth")) for one in encodings}
    if len(widths) > 1:
        raise malformed(place, "its channels differ in bitwidth")
    scales = [_required(place, one, "scale") for one in encodings]
    offsets = [_required(place, one, "offset") for one in encodings]
    return _entry(place, scales, offsets, widths.pop())


def _read_version_1(place: str, fields: Any) -> Entry:
    if str(fields.get("dtype", "INT")).upper() != "INT":
        return Entry(problem="it is encoded as floating point, which has no range")
    kind = fields.get("enc_type", "PER_TENSOR")
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        return Entry(problem=f"it is encoded {kind}: a quantizer has one range, or one a channel")
    return _entry(
        place, _required(place, fields, "scale"), _required(place, fields, "offset"), _bits(place, fields.get("bw"))
    )


def _read_version_2(place: str, fields: Any) -> Entry:
    match = re.fullmatch(r"(u?)int(\d+)", str(fields.get("output_dtype")))
    if match is None:
        return Entry(problem=f"it is encoded as {fields.get('output_dtype')}, which has no range")
    if "block_size" in fields or any(isinstance(item, list) for item in _as_list(fields["y_scale"])):
        return Entry(problem="it is encoded in blocks: a quantizer has one range, or one a channel")
    bits = _bits(place, int(match[2]))
    scale = _squeeze(number_array(place, fields["y_scale"]))
    zero_point = number_array(place, fields.get("y_zero_point", 0))
    qmin = 0 if match[1] else -(2 ** (bits - 1))
    axis = fields.get("axis") if scale.ndim else None
    if axis is not None and not isinstance(axis, int):
        raise malformed(place, f"its axis is {axis!r}; a number is expected")
    zeros = _fitting(place, scale, zero_point)
    return entry_of_codes(place, scale, zeros, qmin, qmin + 2**bits - 1, axis)


def _entry(place: str, scales: Any, offsets: Any, bits: int) -> Entry:
    scale = _squeeze(number_array(place, scales))
    offset = _fitting(place, scale, number_array(place, offsets))
    half = 2 ** (bits - 1)
    if np.all(offset == 1 - half):  # strictly symmetric: -127 to 127
        return entry_of_codes(place, scale.astype(np.float32), np.zeros(()), -half, half - 1)
    return entry_of_codes(place, scale.astype(np.float32), -offset, 0, 2 * half - 1)


def _required(place: str, fields: Any, key: str) -> Any:
    if key not in fields:
        raise malformed(place, f"it has no {key}")
    return fields[key]


def _bits(place: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 32:
        raise malformed(place, f"its bitwidth is {value!r}; 2 to 32 is expected")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _squeeze(values: Any) -> Any:
    """A list of one is a scalar."""
    return (values.reshape(()) if values.size == 1 else values).astype(np.float32)


def _fitting(place: str, scale: Any, offset: Any) -> Any:
    if offset.size not in (1, scale.size):
        raise malformed(place, f"{scale.size} scales and {offset.size} offsets do not belong together")
    return offset.reshape(()) if offset.size == 1 else offset


def write_1_0_0(rows: Sequence[Row]) -> str:
    """Version 1.0.0, tensors by name."""
    document = {
        "version": "1.0.0",
        "activation_encodings": [_write_version_1(row) for row in rows if not row.is_weight],
        "param_encodings": [_write_version_1(row) for row in rows if row.is_weight],
    }
    return json.dumps(document, indent=1) + "\n"


def write_0_6_1(rows: Sequence[Row]) -> str:
    """Version 0.6.1; a row called "MODULE.input.0" is written as the input of a torch module."""
    activations: dict[str, Any] = {}
    for row in rows:
        if row.is_weight:
            continue
        if module := re.fullmatch(re.escape(MODULE_INPUT).replace(r"\{\}", "(.*)"), row.tensor):
            activations[module[1]] = {"input": {"0": _write_channels(row)[0]}}
        else:
            activations[row.tensor] = _write_channels(row)
    document = {
        "version": "0.6.1",
        "activation_encodings": activations,
        "param_encodings": {row.tensor: _write_channels(row) for row in rows if row.is_weight},
    }
    return json.dumps(document, indent=1) + "\n"


def _write_version_1(row: Row) -> dict[str, Any]:
    scales = row.scale.reshape(-1)
    return {
        "name": row.tensor,
        "dtype": "INT",
        "enc_type": "PER_TENSOR" if row.axis is None else "PER_CHANNEL",
        "bw": row.format.num_bits,
        "is_sym": True,
        "scale": scales.tolist(),
        "offset": [float(_offset(row))] * scales.size,
    }


def _write_channels(row: Row) -> list[dict[str, Any]]:
    offset, steps = _offset(row), 2**row.format.num_bits - 1
    return [
        {
            "bitwidth": row.format.num_bits,
            "dtype": "int",
            "is_symmetric": "True",
            "max": (steps + offset) * scale,
            "min": offset * scale,
            "offset": offset,
            "scale": scale,
        }
        for scale in row.scale.reshape(-1).tolist()
    ]


def _offset(row: Row) -> int:
    """Of the smallest code, which is stored as 0."""
    return row.format.qmin
