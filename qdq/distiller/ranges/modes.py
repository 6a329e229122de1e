"""The modes of range-linear quantization, and which codes they have; `linear_params` has their formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.systems.settings import require_bits


class LinearQuantMode(Enum):
    """How codes are laid over a range."""

    SYMMETRIC = 1
    SYMMETRIC_RESTRICTED = 2
    ASYMMETRIC_UNSIGNED = 3
    ASYMMETRIC_SIGNED = 4

    @property
    def is_symmetric(self) -> bool:
        """Whether the zero point is always 0."""
        return self in (LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC_RESTRICTED)

    @property
    def is_signed(self) -> bool:
        """Whether there are negative codes."""
        return self is not LinearQuantMode.ASYMMETRIC_UNSIGNED

    @property
    def is_restricted(self) -> bool:
        """Whether the lowest code is left out."""
        return self is LinearQuantMode.SYMMETRIC_RESTRICTED


@dataclass(frozen=True)
class ModePair:
    """The modes of a layer.

    Args:
        activations: Of its inputs and outputs.
        weights: Of its weight.
    """

    activations: LinearQuantMode
    weights: LinearQuantMode


def parse_mode(value: Any) -> ModePair:
    """The modes that a YAML file or a script names.

    Args:
        value: A mode or its name, for both; a mapping with the keys activations and weights; or a pair.

    Raises:
        ArgumentError: An unknown name, or other keys.
        ArgumentTypeError: A value of another type.
    """
    if isinstance(value, ModePair):
        return value
    if not isinstance(value, Mapping):
        mode = _parse_one(value)
        return ModePair(mode, mode)
    if set(value) != {"activations", "weights"}:
        raise ArgumentError(
            f"mode has the keys {sorted(map(str, value))}; expected are activations and weights.",
            "give both, or one mode for both.",
        )
    return ModePair(_parse_one(value["activations"]), _parse_one(value["weights"]))


def _parse_one(value: Any) -> LinearQuantMode:
    if isinstance(value, LinearQuantMode):
        return value
    names = ", ".join(LinearQuantMode.__members__)
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"mode is {value!r}, a {type(value).__name__}; expected is a name: {names}.",
            "give a name, or one for activations and one for weights.",
        )
    if value not in LinearQuantMode.__members__:
        raise ArgumentError(f"mode is {value!r}; known are {names}.", "give one of these.")
    return LinearQuantMode[value]


def get_quantized_range(
    num_bits: int, signed: bool = True, signed_restrict_qrange: bool = False
) -> tuple[int, int]:
    """The smallest and the largest code.

    Args:
        num_bits: The width b, 1 to 32.
        signed: Whether there are negative codes.
        signed_restrict_qrange: Leave out the lowest of the signed codes.

    Raises:
        ArgumentError: Another width.
        ArgumentTypeError: No integer.
    """
    require_bits(num_bits, "get_quantized_range")
    if not signed:
        return 0, 2**num_bits - 1
    highest = 2 ** (num_bits - 1) - 1
    return (-highest if signed_restrict_qrange else -highest - 1), highest
