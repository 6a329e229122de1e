"""Checks of single values in settings of the user, from Python or from YAML."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from qdq.distiller.ranges.clipping import parse_clip
from qdq.distiller.ranges.modes import parse_mode
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.schema import describe

_MOST_BITS = 32
_FLOAT_BITS = (16, 32, 64)


class _Rule(NamedTuple):
    """A test of a value, what is expected, in words, and whether text may stand for a number."""

    accepts: Callable[[Any], bool]
    expected: str
    is_number: bool = False


def read_value(key: str, value: Any, place: str) -> Any:
    """A value that its key may have; 0 bits become None, and names of modes become modes.

    Args:
        key: Name of the setting.
        value: Its value.
        place: Where it stands, for messages.

    Raises:
        ArgumentError: It is not valid.
        ArgumentTypeError: A mode of another type.
    """
    if key in _PARSERS:
        return _parse(key, value, place)
    rule = _RULES[key]
    read = as_number(value) if rule.is_number and value is not None else value
    if not rule.accepts(read):
        raise ArgumentError(
            f"{place}: {key} is {describe_value(value)}; expected {rule.expected}.",
            f"correct {key}.",
        )
    if rule is _BITS:
        return read or None
    return read


def _parse(key: str, value: Any, place: str) -> Any:
    """The mode that a value names."""
    try:
        return _PARSERS[key](value)
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(f"{place}: {error.message}", error.fix) from None


def describe_value(value: Any) -> str:
    """Describe a value of the user in a few characters, also one that no file can have.

    Args:
        value: Any value.
    """
    try:
        return describe(value)
    except TypeError:  # no value that a file can have
        return f"of type {type(value).__name__}"


def as_number(value: Any) -> float:
    """A finite number, also one that YAML takes for text, such as 1e-05; NaN for anything else.

    Args:
        value: Any value.
    """
    if isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
        return math.nan
    return number if math.isfinite(number) else math.nan


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bits(value: Any) -> bool:
    return value is None or (is_whole(value) and 0 <= value <= _MOST_BITS)


def _is_multiplier_bits(value: Any) -> bool:
    return value is None or (is_whole(value) and 1 <= value <= _MOST_BITS)


def _is_float_bits(value: Any) -> bool:
    return value is None or (is_whole(value) and value in _FLOAT_BITS)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_BITS = _Rule(_is_bits, f"a whole number up to {_MOST_BITS}; 0 or null is float")
_FLAG = _Rule(_is_flag, "true or false")
_POSITIVE = _Rule(
    lambda number: number is not None and number > 0, "a number above 0", is_number=True
)
_RULES = {
    "bits_activations": _BITS,
    "bits_weights": _BITS,
    "bits_bias": _BITS,
    "per_channel_wts": _FLAG,
    "clip_n_stds": _Rule(
        lambda number: number is None or number > 0, "a number above 0, or null", is_number=True
    ),
    "clip_half_range": _FLAG,
    "scale_approx_mult_bits": _Rule(
        _is_multiplier_bits, f"a whole number from 1 to {_MOST_BITS}, or null"
    ),
    "inputs_quant_auto_fallback": _FLAG,
    "fpq_module": _Rule(_is_float_bits, "16, 32, 64 or null"),
    "fp16": _FLAG,
    "fake": _FLAG,
    "make_identity": _FLAG,
    "quantize_inputs": _FLAG,
    "from_output": _FLAG,
    "save_fp_weights": _FLAG,
    "also_clip_weights": _FLAG,
    "clip_val": _POSITIVE,
    "act_clip_init_val": _POSITIVE,
    "act_clip_decay": _Rule(
        lambda number: number is None or number >= 0,
        "a number of at least 0, or null",
        is_number=True,
    ),
    "ema_decay": _Rule(
        lambda number: number is not None and 0 <= number < 1,
        "a number of at least 0 and below 1",
        is_number=True,
    ),
}
_PARSERS: dict[str, Callable[[Any], Any]] = {"mode": parse_mode, "clip_acts": parse_clip}
