"""What all number systems share: their rounding, the sign without zero, gradients, and the refusal of bad tensors."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ArgumentError, NumberTypeError

_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    """The quantized values with the gradient of the values (straight-through; Bengio et al., arXiv 1308.3432).

    Where a value is NaN or Inf on a GPU, the result is NaN: see `require_batch`.
    """
    if values.is_cpu and not values.requires_grad:
        return quantized
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
    types = (result.dtype, values.dtype)
    limits = min((torch.finfo(dtype) for dtype in types), key=lambda limits: limits.max)
    return result.clamp_(limits.min, limits.max).to(values.dtype)


def require_floats(values: Any, layer: str) -> None:
    """Refuse what is no float tensor with elements; their values are not looked at.

    Args:
        values: The tensor to quantize.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        NumberTypeError: Not a tensor, or one of integers or bools, which are never quantized; float8, sparse, or
            without values ("meta").
        ArgumentError: Empty.
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
    if (
        values.dtype not in _FLOAT_TYPES
        or values.layout != torch.strided
        or values.device.type == "meta"
    ):
        raise NumberTypeError(
            f"{layer}: the input is {values.dtype}, {values.layout}, on {values.device}; quantizers compute with "
            "dense values of float16, bfloat16, float32 or float64.",
            "convert it with to(torch.float32), to_dense(), or load its values.",
        )
    if values.numel() == 0:
        raise ArgumentError(
            f"{layer}: the input of shape {tuple(values.shape)} is empty.",
            "give at least one value.",
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
    require_floats(values, layer)
    # NaN is the minimum and the maximum of any tensor with NaN: one pass over the values.
    if not bool(torch.isfinite(torch.stack(values.detach().aminmax())).all()):
        is_finite = torch.isfinite(values)
        first = values.detach().flatten()[int((~is_finite).flatten().to(torch.uint8).argmax())]
        count = int((~is_finite).sum())
        raise ArgumentError(
            f"{layer}: {count} of {values.numel()} values are not finite, the first is {float(first)}.",
            "mend the data or the layer before this one.",
        )


def spoil_infinite(values: torch.Tensor) -> torch.Tensor:
    """The values, with NaN in the place of Inf where `require_batch` does not look: a clamp would make codes of Inf."""
    if _is_looked_at(values):
        return values
    return values + (values - values)


def _is_looked_at(values: torch.Tensor) -> bool:
    return values.is_cpu and not torch.compiler.is_compiling()


def require_batch(values: Any, layer: str) -> None:
    """As `require_values`, for what a layer quantizes in every forward: it never waits for a GPU.

    On a GPU, and in a graph that torch captures, NaN and Inf are not looked for. `pass_gradient` and `spoil_infinite`
    make NaN of them, so they never become codes.

    Args:
        values: The tensor to quantize.
        layer: Name of the layer or quantizer, for the message.

    Raises:
        NumberTypeError: As for `require_values`.
        ArgumentError: Empty, or on the CPU NaN or Inf in it.
    """
    require_floats(values, layer)
    if _is_looked_at(values):
        require_values(values, layer)
