"""What all number systems refuse in their settings: numbers of the wrong type or out of range, and unknown choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdq.errors import ArgumentError, ArgumentTypeError, NumberTypeError

FLOAT_BITS = 32
"""This many bits mean that a part is not quantized."""


def require_bits(bits: Any, layer: str, least: int = 1, most: int = FLOAT_BITS) -> None:
    """Refuse a width that no quantizer has.

    Args:
        bits: The width.
        layer: Name of the layer or quantizer, for the message.
        least: The smallest width.
        most: The largest width.

    Raises:
        NumberTypeError: Not an integer.
        ArgumentError: Below `least`, or above `most`.
    """
    require_integer(bits, "bits", layer)
    if not least <= bits <= most:
        raise ArgumentError(
            f"{layer}: bits is {bits}; it must be {least} to {most}.", "choose another width."
        )


def require_count(count: Any, what: str, layer: str, least: int = 0) -> None:
    """Refuse a number of things that is no integer or too small.

    Args:
        count: The number.
        what: Name of the argument, for the message.
        layer: Name of the layer, quantizer or function, for the message.
        least: The smallest number.

    Raises:
        NumberTypeError: Not an integer.
        ArgumentError: Below `least`.
    """
    require_integer(count, what, layer)
    if count < least:
        raise ArgumentError(
            f"{layer}: {what} is {count}; it must be at least {least}.", "choose another number."
        )


def require_integer(value: Any, what: str, layer: str) -> None:
    """Refuse a number that is no integer.

    Args:
        value: The number.
        what: Name of the argument, for the message.
        layer: Name of the layer, quantizer or function, for the message.

    Raises:
        NumberTypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise NumberTypeError(
            f"{layer}: {what} is {value!r}, a {type(value).__name__}; it must be an integer.",
            "give an integer.",
        )


def require_number(value: Any, what: str, layer: str, least: float, limit: float) -> None:
    """Refuse a number outside least <= value < limit, and NaN.

    Args:
        value: The number.
        what: Name of the argument, for the message.
        layer: Name of the layer, quantizer or function, for the message.
        least: The smallest number.
        limit: All numbers are below it.

    Raises:
        NumberTypeError: Not a number.
        ArgumentError: It is outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NumberTypeError(
            f"{layer}: {what} is {value!r}, a {type(value).__name__}; it must be a number.",
            "give a number.",
        )
    if not least <= value < limit:
        raise ArgumentError(
            f"{layer}: {what} is {value}; it must be at least {least:g} and below {limit:g}.",
            "choose another number.",
        )


def require_kind(value: Any, kind: type, what: str, layer: str) -> None:
    """Refuse an argument of another class.

    Args:
        value: The argument.
        kind: The class.
        what: Name of the argument, for the message.
        layer: Name of the function, for the message.

    Raises:
        ArgumentTypeError: It is of another one.
    """
    if not isinstance(value, kind):
        raise ArgumentTypeError(
            f"{layer}: {what} is {value!r}, a {type(value).__name__}.", f"give a {kind.__name__}."
        )


def require_rate(overflow_rate: Any, layer: str) -> None:
    """Refuse a fraction of elements that may saturate outside 0 <= rate < 1; see `require_number`."""
    require_number(overflow_rate, "overflow_rate", layer, 0, 1)


def require_choice(value: Any, choices: Sequence[Any], what: str, layer: str) -> None:
    """Refuse a value that is not one of those that exist.

    Args:
        value: The value.
        choices: Those that exist, two or more.
        what: Name of the argument, for the message.
        layer: Name of the layer, quantizer or function, for the message.

    Raises:
        ArgumentError: It is another one.
    """
    if value not in choices or isinstance(value, bool):
        names = ", ".join(map(repr, choices[:-1]))
        raise ArgumentError(
            f"{layer}: {what} is {value!r}; it must be {names} or {choices[-1]!r}.",
            "choose one of them.",
        )
