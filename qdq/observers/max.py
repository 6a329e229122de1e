"""Running maximum of |x|, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qdq.errors import ArgumentError, ArgumentTypeError

Axis = int | Sequence[int] | None
"""The axes that are kept (negative ones count from the end); None: the whole tensor has one range."""


def reduce_amax(inputs: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Maximum of |x| over all axes but the kept ones.

    Args:
        inputs: Any shape; the maximum of nothing is 0.
        axis: The axis or axes to keep (negative counts from the end), or None for the whole tensor.

    Returns:
        A float32 0-D tensor, or one of the rank of `inputs` with size 1 on every axis that is not kept.

    Raises:
        ArgumentError: An axis that `inputs` does not have.
        ArgumentTypeError: An axis that is not an integer.
    """
    if axis is None:
        low, high = _aminmax(inputs.detach())
    else:
        low, high = _aminmax_along(inputs.detach(), axis)
    return torch.maximum(low.float().abs(), high.float().abs())


def _aminmax(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.numel() == 0:
        zero = inputs.new_zeros(())
        return zero, zero
    low, high = torch.aminmax(inputs)
    return low, high


def _aminmax_along(
    inputs: torch.Tensor, axis: int | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum over all axes but the kept ones, which have the rank of the inputs."""
    kept_axes = _resolve_axes(inputs, axis)
    reduced_axes = [dim for dim in range(inputs.dim()) if dim not in kept_axes]
    if not reduced_axes:
        return inputs, inputs
    if any(inputs.shape[dim] == 0 for dim in reduced_axes):
        shape = list(inputs.shape)
        for dim in reduced_axes:
            shape[dim] = 1
        zeros = inputs.new_zeros(shape)
        return zeros, zeros
    return inputs.amin(reduced_axes, keepdim=True), inputs.amax(reduced_axes, keepdim=True)


def _resolve_axes(inputs: torch.Tensor, axis: int | Sequence[int]) -> set[int]:
    """The axes counted from the start."""
    axes = [axis] if isinstance(axis, int) else list(axis)
    if not all(isinstance(dim, int) for dim in axes):
        raise ArgumentTypeError(
            f"axis is {axis!r}; it must be None, an int or a sequence of ints.", "0 keeps axis 0."
        )
    if not all(-inputs.dim() <= dim < inputs.dim() for dim in axes):
        fix = "a tensor without axes has one range: use axis=None."
        if inputs.dim():
            limits = f"{-inputs.dim()} and {inputs.dim() - 1}"
            fix = f"keep axes between {limits}, or use axis=None for one range per tensor."
        raise ArgumentError(
            f"axis {axis} is out of range for a tensor of shape {tuple(inputs.shape)}.", fix
        )
    return {dim % inputs.dim() for dim in axes}
