"""Batches: how one is unpacked for a model, how many samples it has, and several batches as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

from qdq.errors import ArgumentTypeError, DataError

_MAX_IMAGE_CHANNELS = 4


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


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors among the inputs or outputs of a model, in order; all other values in them are left out.

    Args:
        tree: Tensors and other values, in lists, tuples and dictionaries of any depth.
    """
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def floats_of(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors among the inputs or outputs of a model, in order.

    Args:
        tree: As for `tensors_of`.
    """
    return [tensor for tensor in tensors_of(tree) if tensor.is_floating_point()]


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model, from an item of a loader.

    A tensor is the input; a mapping gives keyword arguments; of a tuple or list the first item is the input, as in
    `(images, labels)`.
    """
    if isinstance(inputs, tuple | list) and inputs:
        inputs = inputs[0]
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def count_samples(batch: Any) -> int:
    """Number of samples in a batch as `forward.call_model` takes it.

    It is the length of the first input tensor that has a dimension, or the number of images in a list of images
    `[C, H, W]`, as a detector takes it. Inputs without a dimension are one sample.
    """
    args, kwargs = split_inputs(batch)
    if len(args) == 1 and _is_list_of_images(args[0]):
        return len(args[0])
    for tensor in tensors_of((args, kwargs)):
        if tensor.dim() > 0:
            return len(tensor)
    return 1


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
        args, kwargs = tree_map_with_path(partial(_join, sizes), *map(split_inputs, filled))
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the batches cannot be joined into one: {error}",
            "give batches that differ in their first size only.",
        ) from error
    return kwargs or (args[0],)


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


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two parts of batches are equal, as tensors or as other values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)
