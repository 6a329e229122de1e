"""Batches: how one is unpacked for a model, how many samples it has, its first ones, and several as one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves, tree_map, tree_map_with_path

from qdq.errors import ArgumentTypeError, DataError

_MAX_IMAGE_CHANNELS = 4
_COLOR_CHANNELS = 3
_MIN_IMAGE_SIDE = 16


@dataclass(frozen=True)
class Labelled:
    """A batch that says which part of it is the inputs of the model.

    Args:
        inputs: What the model takes. A tuple holds positional arguments, a mapping keyword arguments. A list holds
            positional arguments, too, except images `[C, H, W]`: such a list is one argument, as torchvision's
            detectors take it. Anything else is the only argument.
        labels: What the loss or the metric compares the outputs with; None if there is nothing.
    """

    inputs: Any
    labels: Any = None


def require_batches(batches: Any) -> None:
    """Refuse a single tensor or dictionary where batches are expected: iterating it would give its rows or its keys.

    Args:
        batches: Any object.

    Raises:
        ArgumentTypeError: It yields no batches. The message says what to pass instead.
    """
    is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str | bytes | nn.Module) or not is_iterable:
        raise ArgumentTypeError(
            f"batches is of type {type(batches).__name__}; expected something that yields batches.",
            "pass a list of batches, or a DataLoader.",
        )
    if isinstance(batches, torch.Tensor | Mapping):
        raise ArgumentTypeError(
            f"batches is one {type(batches).__name__}; expected something that yields batches.",
            "pass [batch].",
        )


def list_leaves(tree: Any) -> list[Any]:
    """The parts of the inputs or outputs of a model that hold no further parts, in order.

    Args:
        tree: Tensors and other values, in lists, tuples, mappings and dataclasses of any depth.
    """
    leaves = []
    for leaf in tree_leaves(tree):
        parts = _list_parts(leaf)
        if parts is None:
            leaves.append(leaf)
        else:
            leaves += list_leaves(list(parts.values()))
    return leaves


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The inputs or outputs of a model with each leaf of `list_leaves` replaced, in the same containers.

    Args:
        function: Leaf -> the value that takes its place.
        tree: As for `list_leaves`.
    """

    def replace(leaf: Any) -> Any:
        parts = _list_parts(leaf)
        if parts is None:
            return function(leaf)
        return _rebuild(leaf, {name: map_leaves(function, part) for name, part in parts.items()})

    return tree_map(replace, tree)


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The inputs or outputs of a model with each tensor replaced.

    Args:
        function: Tensor -> the value that takes its place.
        tree: As for `list_leaves`.
    """
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def to_plain(tree: Any) -> Any:
    """The inputs or outputs of a model, with dictionaries for mappings and dataclasses, which torch does not look into.

    Args:
        tree: As for `list_leaves`.
    """

    def convert(leaf: Any) -> Any:
        parts = _list_parts(leaf)
        return leaf if parts is None else to_plain(parts)

    return tree_map(convert, tree)


def _list_parts(leaf: Any) -> dict[Any, Any] | None:
    """The parts of a mapping or dataclass that torch takes for a leaf; None if it is a leaf."""
    if isinstance(leaf, torch.Tensor):
        return None
    if isinstance(leaf, MutableMapping):
        return dict(leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return None


def _rebuild(container: Any, parts: dict[Any, Any]) -> Any:
    """A copy of a mapping or dataclass with other parts."""
    copied = copy.copy(container)
    if isinstance(copied, MutableMapping):
        copied.update(parts)
        return copied
    for name, part in parts.items():
        object.__setattr__(copied, name, part)  # it may be frozen
    return copied


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors among the inputs or outputs of a model, in order; all other values in them are left out.

    Args:
        tree: As for `list_leaves`.
    """
    return [leaf for leaf in list_leaves(tree) if isinstance(leaf, torch.Tensor)]


def floats_of(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors among the inputs or outputs of a model, in order.

    Args:
        tree: As for `list_leaves`.
    """
    return [tensor for tensor in tensors_of(tree) if tensor.is_floating_point()]


def split_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model, from an item of a loader.

    A tensor is the input. A mapping, also HF's `BatchEncoding`, gives keyword arguments. Of a tuple or list the first
    item is the input, as in `(images, labels)`. A list of color images `[3, H, W]`, as torchvision's detectors take it,
    is one argument, and so is any other object, for instance a dataclass. `Labelled` leaves no doubt.

    Args:
        batch: The item.
    """
    if isinstance(batch, Labelled):
        inputs = batch.inputs
        if isinstance(inputs, tuple | list) and not _is_list_of_images(inputs):
            return tuple(inputs), {}
    elif isinstance(batch, tuple | list) and batch and not _is_image_batch(batch):
        inputs = batch[0]
    else:
        inputs = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def find_labels(batch: Any) -> Any:
    """The labels of a batch: those of `Labelled`, or the second item of a pair; None if it has none.

    Args:
        batch: An item of a loader.
    """
    if isinstance(batch, Labelled):
        return batch.labels
    if isinstance(batch, tuple | list) and len(batch) > 1 and not _is_image_batch(batch):
        return batch[1]
    return None


def count_samples(batch: Any) -> int:
    """Number of samples in a batch as `forward.call_model` takes it.

    It is the length of the first input tensor that has a dimension, or the number of images in a list of images
    `[C, H, W]`, as a detector takes it. Inputs without a dimension are one sample.
    """
    args, kwargs = split_inputs(batch)
    if len(args) == 1 and _holds_images(args[0]):
        return len(args[0])
    for tensor in tensors_of((args, kwargs)):
        if tensor.dim() > 0:
            return len(tensor)
    return 1


def _holds_images(argument: Any) -> bool:
    """Whether an argument is a list of images, or a tuple of them, as `zip(*samples)` makes it."""
    is_tuple_of_images = isinstance(argument, tuple) and _are_color_images(argument)
    return is_tuple_of_images or _is_list_of_images(argument)


def _is_image_batch(batch: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a batch is a list of images for a detector, and not `[inputs, labels]`. A tuple never is one."""
    return isinstance(batch, list) and _are_color_images(batch)


def _are_color_images(values: tuple[Any, ...] | list[Any]) -> bool:
    """Whether values are images `[3, H, W]` of a size that no other inputs with 3 rows are likely to have."""
    for value in values:
        if not isinstance(value, torch.Tensor) or value.dim() != 3:
            return False
        channels, height, width = value.shape
        is_large = min(height, width) >= _MIN_IMAGE_SIDE
        if channels != _COLOR_CHANNELS or not is_large or not value.is_floating_point():
            return False
    return bool(values)


def _is_list_of_images(value: Any) -> bool:
    """Whether a value is a list of images without a batch axis, and not a list of inputs `[N, ...]`."""
    if not isinstance(value, list) or not value:
        return False
    for item in value:
        is_image = isinstance(item, torch.Tensor) and item.dim() == 3
        if not is_image or len(item) > _MAX_IMAGE_CHANNELS:
            return False
    return True


def list_filled_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches that hold samples.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch holds samples.
    """
    require_batches(batches)
    num_batches = 0
    filled = []
    for batch in batches:
        num_batches += 1
        if count_samples(batch) > 0:
            filled.append(batch)
    if not filled:
        problem = f"all {num_batches} batches are empty" if num_batches else "there is no batch"
        raise DataError(
            f"{problem}.", "give at least one with samples, for instance of the calibration data."
        )
    return filled


def join_batches(batches: Iterable[Any]) -> Any:
    """All batches as one, for `forward.call_model`.

    Tensors with one row per sample are joined along their first axis. Anything else, such as a table of positions or a
    number, must be the same in every batch, and the result holds it once.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch with samples, or batches that differ in more than their samples.
    """
    filled = list_filled_batches(batches)
    sizes = [count_samples(batch) for batch in filled]
    try:
        plain = [to_plain(split_inputs(batch)) for batch in filled]
        joined = iter(tree_leaves(tree_map_with_path(partial(_join, sizes), *plain)))
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the batches cannot be joined into one: {error}",
            "give batches that differ in their first size only.",
        ) from error
    args, kwargs = map_leaves(lambda _: next(joined), split_inputs(filled[0]))
    if kwargs:
        return kwargs
    return Labelled(args) if len(args) > 1 else (args[0],)


def _join(sizes: list[int], path: Any, *leaves: Any) -> Any:
    """Join the leaves of all batches at one path.

    Args:
        sizes: Number of samples of each batch.
        path: The path of the leaves in their batches.
        leaves: One for each batch.
    """
    are_samples = map(is_by_sample, leaves, sizes)
    if all(are_samples):
        return torch.cat(leaves)
    first = leaves[0]
    if all(_are_equal(first, leaf) for leaf in leaves[1:]):  # NaN differs from itself
        return first
    raise DataError(
        f"the input {keystr(path[1:])} differs between batches, and its first axis is not the samples.",
        "give it the samples first, the same in every batch, or one batch only.",
    )


def is_by_sample(leaf: Any, size: int) -> bool:
    """Whether a part of a batch is a tensor with one row for each sample.

    Args:
        leaf: The part of a batch.
        size: Number of samples of the batch.
    """
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == size


def take_samples(batch: Any, n: int) -> Any:
    """The first `n` samples of a batch, in the same containers; the batch itself if it has no more.

    Tensors with one row for each sample are cut, and so is a list of images. Anything else stays.

    Args:
        batch: As for `qdq.predict`.
        n: Number of samples, at least 1.
    """
    if n >= count_samples(batch):
        return batch
    return _select_samples(batch, slice(n))


def drop_samples(batch: Any, n: int) -> Any:
    """A batch without its first `n` samples, in the same containers; cut as by `take_samples`.

    Args:
        batch: As for `qdq.predict`.
        n: Number of samples, fewer than there are.
    """
    return _select_samples(batch, slice(n, None))


def _select_samples(batch: Any, rows: slice) -> Any:
    size = count_samples(batch)
    if isinstance(batch, Labelled):
        inputs = _select_rows(batch.inputs, size, rows)
        return Labelled(inputs, _select_rows(batch.labels, size, rows))
    return _select_rows(batch, size, rows)


def _select_rows(part: Any, size: int, rows: slice) -> Any:
    """Some rows of every tensor with one row for each sample, and some items of a list of samples."""
    is_list_of_samples = isinstance(part, list) and len(part) == size
    if is_list_of_samples and not any(is_by_sample(item, size) for item in part):
        return part[rows]
    if isinstance(part, tuple):
        return tuple(_select_rows(item, size, rows) for item in part)
    return map_leaves(partial(_cut_leaf, size, rows), part)


def _cut_leaf(size: int, rows: slice, leaf: Any) -> Any:
    if is_by_sample(leaf, size):
        return leaf[rows]
    return leaf


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two parts of batches are equal, as tensors or as other values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)
