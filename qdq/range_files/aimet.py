"""AIMET's encodings, which SNPE and QNN read and write too: JSON of versions 0.4 to 2.1.0, tensors or torch modules.

0.6.1 is a dictionary of tensors, or of modules with `input` and `output` (the `_torch.encodings` file); 1.0.0 a list
with `bw`, `is_sym` and `enc_type`; from 2.0.0 on an encoding has the words of QuantizeLinear. An encoding up to 1.0.0
has `min` and `max`, or `scale` and `offset`, or all four, which then must agree.

The offset is the negative of the zero point of unsigned codes, `value = (code + offset) * scale` with codes from 0, so
that it is never above 0; -128 says symmetric int8. Other tools write the zero point itself (AIMET for TensorFlow, where
it may be one too small) or count signed codes (QNN). `min` and `max` tell which it is. Without them a symmetric weight
with offset 0 has signed codes; a symmetric activation with offset 0 may have either, and is noted.
Source: the encoding format specification in AIMET's documentation, versions 0.4.0 to 2.1.0, and its examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.errors import CalibrationError
from qdq.range_files.entry import (
    Entry,
    add_entry,
    entry_of_bounds,
    entry_of_codes,
    malformed,
    number_array,
    object_of,
)
from qdq.range_files.format import Row, parse_json
from qdq.text import list_names

_SECTIONS = ("activation_encodings", "param_encodings", "encodings")
MODULE_INPUT, MODULE_OUTPUT = "{}.input.0", "{}.output.0"
"""What the entries of a torch module's tensors are called here."""

_Numbers = npt.NDArray[np.float64]
_SHOWN = 20  # contradictions in a message
_ROUNDING_STEPS = 1.01  # bounds may lie a step beside the codes: a range with 0 at a code, the zero point of TensorFlow
_ROUNDING_SPAN = 1e-3  # or be rounded for a person, who counts digits and not steps of 16 bit
_EXACT_STEPS = 0.05  # bounds that are those of symmetric codes, printed in float32


class _Contradiction(Exception):  # noqa: N818  # never leaves this file
    """An encoding whose numbers cannot all be true."""


@dataclass(frozen=True)
class _Codes:
    """How an offset is meant: `value = (code + sign * offset) * scale`, codes from `qmin` to `qmin + 2^bits - 1`."""

    qmin: int
    sign: int
    bits: int

    def bounds(self, scale: _Numbers, offset: _Numbers) -> tuple[_Numbers, _Numbers]:
        """The values of the smallest and the largest code."""
        low = (self.qmin + self.sign * offset) * scale
        return low, low + (2**self.bits - 1) * scale


def recognize(content: bytes) -> bool:
    """Whether one of the sections stands in it."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(
        f'"{section}"'.encode() in content for section in _SECTIONS
    )


def read(content: bytes) -> dict[str, Entry]:
    """The entries by tensor name; those of torch modules as "MODULE.input.0" and "MODULE.output.0".

    Raises:
        CalibrationError: Another structure, or encodings that contradict themselves, all of them.
    """
    data = object_of("the file", parse_json(content))
    entries: dict[str, Entry] = {}
    contradictions: list[str] = []
    for section in _SECTIONS:
        is_weight = section == "param_encodings"
        for name, encoding in _named(section, data.get(section, {})):
            place = f"{section}, {name}"
            try:
                add_entry(entries, name, _read_encoding(place, encoding, is_weight), place)
            except _Contradiction as error:
                contradictions.append(f"{name}: {error}")
    if contradictions:
        raise CalibrationError(
            f"{len(contradictions)} encodings contradict themselves: {list_names(contradictions, _SHOWN, '; ')}.",
            "write the file again with that tool; leave out min and max, or scale and offset, where only one of both "
            "was corrected by hand.",
        )
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
        if not isinstance(encoding, dict) or not {"input", "output"} & encoding.keys():
            yield name, encoding
            continue
        for side in ("input", "output"):  # of a torch module
            for index, inner in object_of(
                f"{section}, {name}.{side}", encoding.get(side, {})
            ).items():
                yield f"{name}.{side}.{index}", inner


def _read_encoding(place: str, encoding: Any, is_weight: bool) -> Entry:
    if isinstance(encoding, list):
        return _read_list(place, [object_of(place, channel) for channel in encoding], is_weight)
    fields = object_of(place, encoding)
    if "output_dtype" in fields or "y_scale" in fields:
        return _read_version_2(place, fields)
    if "bw" in fields:
        return _read_version_1(place, fields, is_weight)
    return _read_list(place, [fields], is_weight)


def _read_list(place: str, encodings: Sequence[Mapping[str, Any]], is_weight: bool) -> Entry:
    """Versions up to 0.6.1: an encoding for the tensor, or one for each channel."""
    if not encodings:
        raise malformed(place, "an encoding is expected, found an empty list")
    for fields in encodings:
        if problem := _other_than_integer(fields):
            return Entry(problem=problem)
    first = encodings[0]
    if any(fields.get("bitwidth") != first.get("bitwidth") for fields in encodings):
        raise malformed(place, "its channels differ in bitwidth")
    columns = {key: _column(place, encodings, key) for key in ("scale", "offset", "min", "max")}
    return _read_numbers(
        place, columns, first.get("bitwidth"), _truth(first.get("is_symmetric")), is_weight
    )


def _read_version_1(place: str, fields: Mapping[str, Any], is_weight: bool) -> Entry:
    if problem := _other_than_integer(fields):
        return Entry(problem=problem)
    kind = fields.get("enc_type", "PER_TENSOR")
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        return Entry(
            problem=f"it is encoded {kind!s:.20}: a quantizer has one range, or one a channel"
        )
    shift = fields.get("zero_point_shift")
    if shift is not None and np.any(number_array(place, shift)):
        return Entry(
            problem="its codes are shifted by a fraction of a step; those of a quantizer are not"
        )
    columns = {key: _column(place, [fields], key) for key in ("scale", "offset", "min", "max")}
    return _read_numbers(place, columns, fields["bw"], _truth(fields.get("is_sym")), is_weight)


def _read_version_2(place: str, fields: Mapping[str, Any]) -> Entry:
    dtype = fields.get("output_dtype")
    match = re.fullmatch(r"(u?)int(\d{1,2})", str(dtype))
    if match is None:
        return Entry(problem=f"it is encoded as {dtype!s:.20}, which has no range")
    scales = fields.get("y_scale")
    is_blocked = isinstance(scales, dict) or any(
        isinstance(item, list) for item in _as_list(scales)
    )
    if is_blocked or "block_size" in fields or "per_block_int_scale" in fields:
        return Entry(problem="it is encoded in blocks: a quantizer has one range, or one a channel")
    if scales is None:
        return Entry(problem="it has no numbers, only a type")
    codes = _Codes(0 if match[1] else -(2 ** (int(match[2]) - 1)), -1, _bits(place, int(match[2])))
    scale, zero_point = _pair_up(
        place, number_array(place, scales), number_array(place, fields.get("y_zero_point", 0))
    )
    qmax = codes.qmin + 2**codes.bits - 1
    if np.any((zero_point < codes.qmin) | (zero_point > qmax)):
        worst = zero_point.flat[np.argmax(np.abs(zero_point))]
        raise _Contradiction(
            f"its zero point {worst:g} is no {dtype}, which ends at {codes.qmin} and {qmax}"
        )
    axis = fields.get("axis") if scale.ndim else None
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise malformed(place, f"its axis is {axis!r:.40}; a number is expected")
    return entry_of_codes(scale, zero_point, codes.qmin, qmax, axis)


def _other_than_integer(fields: Mapping[str, Any]) -> str:
    """Why an encoding has no integer codes, "" if it has."""
    dtype = str(fields.get("dtype", "int")).lower()
    if "float" in dtype:
        return "it is encoded as floating point, which has no range"
    return "" if "int" in dtype else f"its type is {dtype:.20}, which is none of integers"


def _column(place: str, encodings: Sequence[Mapping[str, Any]], key: str) -> _Numbers | None:
    """What all channels say under a key: 0-D or one number a channel; None where none says anything."""
    values = [fields.get(key) for fields in encodings]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise malformed(place, f"only some of its channels have a {key}")
    array = number_array(place, values[0] if len(values) == 1 else values)
    return array.reshape(()) if array.size == 1 else array


def _read_numbers(
    place: str,
    columns: Mapping[str, _Numbers | None],
    bits: Any,
    is_symmetric: bool,
    is_weight: bool,
) -> Entry:
    """The range of `scale` and `offset`, of `min` and `max`, or of all four."""
    scale, offset, low, high = (columns[key] for key in ("scale", "offset", "min", "max"))
    for some, other, names in ((scale, offset, ("scale", "offset")), (low, high, ("min", "max"))):
        if (some is None) != (other is None):
            absent, present = names if some is None else names[::-1]
            raise malformed(place, f"it has no {absent}, but a {present}")
    if scale is not None and offset is not None:
        scale, offset = _pair_up(place, scale, offset)
        width = _bits(place, bits)
        if low is None or high is None:
            return _read_codes(scale, offset, width, is_symmetric, is_weight)
        _pair_up(place, scale, low)
        return _read_both(scale, offset, *_pair_up(place, low, high), width)
    if low is None or high is None:
        return Entry(problem="it has no numbers, only a type")
    return entry_of_bounds(*_pair_up(place, low, high))


def _read_codes(
    scale: _Numbers, offset: _Numbers, bits: int, is_symmetric: bool, is_weight: bool
) -> Entry:
    """The range of codes where nothing but the sign of the offset says how it is meant.

    Raises:
        _Contradiction: No code is 0 with such an offset.
    """
    half, steps = 2 ** (bits - 1), 2**bits - 1
    if is_symmetric and np.all(offset == 1 - half):  # strictly symmetric: -127 to 127
        return entry_of_codes(scale, 0, -half, half - 1)
    if is_symmetric and np.all(offset == 0):
        if is_weight:  # both signs: the codes are signed, as QNN writes them
            return entry_of_codes(scale, 0, -half, half - 1)
        meaning = (
            "its symmetric codes with offset 0 were taken for unsigned; "
            "if they are signed, the range is half of it"
        )
        return _add_note(entry_of_codes(scale, 0, 0, steps), meaning)
    if np.all((offset >= -steps) & (offset <= 0)):
        return entry_of_codes(scale, -offset, 0, steps)
    if np.all((offset >= 0) & (offset <= steps)):
        return _add_note(
            entry_of_codes(scale, offset, 0, steps),
            "its positive offset was taken for a zero point",
        )
    if not np.isfinite(offset).all():
        return entry_of_codes(scale, offset, 0, steps)  # says so
    outside = offset.flat[np.argmax(np.abs(offset))]
    if np.abs(outside) <= steps:
        raise _Contradiction(
            f"its offsets have both signs, {np.min(offset):g} and {np.max(offset):g}"
        )
    raise _Contradiction(
        f"its offset is {outside:g}; with {bits} bit it lies between {-steps} and 0, or is a zero point up to {steps}"
    )


def _add_note(entry: Entry, note: str) -> Entry:
    return replace(entry, note=f"{entry.note}; {note}" if entry.note else note)


def _read_both(
    scale: _Numbers, offset: _Numbers, low: _Numbers, high: _Numbers, bits: int
) -> Entry:
    """The range where both ways to say it are there: of the bounds, and exactly that of symmetric codes.

    Raises:
        _Contradiction: The bounds are those of no codes with such scale and offset.
    """
    entry = entry_of_bounds(low, high)
    if not np.isfinite([scale, np.broadcast_to(offset, scale.shape)]).all() or np.any(scale < 0):
        return entry_of_codes(scale, offset, 0, 2**bits - 1)  # says what is wrong with the scale
    if entry.is_damaged:
        return entry
    tolerance = np.maximum(_ROUNDING_STEPS * scale, _ROUNDING_SPAN * (high - low))
    distance, nearest = min(
        (
            (_distance(codes.bounds(scale, offset), low, high, tolerance), codes)
            for codes in _list_codes(bits)
        ),
        key=lambda pair: pair[0],
    )
    if distance > 1:
        first, last = nearest.bounds(scale, offset)
        raise _Contradiction(
            f"min and max are {_format(low)} to {_format(high)}, scale {_format(scale)} and offset {_format(offset)} "
            f"say {_format(first)} to {_format(last)}"
        )
    half = 2 ** (bits - 1)
    is_narrow = np.abs(low + high) <= _EXACT_STEPS * scale
    is_full = np.abs(low + half * scale) <= _EXACT_STEPS * scale
    if np.all((is_narrow | is_full) & (np.abs(high - (half - 1) * scale) <= _EXACT_STEPS * scale)):
        return entry_of_codes(scale, 0, -half, half - 1)
    return entry


def _list_codes(bits: int) -> list[_Codes]:
    """Every way in which tools mean an offset, AIMET's own first."""
    half = 2 ** (bits - 1)
    return [_Codes(qmin, sign, bits) for qmin in (0, -half) for sign in (1, -1)]


def _distance(
    bounds: tuple[_Numbers, _Numbers], low: _Numbers, high: _Numbers, tolerance: _Numbers
) -> float:
    """How far bounds lie apart in units of what rounding explains, in the worst channel."""
    apart = np.maximum(np.abs(bounds[0] - low), np.abs(bounds[1] - high))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(np.max(np.where(apart <= tolerance, 0.0, apart / tolerance)))


def _format(values: _Numbers) -> str:
    """The number, or the first of several."""
    return f"{values.flat[0]:.6g}" if values.ndim == 0 else f"[{values.flat[0]:.6g}, ...]"


def _truth(value: Any) -> bool:
    """`True` or the text "True", which versions up to 0.6.1 have."""
    return str(value).lower() == "true"


def _bits(place: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 32:
        raise malformed(place, f"its bitwidth is {value!r:.40}; 2 to 32 is expected")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _pair_up(place: str, values: _Numbers, others: _Numbers) -> tuple[_Numbers, _Numbers]:
    """A number for each channel of both, 0-D where there is one channel."""
    if values.size == 1:
        values = values.reshape(())
    if others.size == 1:
        others = np.broadcast_to(others.reshape(()), values.shape)
    if values.shape != others.shape:
        raise malformed(
            place, f"{values.size} and {others.size} of its numbers do not belong together"
        )
    return values, others


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
