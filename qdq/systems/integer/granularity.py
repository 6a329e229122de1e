"""How many ranges a tensor has: one, or one for each group of indices of an axis."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ArgumentError, NumberTypeError, ShapeError

AXES = (0, 1)
"""Of a weight: output channels and inputs."""


def require_granularity(axis: Any, groups: Any, label: str) -> None:
    """Refuse an axis or a number of groups that no weight has.

    Args:
        axis: None or one of `AXES`.
        groups: None or a number of groups of equally many indices.
        label: Name of the layer, for the message.

    Raises:
        ArgumentError: The message has both values.
        NumberTypeError: They are not integers.
    """
    for name, number in (("axis", axis), ("groups", groups)):
        if isinstance(number, bool) or not isinstance(number, int | None):
            raise NumberTypeError(
                f"{label}: {name} is {number!r}, a {type(number).__name__}.",
                "give an integer or None.",
            )
    if axis is not None and axis not in AXES:
        raise ArgumentError(
            f"{label}: axis is {axis}; a weight has ranges along axis 0 or 1.",
            "use 0 for output channels, 1 for inputs, or None for one range.",
        )
    if groups is not None and (axis is None or groups < 1):
        raise ArgumentError(
            f"{label}: groups is {groups}, axis is {axis}.", "give an axis and at least 1 group."
        )


def find_ends(
    tensor: torch.Tensor, axis: int | None, groups: int | None, label: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the range of each group, which contains 0, in float32.

    Args:
        tensor: Finite numbers of any float type and any shape.
        axis: The axis with several ranges; None: one range.
        groups: Number of ranges; None: one for each index.
        label: Name of the layer, for the message.

    Raises:
        ShapeError: The tensor has no such axis, or the groups do not divide it.
    """
    if axis is None:
        low, high = tensor.aminmax()
    else:
        low, high = _split(tensor, axis, groups, label).aminmax(dim=1)
    limits = torch.finfo(torch.float32)
    low = low.double().clamp(limits.min, 0).float()
    return low, high.double().clamp(0, limits.max).float()


def _split(tensor: torch.Tensor, axis: int, groups: int | None, label: str) -> torch.Tensor:
    """The values of each group, `[groups, N]`.

    Raises:
        ShapeError: As for `find_ends`.
    """
    if tensor.dim() <= axis:
        raise ShapeError(
            f"{label}: a tensor of shape {tuple(tensor.shape)} has no axis {axis}.",
            "give a tensor with this axis, or leave axis out.",
        )
    size = tensor.shape[axis]
    count = size if groups is None else groups
    if size % count:
        raise ShapeError(
            f"{label}: {count} groups do not divide the {size} indices of axis {axis} of a tensor "
            f"of shape {tuple(tensor.shape)}.",
            "choose a divisor.",
        )
    return tensor.movedim(axis, 0).reshape(count, -1)


def spread(
    numbers: torch.Tensor, tensor: torch.Tensor, axis: int | None, label: str
) -> torch.Tensor:
    """One number for each range, in a shape that fits a tensor.

    Args:
        numbers: Such as scales.
        tensor: A tensor with the axis.
        axis: The axis with several ranges; None: one range.
        label: Name of the layer, for the message.

    Raises:
        ShapeError: The tensor has no such axis, or another number of indices.
    """
    if axis is None:
        return numbers.reshape(())
    count = numbers.numel()
    size = tensor.shape[axis] if tensor.dim() > axis else 0
    if size == 0 or size % count:
        raise ShapeError(
            f"{label}: {count} ranges along axis {axis} do not fit a tensor of shape {tuple(tensor.shape)}.",
            "give the tensor that was calibrated.",
        )
    shape = [1] * tensor.dim()
    shape[axis] = size
    return numbers.repeat_interleave(size // count).reshape(shape)
