"""A convolution or linear layer with more channels than it was built with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from qdq.quantize import own_tensor

ADDED_KEY = "added_channels"
"""The buffer of a layer that is wider: how many outputs and inputs were added, int64 `[2]`."""

_SIZES = ("out_channels", "in_channels", "groups", "out_features", "in_features")


def resize_layer(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Add channels behind those of a layer, with weights and biases of 0, or take the last ones back, in place.

    The parameters are new ones: an optimizer that has the former ones does not see them.

    Args:
        layer: A convolution or linear layer; one with groups has a filter for each channel.
        outputs: Number of output channels to add; negative to take back.
        inputs: Number of input channels, likewise; of a layer with groups the same.
    """
    resized: Any = layer
    weight = _resize_axis(resized.weight, 0, outputs)
    if not _has_groups(layer):
        weight = _resize_axis(weight, 1, inputs)
    _replace(layer, "weight", weight)
    if resized.bias is not None:
        _replace(layer, "bias", _resize_axis(resized.bias, 0, outputs))
    _count(layer, outputs, inputs)


def read_added(layer: nn.Module) -> torch.Tensor:
    """How many outputs and inputs were added to a layer, int64 `[2]` on the CPU.

    Args:
        layer: Any module.
    """
    added = layer._buffers.get(ADDED_KEY)
    return _count_of(0, 0) if added is None else added.cpu()


@contextmanager
def undoing_widths(layers: Iterable[nn.Module]) -> Iterator[None]:
    """After an error or Ctrl-C in the block, layers have the parameters and numbers of channels that they had before.

    A layer that ends with its former size has its former parameters in any case, with the new values.

    Args:
        layers: Those that the block may make wider.
    """
    former = []
    for layer in layers:
        sizes = {name: getattr(layer, name) for name in _SIZES if hasattr(layer, name)}
        former.append((layer, sizes, dict(layer._parameters), layer._buffers.get(ADDED_KEY)))
    try:
        yield
    except BaseException:
        for layer, sizes, parameters, added in former:
            for name, size in sizes.items():
                setattr(layer, name, size)
            layer._parameters.update(parameters)
            layer._buffers.pop(ADDED_KEY, None)
            if added is not None:
                layer.register_buffer(ADDED_KEY, added)
        raise
    for layer, _, parameters, _ in former:
        _put_back(layer, parameters)


@torch.no_grad()
def _put_back(layer: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Put former parameters back where the present ones have the same shape: an optimizer may hold them."""
    for name, former in parameters.items():
        present = layer._parameters.get(name)
        if former is None or present is None or present is former:
            continue
        if present.shape == former.shape:
            if not torch.equal(present, former):
                former.copy_(present)
            layer._parameters[name] = former


def _has_groups(layer: Any) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1


def _resize_axis(tensor: torch.Tensor, dim: int, number: int) -> torch.Tensor:
    """The tensor with zeros behind an axis, or without its last entries if the number is negative."""
    behind = [0, 0] * (tensor.dim() - dim - 1)  # F.pad begins with the last axis
    return F.pad(tensor.detach(), [*behind, 0, number])


def _replace(layer: nn.Module, name: str, values: torch.Tensor) -> None:
    """Give a layer a new parameter: one that changes its shape would not fit graphs that autograd still holds."""
    former = getattr(layer, name)
    if former.dim() == 4 and former.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    setattr(layer, name, nn.Parameter(own_tensor(values), requires_grad=former.requires_grad))


def _count(layer: Any, outputs: int, inputs: int) -> None:
    """Add to the numbers of channels that a layer states, and to those that were added.

    Args:
        layer: The layer.
        outputs: Number of outputs that it has more; negative if it has fewer.
        inputs: Likewise of inputs.
    """
    if _has_groups(layer):
        layer.groups += outputs
    if isinstance(layer, _ConvNd):
        layer.out_channels += outputs
        layer.in_channels += inputs
    else:
        layer.out_features += outputs
        layer.in_features += inputs
    added = read_added(layer) + _count_of(outputs, inputs)
    layer._buffers.pop(ADDED_KEY, None)
    if added.any():
        layer.register_buffer(ADDED_KEY, own_tensor(added.to(layer.weight.device)))


def _count_of(outputs: int, inputs: int) -> torch.Tensor:
    return torch.tensor([outputs, inputs], dtype=torch.int64, device="cpu")
