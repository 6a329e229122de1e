"""AIMET's encodings, which SNPE and QNN read and write too: JSON of versions 0.4 to 2.1.0, tensors or torch modules.

0.6.1 is a dictionary of tensors, or of modules with `input` and `output` (the `_torch.encodings` file); 1.0.0 a list
with `bw`, `is_sym` and `enc_type`; from 2.0.0 on an encoding has the terms of QuantizeLinear. An encoding up to 1.0.0
has `min` and `max`, or `scale` and `offset`, or all four, which must then agree.

The offset is the negative of the zero point of unsigned codes, `value = (code + offset) * scale` with codes from 0, so
it is never above 0; -128 means symmetric int8. Other tools write the zero point itself (AIMET for TensorFlow, where it
may be one too small) or count signed codes (QNN). `min` and `max` tell which one it is. Without them a symmetric weight
with offset 0 has signed codes; a symmetric activation with offset 0 may have either, so it gets a note. Source: the
encoding format specification in AIMET's documentation, versions 0.4.0 to 2.1.0, and its examples.
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
"""Names of the entries for the tensors of a torch module."""

_Numbers = npt.NDArray[np.float64]
_MOST_LISTED = 20  # contradictions in a message
_ROUNDING_STEPS = 1.01  # bounds may be a step off: a range shifted so that 0 is a code, the zero point of TensorFlow
_ROUNDING_SPAN = (
    1e-3  # or be rounded to a few digits for display, which can be more than a step of 16 bit
)
_EXACT_STEPS = 0.05  # tolerance for bounds of symmetric codes that were printed in float32


class _Contradiction(Exception):  # noqa: N818  # never leaves this file
    """An encoding whose numbers contradict each other."""


@dataclass(frozen=True)
class _Codes:
    """One meaning of an offset: `value = (code + sign * offset) * scale`, codes from `qmin` to `qmin + 2^bits - 1`.

    Args:
        qmin: The smallest code.
        sign: 1 or -1.
        bits: Width of a code.
    """

    qmin: int
    sign: int
    bits: int

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + (1 << self.bits) - 1

    def bounds(self, scale: _Numbers, offset: _Numbers) -> tuple[_Numbers, _Numbers]:
        """The values of the smallest and the largest code."""
        low = (self.qmin + self.sign * offset) * scale
        return low, low + (2**self.bits - 1) * scale


@dataclass(frozen=True)
class _Columns:
    """The numbers of an encoding: 0-D or one per channel; None if the file has none.

    Args:
        scale: Difference between the values of two codes.
        offset: See the top of this file.
        low: The smallest value, "min" in the file.
        high: The largest value, "max" in the file.
    """

    scale: _Numbers | None
    offset: _Numbers | None
    low: _Numbers | None
    high: _Numbers | None


@dataclass(frozen=True)
class _Traits:
    """The facts about an encoding that are not numbers of its range.

    Args:
        bits: Width of a code, as in the file.
        is_symmetric: Whether the file says that the range is symmetric.
        is_weight: Whether the tensor is a weight.
    """

    bits: Any
    is_symmetric: bool
    is_weight: bool


# -- reading ---------------------------------------------------------------------------------------------------------


def recognize(content: bytes) -> bool:
    """Whether the content is a JSON object with one of the sections."""
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    return any(f'"{section}"'.encode() in content for section in _SECTIONS)


def read(content: bytes) -> dict[str, Entry]:
    """The entries by tensor name; those of torch modules as "MODULE.input.0" and "MODULE.output.0".

    Raises:
        CalibrationError: Another structure, or contradictory encodings; the message lists them.
    """
    data = object_of("the file", parse_json(content))
    entries: dict[str, Entry] = {}
    contradictions: list[str] = []
    for section in _SECTIONS:
        is_weight = section == "param_encodings"
        for name, encoding in _named_encodings(section, data.get(section, {})):
            place = f"{section}, {name}"
            try:
                entry = _read_encoding(place, encoding, is_weight)
            except _Contradiction as error:
                contradictions.append(f"{name}: {error}")
            else:
                add_entry(entries, name, entry, place)
    if contradictions:
        texts = list_names(contradictions, _MOST_LISTED, "; ")
        raise CalibrationError(
            f"{len(contradictions)} encodings are contradictory: {texts}.",
            "write the file again with that tool; leave out min and max, or scale and offset, where only one pair "
            "was corrected by hand.",
        )
    return entries


def _named_encodings(section: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a section with its encoding.

    Args:
        section: Name of the section.
        content: A list of encodings that have a name, or an object of encodings by name.

    Raises:
        CalibrationError: Another structure.
    """
    if isinstance(content, list):
        for number, encoding in enumerate(content):
            place = f"{section}[{number}]"
            name = object_of(place, encoding).get("name")
            if not isinstance(name, str):
                raise malformed(place, "it has no name")
            yield name, encoding
        return
    for name, encoding in object_of(section, content).items():
        if isinstance(encoding, dict) and {"input", "output"} & encoding.keys():
            yield from _module_encodings(f"{section}, {name}", name, encoding)
        else:
            yield name, encoding


def _module_encodings(
    place: str, module: str, encoding: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The inputs and outputs of a torch module with their encodings.

    Args:
        place: The module's position in the file, for messages.
        module: Dotted name.
        encoding: An object with the keys "input" and "output", or one of them.

    Raises:
        CalibrationError: Another structure.
    """
    for side in ("input", "output"):
        tensors = object_of(f"{place}.{side}", encoding.get(side, {}))
        for index, tensor_encoding in tensors.items():
            yield f"{module}.{side}.{index}", tensor_encoding


def _read_encoding(place: str, encoding: Any, is_weight: bool) -> Entry:
    """The range of one tensor, in any of the versions.

    Args:
        place: The tensor's position in the file, for messages.
        encoding: An object, or a list of one object for each channel.
        is_weight: Whether the tensor is a weight.

    Raises:
        CalibrationError: Another structure.
        _Contradiction: The numbers contradict each other.
    """
    if isinstance(encoding, list):
        channels = [object_of(place, channel) for channel in encoding]
        return _read_list(place, channels, is_weight)
    fields = object_of(place, encoding)
    if "output_dtype" in fields or "y_scale" in fields:
        return _read_version_2(place, fields)
    if "bw" in fields:
        return _read_version_1(place, fields, is_weight)
    return _read_list(place, [fields], is_weight)


def _read_list(place: str, encodings: Sequence[Mapping[str, Any]], is_weight: bool) -> Entry:
    """Versions up to 0.6.1: an encoding for the tensor, or one for each channel; see `_read_encoding`."""
    if not encodings:
        raise malformed(place, "expected an encoding, found an empty list")
    for fields in encodings:
        problem = _reason_against_codes(fields)
        if problem:
            return Entry(problem=problem)
    bits = encodings[0].get("bitwidth")
    if any(fields.get("bitwidth") != bits for fields in encodings):
        raise malformed(place, "its channels differ in bitwidth")
    is_symmetric = _is_true(encodings[0].get("is_symmetric"))
    traits = _Traits(bits, is_symmetric, is_weight)
    return _read_numbers(place, _read_columns(place, encodings), traits)


def _read_version_1(place: str, fields: Mapping[str, Any], is_weight: bool) -> Entry:
    """Version 1.0.0: one object with the numbers of all channels; see `_read_encoding`."""
    problem = _reason_against_codes(fields)
    if problem:
        return Entry(problem=problem)
    kind = fields.get("enc_type", "PER_TENSOR")
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        return Entry(
            problem=f"it is encoded {kind!s:.20}: a quantizer has one range, or one per channel"
        )
    shift = fields.get("zero_point_shift")
    if shift is not None and np.any(number_array(place, shift)):
        return Entry(
            problem="its codes are shifted by a fraction of a step, which a quantizer does not do"
        )
    traits = _Traits(fields["bw"], _is_true(fields.get("is_sym")), is_weight)
    return _read_numbers(place, _read_columns(place, [fields]), traits)


def _read_version_2(place: str, fields: Mapping[str, Any]) -> Entry:
    """Versions from 2.0.0 on: the terms of QuantizeLinear; see `_read_encoding`.

    The zero point is a code, signed or unsigned according to the type.
    """
    dtype = fields.get("output_dtype")
    match = re.fullmatch(r"(u?)int(\d{1,2})", str(dtype))
    if match is None:
        return Entry(problem=f"it is encoded as {dtype!s:.20}, which has no range")
    if _is_in_blocks(fields):
        return Entry(
            problem="it is encoded in blocks: a quantizer has one range, or one per channel"
        )
    if fields.get("y_scale") is None:
        return Entry(problem="it has no numbers, only a type")

    half = 2 ** (int(match[2]) - 1)
    codes = _Codes(qmin=0 if match[1] else -half, sign=-1, bits=_read_bits(place, int(match[2])))
    scale = number_array(place, fields["y_scale"])
    zero_point = number_array(place, fields.get("y_zero_point", 0))
    scale, zero_point = _pair_up(place, scale, zero_point)
    _require_code(zero_point, codes, dtype)
    axis = fields.get("axis") if scale.ndim else None
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise malformed(place, f"its axis is {axis!r:.40}; expected a number")
    return entry_of_codes(scale, zero_point, codes.qmin, codes.qmax, axis)


def _is_in_blocks(fields: Mapping[str, Any]) -> bool:
    """Whether an encoding of version 2 has a scale for each block of a channel.

    Args:
        fields: The encoding.
    """
    if "block_size" in fields or "per_block_int_scale" in fields:
        return True
    scales = fields.get("y_scale")
    if isinstance(scales, list):
        return any(isinstance(scale, list) for scale in scales)
    return isinstance(scales, dict)


def _require_code(zero_point: _Numbers, codes: _Codes, dtype: Any) -> None:
    """Refuse a zero point that is not a code.

    Args:
        zero_point: 0-D or one per channel.
        codes: The codes of the type.
        dtype: The type in the file, for the message.

    Raises:
        _Contradiction: It is outside the range of codes.
    """
    if np.any((zero_point < codes.qmin) | (zero_point > codes.qmax)):
        worst = zero_point.flat[np.argmax(np.abs(zero_point))]
        raise _Contradiction(
            f"its zero point {worst:g} is not a code of {dtype}, {codes.qmin} to {codes.qmax}"
        )


def _reason_against_codes(fields: Mapping[str, Any]) -> str:
    """Why an encoding has no integer codes, "" if it has."""
    dtype = str(fields.get("dtype", "int")).lower()
    if "float" in dtype:
        return "it is encoded as floating point, which has no range"
    if "int" not in dtype:
        return f"its type is {dtype:.20}, which is not an integer type"
    return ""


def _read_columns(place: str, encodings: Sequence[Mapping[str, Any]]) -> _Columns:
    """The numbers of an encoding, of all its channels.

    Args:
        place: The tensor's position in the file, for messages.
        encodings: One object for each channel, or one object with lists.

    Raises:
        CalibrationError: As for `_read_column`.
    """
    return _Columns(
        scale=_read_column(place, encodings, "scale"),
        offset=_read_column(place, encodings, "offset"),
        low=_read_column(place, encodings, "min"),
        high=_read_column(place, encodings, "max"),
    )


def _read_column(place: str, encodings: Sequence[Mapping[str, Any]], key: str) -> _Numbers | None:
    """The numbers of all channels under one key.

    Args:
        place: The tensor's position in the file, for messages.
        encodings: As for `_read_columns`.
        key: The key.

    Returns:
        0-D or one number per channel; None if no channel has the key.

    Raises:
        CalibrationError: Only some channels have the key, or a value is not a number.
    """
    values = [fields.get(key) for fields in encodings]
    if values.count(None) == len(values):
        return None
    if None in values:
        raise malformed(place, f"only some of its channels have a {key}")
    array = number_array(place, values[0] if len(values) == 1 else values)
    return array.reshape(()) if array.size == 1 else array


def _read_numbers(place: str, columns: _Columns, traits: _Traits) -> Entry:
    """The range of `scale` and `offset`, of `min` and `max`, or of all four.

    Args:
        place: The tensor's position in the file, for messages.
        columns: The numbers.
        traits: The other facts.

    Raises:
        CalibrationError: A number is missing, or columns have different lengths.
        _Contradiction: The numbers contradict each other.
    """
    scale, offset, low, high = columns.scale, columns.offset, columns.low, columns.high
    _require_both(place, scale, offset, ("scale", "offset"))
    _require_both(place, low, high, ("min", "max"))
    if scale is not None and offset is not None:
        scale, offset = _pair_up(place, scale, offset)
        bits = _read_bits(place, traits.bits)
        if low is None or high is None:
            return _read_codes(scale, offset, bits, traits)
        _pair_up(place, scale, low)
        low, high = _pair_up(place, low, high)
        return _read_codes_and_bounds(scale, offset, low, high, bits)
    if low is None or high is None:
        return Entry(problem="it has no numbers, only a type")
    low, high = _pair_up(place, low, high)
    return entry_of_bounds(low, high)


def _require_both(
    place: str, first: _Numbers | None, second: _Numbers | None, names: tuple[str, str]
) -> None:
    """Refuse one of two columns without the other.

    Args:
        place: The tensor's position in the file, for messages.
        first: A column.
        second: The column that belongs to it.
        names: Their names in the file.

    Raises:
        CalibrationError: Exactly one of the two is present.
    """
    if first is None and second is not None:
        raise malformed(place, f"it has no {names[0]}, but a {names[1]}")
    if first is not None and second is None:
        raise malformed(place, f"it has no {names[1]}, but a {names[0]}")


def _read_codes(scale: _Numbers, offset: _Numbers, bits: int, traits: _Traits) -> Entry:
    """The range of codes if only the sign of the offset shows its meaning.

    Args:
        scale: 0-D or one per channel.
        offset: Of the same shape.
        bits: Width of a code.
        traits: Whether the range is symmetric, and of a weight.

    Raises:
        _Contradiction: No code is 0 with such an offset.
    """
    half = 2 ** (bits - 1)
    steps = 2**bits - 1
    if traits.is_symmetric and np.all(offset == 1 - half):  # strictly symmetric: -127 to 127
        return entry_of_codes(scale, 0, -half, half - 1)
    if traits.is_symmetric and np.all(offset == 0):
        if traits.is_weight:  # both signs: the codes are signed, as in files of QNN
            return entry_of_codes(scale, 0, -half, half - 1)
        return _add_note(
            entry_of_codes(scale, 0, 0, steps),
            "its symmetric codes with offset 0 are read as unsigned; "
            "if they are signed, the range is half of it",
        )
    if np.all((offset >= -steps) & (offset <= 0)):
        return entry_of_codes(scale, -offset, 0, steps)
    if np.all((offset >= 0) & (offset <= steps)):
        return _add_note(
            entry_of_codes(scale, offset, 0, steps),
            "its positive offset is read as a zero point",
        )
    if not np.isfinite(offset).all():
        return entry_of_codes(scale, offset, 0, steps)  # the message names the offset
    raise _Contradiction(_describe_offset(offset, bits))


def _describe_offset(offset: _Numbers, bits: int) -> str:
    """The reason why no code is 0 with such an offset."""
    steps = 2**bits - 1
    outermost = offset.flat[np.argmax(np.abs(offset))]
    if np.abs(outermost) <= steps:
        return f"its offsets have both signs, {np.min(offset):g} and {np.max(offset):g}"
    return (
        f"its offset is {outermost:g}; with {bits} bit it must be between {-steps} and 0, "
        f"or a zero point up to {steps}"
    )


def _add_note(entry: Entry, note: str) -> Entry:
    """The entry with one more note."""
    return replace(entry, note=f"{entry.note}; {note}" if entry.note else note)


def _read_codes_and_bounds(
    scale: _Numbers, offset: _Numbers, low: _Numbers, high: _Numbers, bits: int
) -> Entry:
    """The range of the bounds, made exact if they are those of symmetric codes.

    Args:
        scale: 0-D or one per channel.
        offset: Of the same shape.
        low: Of the same shape.
        high: Of the same shape.
        bits: Width of a code.

    Raises:
        _Contradiction: No meaning of scale and offset gives these bounds.
    """
    entry = entry_of_bounds(low, high)
    is_finite = np.isfinite(scale).all() and np.isfinite(offset).all()
    if not is_finite or np.any(scale < 0):
        return entry_of_codes(scale, offset, 0, 2**bits - 1)  # the message names the scale
    if entry.is_damaged:
        return entry
    _require_agreement(scale, offset, low, high, bits)

    half = 2 ** (bits - 1)
    tolerance = _EXACT_STEPS * scale
    is_narrow = np.abs(low + high) <= tolerance
    is_full = np.abs(low + half * scale) <= tolerance
    ends_at_qmax = np.abs(high - (half - 1) * scale) <= tolerance
    if np.all((is_narrow | is_full) & ends_at_qmax):
        return entry_of_codes(scale, 0, -half, half - 1)
    return entry


def _require_agreement(
    scale: _Numbers, offset: _Numbers, low: _Numbers, high: _Numbers, bits: int
) -> None:
    """Refuse bounds that no meaning of the offset explains, up to rounding.

    Args:
        scale: 0-D or one per channel.
        offset: Of the same shape.
        low: Of the same shape.
        high: Of the same shape.
        bits: Width of a code.

    Raises:
        _Contradiction: With the bounds of the nearest meaning.
    """
    tolerance = np.maximum(_ROUNDING_STEPS * scale, _ROUNDING_SPAN * (high - low))
    distances = []
    for codes in _list_codes(bits):
        first, last = codes.bounds(scale, offset)
        error = np.maximum(np.abs(first - low), np.abs(last - high))
        distances.append(_relative_distance(error, tolerance))
    nearest = int(np.argmin(distances))
    if distances[nearest] > 1:
        first, last = _list_codes(bits)[nearest].bounds(scale, offset)
        raise _Contradiction(
            f"min and max are {_format(low)} to {_format(high)}, scale {_format(scale)} and offset {_format(offset)} "
            f"give {_format(first)} to {_format(last)}"
        )


def _list_codes(bits: int) -> list[_Codes]:
    """Every meaning of an offset in these tools, AIMET's own first."""
    half = 2 ** (bits - 1)
    return [
        _Codes(0, 1, bits),
        _Codes(0, -1, bits),
        _Codes(-half, 1, bits),
        _Codes(-half, -1, bits),
    ]


def _relative_distance(error: _Numbers, tolerance: _Numbers) -> float:
    """The largest error of any channel, in units of what rounding explains."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(np.max(np.where(error <= tolerance, 0.0, error / tolerance)))


def _format(values: _Numbers) -> str:
    """The number, or the first number of an array."""
    first = f"{values.flat[0]:.6g}"
    return f"[{first}, ...]" if values.ndim else first


def _is_true(value: Any) -> bool:
    """Whether it is `True`, or the text "True" of versions up to 0.6.1."""
    return str(value).lower() == "true"


def _read_bits(place: str, value: Any) -> int:
    """The width of a code, 2 to 32.

    Raises:
        CalibrationError: It is another number, or not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 32:
        raise malformed(place, f"its bitwidth is {value!r:.40}; expected 2 to 32")
    return value


def _pair_up(place: str, first: _Numbers, second: _Numbers) -> tuple[_Numbers, _Numbers]:
    """Both with a number for each channel, 0-D if there is one channel.

    Args:
        place: The tensor's position in the file, for messages.
        first: Any number of channels.
        second: As many as `first`, or one for all.

    Raises:
        CalibrationError: The numbers of channels differ.
    """
    if first.size == 1:
        first = first.reshape(())
    if second.size == 1:
        second = np.broadcast_to(second.reshape(()), first.shape)
    if first.shape != second.shape:
        raise malformed(place, f"{first.size} and {second.size} of its numbers do not match")
    return first, second


# -- writing ---------------------------------------------------------------------------------------------------------


def write_1_0_0(rows: Sequence[Row]) -> str:
    """Version 1.0.0, tensors by name."""
    activations: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for row in rows:
        section = weights if row.is_weight else activations
        section.append(_write_version_1(row))
    document = {
        "version": "1.0.0",
        "activation_encodings": activations,
        "param_encodings": weights,
    }
    return json.dumps(document, indent=1) + "\n"


def write_0_6_1(rows: Sequence[Row]) -> str:
    """Version 0.6.1; a row called "MODULE.input.0" is written as the input of a torch module."""
    module_input = re.compile(re.escape(MODULE_INPUT).replace(r"\{\}", "(.*)"))
    activations: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for row in rows:
        channels = _write_channels(row)
        match = module_input.fullmatch(row.tensor)
        if row.is_weight:
            weights[row.tensor] = channels
        elif match:
            activations[match[1]] = {"input": {"0": channels[0]}}
        else:
            activations[row.tensor] = channels
    document = {
        "version": "0.6.1",
        "activation_encodings": activations,
        "param_encodings": weights,
    }
    return json.dumps(document, indent=1) + "\n"


def _write_version_1(row: Row) -> dict[str, Any]:
    """One tensor of version 1.0.0."""
    scales = row.scale.reshape(-1)
    return {
        "name": row.tensor,
        "dtype": "INT",
        "enc_type": "PER_TENSOR" if row.axis is None else "PER_CHANNEL",
        "bw": row.format.width,
        "is_sym": True,
        "scale": scales.tolist(),
        "offset": [float(_offset(row))] * scales.size,
    }


def _write_channels(row: Row) -> list[dict[str, Any]]:
    """One tensor of version 0.6.1: an encoding for each channel."""
    offset = _offset(row)
    steps = 2**row.format.width - 1
    channels = []
    for scale in row.scale.reshape(-1).tolist():
        channel = {
            "bitwidth": row.format.width,
            "dtype": "int",
            "is_symmetric": "True",
            "max": (steps + offset) * scale,
            "min": offset * scale,
            "offset": offset,
            "scale": scale,
        }
        channels.append(channel)
    return channels


def _offset(row: Row) -> int:
    """The offset: the smallest code, which is stored as 0."""
    return row.format.qmin
