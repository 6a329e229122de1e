"""One entry of a range file, and the arithmetic between scales, bounds and amax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.errors import CalibrationError
from qdq.formats import AMAX_FLOOR

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """The range of one tensor in a file.

    Args:
        amax: The symmetric range: 0-D, or one number per channel.
        axis: The axis of the channels, if the file has it.
        note: What was changed to get a symmetric range, "" if nothing.
        problem: Why there is no range to use, "" if there is one.
        is_damaged: Whether the problem is invalid numbers: an error if a quantizer has this tensor.
    """

    amax: Floats = field(default_factory=lambda: np.zeros((), np.float32))
    axis: int | None = None
    note: str = ""
    problem: str = ""
    is_damaged: bool = False


def amax_of_scale(scale: Floats, qmax: int) -> Floats:
    """The float32 amax that gives exactly this scale (`formats.scale_from_amax`), if there is one.

    One scale in 129 is not the quotient of any float32 number and 127, so no calibration in float32 gives it; its amax
    gives a scale that is one unit in the last place away. For all others the rounded product is exact (tested for each
    mantissa).

    Args:
        scale: Positive, any shape.
        qmax: The largest code.
    """
    with np.errstate(over="ignore"):  # infinity is refused when it is used
        return np.asarray(scale * np.float32(qmax), np.float32)


def entry_of_codes(
    scale: npt.ArrayLike, zero_point: npt.ArrayLike, qmin: int, qmax: int, axis: int | None = None
) -> Entry:
    """The range of integer codes: `value = (code - zero_point) * scale`.

    A scale that is NaN, infinite, negative or almost 0 gives a damaged entry.

    Args:
        scale: 0-D or one per channel.
        zero_point: One for each scale, or one for all.
        qmin: The smallest code.
        qmax: The largest code.
        axis: The axis of the channels.
    """
    with np.errstate(over="ignore"):  # infinity is damage, as if the file had it
        scale = np.asarray(scale, np.float32)
    if not np.any(scale):
        return Entry(problem="its scale is 0: the tool found no range for it")
    damage = describe_damage("scale", scale, smallest=AMAX_FLOOR / 2**15)
    if damage:
        return Entry(problem=damage, is_damaged=True)
    zero = np.asarray(zero_point, np.float64)
    half = (qmax - qmin + 1) // 2
    if np.any(zero != qmin + half):
        bounds_entry = entry_of_bounds((qmin - zero) * scale, (qmax - zero) * scale)
        return replace(bounds_entry, axis=axis)
    # The codes are symmetric: uint8 with zero point 128 has the values of int8 with 0.
    amax = amax_of_scale(scale, half - 1)
    damage = describe_damage("scale", amax, smallest=0.0)
    if damage:
        return Entry(problem=damage, is_damaged=True)
    note = "" if half == 128 else f"from codes of {half.bit_length()} bit"
    return Entry(amax, axis, note)


def entry_of_bounds(low: npt.ArrayLike, high: npt.ArrayLike) -> Entry:
    """The symmetric range around two bounds.

    Bounds that are NaN, infinite or swapped give a damaged entry.

    Args:
        low: The smallest value, 0-D or one per channel.
        high: The largest, of the same shape.
    """
    bounds = np.asarray([low, high], np.float64)
    if not np.isfinite(bounds).all() or np.abs(bounds).max(initial=0.0) > np.finfo(np.float32).max:
        return Entry(problem="its range contains NaN or Inf", is_damaged=True)
    if np.any(bounds[0] > bounds[1]):
        channel = np.argmax((bounds[0] - bounds[1]).reshape(-1))
        first, last = bounds.reshape(2, -1)[:, channel]
        return Entry(
            problem=f"its range is inverted: {first:.6g} to {last:.6g}",
            is_damaged=True,
        )
    amax = np.abs(bounds).max(axis=0).astype(np.float32)
    if not np.any(amax):
        return Entry(problem="its range is 0 to 0: the tool saw zeros only")
    return Entry(amax, note=_describe_asymmetry(bounds, amax))


def _describe_asymmetry(bounds: npt.NDArray[np.float64], amax: Floats) -> str:
    """A note if symmetric codes are coarser than those of the file; a difference of one int8 step is ignored."""
    if np.all(np.abs(np.abs(bounds) - amax) <= amax / 100):
        return ""
    low, high = bounds[0].min(), bounds[1].max()
    return f"{low:.4g} to {high:.4g} made symmetric, as TensorRT requires"


def describe_damage(quantity: str, values: Floats, *, smallest: float) -> str:
    """The first invalid number: NaN, Inf, negative, or positive and below `smallest`; "" if all are valid.

    Args:
        quantity: The name of the values in the text.
        values: Any shape.
        smallest: The smallest valid number besides 0.
    """
    is_too_small = (values > 0) & (values < smallest)
    is_invalid = ~np.isfinite(values) | (values < 0) | is_too_small
    if not np.any(is_invalid):
        return ""
    return f"its {quantity} is {values[is_invalid].flat[0]:.6g}; it must be positive and finite"


def add_entry(entries: dict[str, Entry], name: str, entry: Entry, place: str) -> None:
    """Add the entry of a tensor; the same entry may come twice.

    Args:
        entries: The entries so far; changed in place.
        name: The name of the tensor.
        entry: Its entry.
        place: Its position in the file, for messages.

    Raises:
        CalibrationError: The file has another range for the tensor elsewhere.
    """
    former = entries.setdefault(name, entry)
    has_same_range = np.array_equal(former.amax, entry.amax)
    has_same_state = (former.axis, former.problem) == (entry.axis, entry.problem)
    if not has_same_range or not has_same_state:
        raise CalibrationError(
            f"{place}: {name} has two different ranges in one file.",
            "remove one of them; the file may have been joined from two.",
        )


def number_array(place: str, value: Any) -> npt.NDArray[np.float64]:
    """A JSON number or list of numbers as an array.

    Raises:
        CalibrationError: The value has another type.
    """
    items = value if isinstance(value, list) else [value]
    if not items or not all(map(_is_number, items)):
        raise malformed(place, f"expected a number or a list of numbers, found {_shorten(value)}")
    try:
        return np.asarray(value, np.float64)
    except OverflowError as error:  # an integer of hundreds of digits
        raise malformed(place, f"{_shorten(value)} is too large") from error


def _is_number(item: Any) -> bool:
    """Whether it is a number of JSON; `True` is not."""
    return isinstance(item, int | float) and not isinstance(item, bool)


def object_of(place: str, value: Any) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        CalibrationError: The value has another type.
    """
    if not isinstance(value, dict):
        raise malformed(place, f"expected an object, found {_shorten(value)}")
    return value


def malformed(place: str, reason: str) -> CalibrationError:
    """The error of a file that does not follow its format.

    Args:
        place: The part of the file.
        reason: What is wrong there.
    """
    return CalibrationError(
        f"{place}: {reason}.", "write the file again with that tool, and copy all of it."
    )


def _shorten(value: Any) -> str:
    """A value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
