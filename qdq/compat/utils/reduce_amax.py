"""Maxima without gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from qdq.errors import ArgumentError, ArgumentTypeError


@torch.no_grad()
def reduce_amax(
    input: torch.Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = True
) -> torch.Tensor:
    """Maximum of |x| over some axes, without gradient.

    Args:
        input: Any shape.
        axis: The axis or axes to reduce (negative counts from the end), None for all of them. The `axis` of a
            calibrator is the opposite: it names the axes that are kept.
        keepdims: Keep reduced axes with size 1.

    Returns:
        The maxima in the type of `input`; a single one as a 0-D tensor.

    Raises:
        ArgumentTypeError: `input` is not a tensor, or `axis` has another type.
        ArgumentError: More axes than dimensions, an axis out of range, or nothing to take the maximum of.
    """
    if not isinstance(input, torch.Tensor):
        raise ArgumentTypeError(
            f"input is a {type(input).__name__}, not a tensor.", "pass a torch.Tensor."
        )
    axes = sorted(_checked_axes(input, axis))
    if any(input.shape[dim] == 0 for dim in axes):
        raise ArgumentError(
            f"There is no maximum over axes {axes} of an empty tensor of shape {tuple(input.shape)}.",
            "leave empty batches out.",
        )
    maxima = input.abs()
    if axes:  # torch takes () for all axes
        maxima = maxima.amax(axes, keepdim=keepdims)
    if maxima.numel() == 1:
        return maxima.reshape(())
    return maxima


def _checked_axes(input: torch.Tensor, axis: int | Sequence[int] | None) -> set[int]:
    rank, shape = input.dim(), tuple(input.shape)
    if axis is None:
        return set(range(rank))
    try:
        axes = [operator.index(dim) for dim in (axis if isinstance(axis, Sequence) else (axis,))]
    except TypeError as error:
        raise ArgumentTypeError(
            f"axis is {axis!r}; expected None, an int or a sequence of ints.",
            "name the axes to reduce, such as (0, 2).",
        ) from error
    if len(axes) > rank:
        raise ArgumentError(
            f"Cannot reduce more axes than the tensor has: axis is {axis!r}, the shape {shape}.",
            "name each axis once, or leave axis out to reduce all.",
        )
    if not all(-rank <= dim < rank for dim in axes):
        raise ArgumentError(
            f"axis {axis!r} is out of range for a tensor of shape {shape}.",
            f"use axes from {-rank} to {rank - 1}.",
        )
    return {dim % rank for dim in axes}
