"""`clip`, whose bounds have a gradient, and `ClipFunction`, its autograd class."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from qdq.errors import ArgumentError, ArgumentTypeError

Bound = float | torch.Tensor


class ClipFunction(torch.autograd.Function):
    """`max(min(input, clip_value_max), clip_value_min)`; call it by `apply`.

    The gradient of the input passes strictly between the bounds. The gradient of a bound is the sum over the values at
    or beyond it; such a bound must have one element.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, clip_value_min: Bound, clip_value_max: Bound
    ) -> torch.Tensor:
        """The limited tensor, of the shape of the input."""
        low = _as_bound(clip_value_min, input)
        high = _as_bound(clip_value_max, input)
        ctx.save_for_backward(input, low, high)
        return torch.maximum(torch.minimum(input, high), low)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The gradients of the input and of the bounds; None where none is needed."""
        input, low, high = ctx.saved_tensors
        wants_input, wants_low, wants_high = ctx.needs_input_grad
        input_gradient = low_gradient = high_gradient = None
        if wants_input:
            is_inside = (input > low) & (input < high)
            input_gradient = torch.where(is_inside, grad_output, 0).sum_to_size(input.shape)
        if wants_low:
            low_gradient = _bound_gradient(torch.where(input <= low, grad_output, 0), low)
        if wants_high:
            high_gradient = _bound_gradient(torch.where(input >= high, grad_output, 0), high)
        return input_gradient, low_gradient, high_gradient


def clip(input: torch.Tensor, clip_value_min: Bound, clip_value_max: Bound) -> torch.Tensor:
    """Limit a tensor to `[clip_value_min, clip_value_max]`; if the bounds cross, the lower one takes precedence.

    Args:
        input: Any shape; a floating type is kept.
        clip_value_min: A number or a tensor that broadcasts against `input`.
        clip_value_max: As `clip_value_min`.

    Returns:
        The limited tensor; see `ClipFunction` for the gradients.

    Raises:
        ArgumentTypeError: `input` is not a tensor, or a bound is neither a number nor a tensor.
        ArgumentError: In the backward pass, a bound that learns has several elements.
    """
    if not isinstance(input, torch.Tensor):
        raise ArgumentTypeError(
            f"input of clip is a {type(input).__name__}, not a tensor.", "pass a torch.Tensor."
        )
    require_bound("clip_value_min", clip_value_min)
    require_bound("clip_value_max", clip_value_max)
    result: torch.Tensor = ClipFunction.apply(input, clip_value_min, clip_value_max)
    return result


def require_bound(name: str, value: object) -> Bound:
    """The value, if it can be a bound.

    Raises:
        ArgumentTypeError: Neither a number nor a tensor.
    """
    if not isinstance(value, Real | torch.Tensor):
        raise ArgumentTypeError(
            f"{name} is {value!r}, of type {type(value).__name__}; expected a number or a tensor.",
            "give the bound as a float, or as a tensor that broadcasts against the input.",
        )
    return value  # type: ignore[return-value]  # a Real of numpy


def _as_bound(value: Bound, input: torch.Tensor) -> torch.Tensor:
    keep = input.is_floating_point()  # then a bound does not change the type
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=torch.float64 if keep else None, device=input.device)
    return value.to(device=input.device, dtype=input.dtype if keep else value.dtype)


def _bound_gradient(gradient: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    if bound.numel() != 1:
        raise ArgumentError(
            f"A learnable clip bound can only be scalar, this one has shape {tuple(bound.shape)}.",
            "use bounds with one element, or detach them.",
        )
    # float16 would overflow in the sum; autograd casts the result to the type of the bound.
    return gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).reshape(
        bound.shape
    )
