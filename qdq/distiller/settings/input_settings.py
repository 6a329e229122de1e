"""`InputSettings`: how an input of a layer is quantized that comes as a plain tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.settings.values import read_value
from qdq.errors import ArgumentError
from qdq.schema import describe
from qdq.text import printable

_FROM_OUTPUT = "from_output"


@dataclass(frozen=True)
class InputSettings:
    """How an input is quantized that comes as a plain tensor.

    Args:
        bits_activations: Bits; None: float.
        mode: The mode.
        clip_acts: How its range is cut.
        clip_n_stds: The number of standard deviations of N_STD.
    """

    bits_activations: int | None
    mode: LinearQuantMode
    clip_acts: ClipMode
    clip_n_stds: float | None


_INPUT_KEYS = tuple(setting.name for setting in fields(InputSettings))


def read_inputs(inputs: Any, output: InputSettings, place: str) -> dict[int, InputSettings]:
    """The settings of the inputs that have their own; what they leave out is as for the output.

    Args:
        inputs: The value of `input_overrides`.
        output: The settings of the layer's output.
        place: Where they stand, for messages.

    Raises:
        ArgumentTypeError: A mode of another type.
        ArgumentError: An unknown key, an invalid value, or N_STD without a number.
    """
    if not isinstance(inputs, Mapping):
        raise ArgumentError(
            f"{place}: input_overrides is {describe(inputs)}; expected positions with settings.",
            "write for example input_overrides: {0: {from_output: true}}.",
        )
    settings = {}
    for position, values in inputs.items():
        index = _read_position(position, place)
        settings[index] = _read_input(values, output, f"{place}, input {index}")
    return settings


def _read_position(position: Any, place: str) -> int:
    """The position of an input, which YAML may give as text."""
    text = str(position)
    if isinstance(position, bool) or not (text.isascii() and text.isdecimal()):
        raise ArgumentError(
            f"{place}: input_overrides has the key {printable(text, 40)}; expected the position of an input: 0, 1, ...",
            "number the inputs from 0.",
        )
    return int(text)


def _read_input(values: Any, output: InputSettings, place: str) -> InputSettings:
    """The settings of one input."""
    expected = f"{_FROM_OUTPUT}: true, or some of {', '.join(_INPUT_KEYS)}"
    if not isinstance(values, Mapping) or not values:
        raise ArgumentError(f"{place} is {describe(values)}; expected {expected}.", "write them.")
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in (_FROM_OUTPUT, *_INPUT_KEYS):
            raise ArgumentError(
                f"{place}: {describe(key)} is unknown; expected {expected}.",
                "correct or remove it.",
            )
        changes[key] = read_value(key, value, place)
    as_output = changes.pop(_FROM_OUTPUT, False)
    if as_output and changes:
        raise ArgumentError(
            f"{place}: {_FROM_OUTPUT} is true, and {', '.join(changes)} too.",
            f"keep {_FROM_OUTPUT}, or the others.",
        )
    if "mode" in changes:
        changes["mode"] = changes["mode"].activations
    settings = replace(output, **changes)
    require_n_stds(settings, place)
    return settings


def require_n_stds(settings: InputSettings, place: str) -> None:
    """Refuse N_STD without a number of standard deviations.

    Args:
        settings: Of an input or output.
        place: Where they stand, for messages.

    Raises:
        ArgumentError: There is none.
    """
    if settings.clip_acts is ClipMode.N_STD and settings.clip_n_stds is None:
        raise ArgumentError(
            f"{place}: clip_acts is N_STD, and clip_n_stds is not set.",
            "set clip_n_stds, a number above 0.",
        )
