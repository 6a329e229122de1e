"""Dynamic dimensions of an exported graph: their names, and example inputs that do not fix them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.text import list_names

Dynamic = Mapping[str, Mapping[int, str | None]]
"""Name of an input -> axis -> name of the dimension, None for a fixed one."""
Dimensions = dict[str, dict[int, str]]
"""Name of an input -> its dynamic axes with their names."""

_BATCH = "batch"


def name_dimensions(
    tensors: Mapping[str, torch.Tensor], dynamic: Dynamic | None, *, has_batch: bool
) -> Dimensions:
    """The dynamic dimensions of every input.

    Args:
        tensors: The inputs by name.
        dynamic: What the user wants besides the batch, or instead of it.
        has_batch: Whether the first dimension of every input is the batch, unless `dynamic` says something else.

    Raises:
        ArgumentError: An unknown input, an axis that it does not have, a name that is no identifier, or one name for
            dimensions of different sizes.
        ArgumentTypeError: `dynamic` is not `{input: {axis: name}}`.
    """
    require_dynamic(dynamic)
    dimensions: Dimensions = {}
    for name, tensor in tensors.items():
        dimensions[name] = {0: _BATCH} if has_batch and tensor.dim() else {}
    for name, axes in (dynamic or {}).items():
        if name not in tensors:
            raise ArgumentError(
                f"dynamic names the input {name!r}; the model has {list_names(list(tensors), 10)}.",
                "use these names: those of the forward's arguments, with the keys and positions in them.",
            )
        for axis, dimension in axes.items():
            position = _require_axis(name, tensors[name], axis)
            dimensions[name].pop(position, None)
            if dimension is not None:
                dimensions[name][position] = dimension
    _require_equal_sizes(tensors, dimensions)
    return dimensions


def require_dynamic(dynamic: Any) -> None:
    """Refuse anything but `{input: {axis: name or None}}`.

    Args:
        dynamic: Any object; None is none.

    Raises:
        ArgumentError: A name that is no identifier.
        ArgumentTypeError: Another form.
    """
    if dynamic is None:
        return
    fix = "pass for instance {'x': {0: 'batch', 2: 'height'}}."
    inputs = dynamic.values() if isinstance(dynamic, Mapping) else [dynamic]
    for axes in inputs:
        if not isinstance(axes, Mapping):
            raise ArgumentTypeError(
                f"dynamic is {dynamic!r}; expected axes with names for each input.", fix
            )
        for axis, dimension in axes.items():
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise ArgumentTypeError(f"dynamic has the axis {axis!r}; expected a number.", fix)
            if dimension is None:
                continue
            if not isinstance(dimension, str):
                raise ArgumentTypeError(
                    f"dynamic has the dimension {dimension!r}; expected a name, or None for a fixed one.",
                    fix,
                )
            if not dimension.isidentifier():
                raise ArgumentError(
                    f"dynamic has the dimension {dimension!r}; a name has letters, digits and underscores.",
                    fix,
                )


def _require_axis(name: str, tensor: torch.Tensor, axis: int) -> int:
    """An axis counted from the first; a negative one counts from the last.

    Raises:
        ArgumentError: The input has no such axis.
    """
    position = axis + tensor.dim() if axis < 0 else axis
    if not 0 <= position < tensor.dim():
        raise ArgumentError(
            f"dynamic names the axis {axis} of {name}, whose shape is {list(tensor.shape)}.",
            f"name axes 0 to {tensor.dim() - 1}." if tensor.dim() else "it has no axes.",
        )
    return position


def _require_equal_sizes(tensors: Mapping[str, torch.Tensor], dimensions: Dimensions) -> None:
    """Refuse one name for dimensions of different sizes; the batch of a default is left to the model.

    Raises:
        ArgumentError: There is such a name.
    """
    sizes: dict[str, tuple[str, int]] = {}
    for name, axis, dimension in _list_axes(dimensions):
        size = tensors[name].shape[axis]
        first, first_size = sizes.setdefault(dimension, (name, size))
        if size != first_size and dimension != _BATCH:
            raise ArgumentError(
                f"the dimension {dimension!r} is {first_size} in {first} and {size} in {name}.",
                "give different names to dimensions of different sizes.",
            )


def _list_axes(dimensions: Dimensions) -> Iterator[tuple[str, int, str]]:
    """Input, axis and name of every dynamic dimension."""
    for name, axes in dimensions.items():
        for axis, dimension in axes.items():
            yield name, axis, dimension


def repeat_single(
    tensors: Mapping[str, torch.Tensor], dimensions: Dimensions
) -> dict[str, torch.Tensor]:
    """The inputs with two of everything along dynamic axes of size 1, which torch.export treats as a constant.

    Args:
        tensors: The inputs by name.
        dimensions: Their dynamic dimensions.
    """
    repeated = dict(tensors)
    for name, axis, _ in _list_axes(dimensions):
        if repeated[name].shape[axis] == 1:
            repeated[name] = torch.cat([repeated[name]] * 2, axis)
    return repeated


def change_sizes(
    tensors: Mapping[str, torch.Tensor], dimensions: Dimensions, *, only_batch: bool
) -> dict[str, torch.Tensor]:
    """The inputs with other sizes along their dynamic axes: one sample, and twice as long elsewhere.

    Args:
        tensors: The inputs by name, as `repeat_single` gives them.
        dimensions: Their dynamic dimensions.
        only_batch: Whether only the first axes change.
    """
    changed = dict(tensors)
    for name, axis, _ in _list_axes(dimensions):
        if axis == 0:
            changed[name] = changed[name][:1]
        elif not only_batch:
            changed[name] = torch.cat([changed[name]] * 2, axis)
    return changed
