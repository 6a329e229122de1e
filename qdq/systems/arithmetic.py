"""What all number systems share: their rounding, the sign without zero, gradients, and the refusal of bad input."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ArgumentError, NumberTypeError

FLOAT_BITS = 32
"""This many bits mean that a part is not quantized."""

_FLOAT32_BITS = 16  # codes, halves between them and their sums are exact in float32


def round_half_up(values: torch.Tensor) -> torch.Tensor:
    """floor(x + 0.5): ties go up, where `torch.round` takes the even neighbour."""
    # The sum itself is rounded: 0.49999997 + 0.5 is 1, and so is the next code.
    whole = values.floor()
    return whole.add_((values - whole).ge_(0.5))


def sign_of(values: torch.Tensor, zero: int = 1) -> torch.Tensor:
    """+1 or -1 in the type of the values, never 0.

    Args:
        values: Any shape.
        zero: The sign of 0, 1 or -1.
    """
    is_positive = values >= 0 if zero > 0 else values > 0
    return torch.where(is_positive, 1.0, -1.0).to(values.dtype)


def pass_gradient(values: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The quantized values with the gradient of the values (straight-through; Bengio et al., arXiv 1308.3432)."""
    # Not values + (quantized - values): this sum is rounded, and its result is not always the quantized value.
    return quantized.detach() + (values - values.detach())


def widen(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The values in a type in which codes are exact: float32, or float64 for more than 16 bits.

    Args:
        values: Any float type.
        bits: Width of the codes.
    """
    least = torch.float64 if bits > _FLOAT32_BITS else torch.float32
    return values.detach().to(torch.promote_types(values.dtype, least))


def narrow(result: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The result, which is clamped in place, in the type of the values and within its finite range."""
    limits = torch.finfo(values.dtype)
    return result.clamp_(limits.min, limits.max).to(values.dtype)


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
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise NumberTypeError(
            f"{layer}: bits is {bits!r}, a {type(bits).__name__}.", "give an integer."
        )
    if not least <= bits <= most:
        raise ArgumentError(
            f"{layer}: bits is {bits}; it must be {least} to {most}.", "choose another width."
        )


def require_values(values: Any, layer: str) -> None:
    """Refuse a tensor that has no range.

    Args:
        values: The tensor to quantize.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        NumberTypeError: Not a tensor, or one of integers or bools, which are never quantized.
        ArgumentError: Empty, or NaN or Inf in it.
    """
    if not isinstance(values, torch.Tensor):
        raise NumberTypeError(
            f"{layer}: the input is a {type(values).__name__}.", "give a float tensor."
        )
    if not values.is_floating_point():
        raise NumberTypeError(
            f"{layer}: the input is of type {values.dtype}; only float tensors are quantized.",
            "leave integers and bools as they are.",
        )
    if values.numel() == 0:
        raise ArgumentError(
            f"{layer}: the input of shape {tuple(values.shape)} is empty.",
            "give at least one value.",
        )
    # NaN is the minimum and the maximum of any tensor with NaN: one pass over the values.
    if not bool(torch.isfinite(torch.stack(values.detach().aminmax())).all()):
        is_finite = torch.isfinite(values)
        first = values.flatten()[int((~is_finite).flatten().to(torch.uint8).argmax())]
        count = int((~is_finite).sum())
        raise ArgumentError(
            f"{layer}: {count} of {values.numel()} values are not finite, the first is {float(first)}.",
            "mend the data or the layer before this one.",
        )


def require_rate(overflow_rate: Any, layer: str) -> None:
    """Refuse a fraction outside 0 <= rate < 1.

    Args:
        overflow_rate: The fraction.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        ArgumentError: It is outside.
    """
    if not isinstance(overflow_rate, int | float) or not 0 <= overflow_rate < 1:
        raise ArgumentError(
            f"{layer}: overflow_rate is {overflow_rate}; it must be at least 0 and below 1.",
            "give the fraction of elements that may saturate, such as 0.01.",
        )


def require_count(counter: Any, layer: str) -> None:
    """Refuse a number of forward calls that is no integer or negative.

    Args:
        counter: The number.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(counter, bool) or not isinstance(counter, int) or counter < 0:
        raise ArgumentError(
            f"{layer}: counter is {counter!r}; it must be an integer of at least 0.",
            "give the number of forward calls that calibrate.",
        )
