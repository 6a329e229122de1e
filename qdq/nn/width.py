"""A convolution or linear layer with more channels than it was built with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

ADDED_KEY = "added_channels"
"""The buffer of a layer that is wider: how many outputs and inputs were added, int64 `[2]`."""

_SIZES = ("out_channels", "in_channels", "groups", "out_features", "in_features")


@torch.no_grad()
def widen_layer(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Add channels behind those of a layer, with weights and biases of 0, in place.

    Args:
        layer: A convolution or linear layer; one with groups has a filter for each channel.
        outputs: Number of output channels to add.
        inputs: Number of input channels to add; of a layer with groups the same.
    """
    wider: Any = layer
    wider.weight.data = _append_zeros(wider.weight, 0, outputs)
    if not _has_groups(layer):
        wider.weight.data = _append_zeros(wider.weight, 1, inputs)
    if wider.bias is not None:
        wider.bias.data = _append_zeros(wider.bias, 0, outputs)
    layer.zero_grad()  # gradients of the former size
    _count(layer, outputs, inputs)


@torch.no_grad()
def narrow_layer(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Take back the last channels that `widen_layer` added, in place.

    Args:
        layer: As for `widen_layer`.
        outputs: Number of output channels to take back.
        inputs: Number of input channels to take back.
    """
    narrower: Any = layer
    narrower.weight.data = _drop_last(narrower.weight, 0, outputs)
    if not _has_groups(layer):
        narrower.weight.data = _drop_last(narrower.weight, 1, inputs)
    if narrower.bias is not None:
        narrower.bias.data = _drop_last(narrower.bias, 0, outputs)
    layer.zero_grad()
    _count(layer, -outputs, -inputs)


def read_added(layer: nn.Module) -> torch.Tensor:
    """How many outputs and inputs were added to a layer, int64 `[2]` on the CPU.

    Args:
        layer: Any module.
    """
    added = layer._buffers.get(ADDED_KEY)
    return torch.zeros(2, dtype=torch.int64) if added is None else added.cpu()


@contextmanager
def undoing_widths(layers: Iterable[nn.Module]) -> Iterator[None]:
    """After an error or Ctrl-C in the block, layers have the parameters and numbers of channels that they had before.

    Args:
        layers: Those that the block may make wider.
    """
    former = []
    for layer in layers:
        sizes = {name: getattr(layer, name) for name in _SIZES if hasattr(layer, name)}
        parameters = [(parameter, parameter.data) for parameter in layer.parameters(recurse=False)]
        former.append((layer, sizes, parameters, layer._buffers.get(ADDED_KEY)))
    try:
        yield
    except BaseException:
        for layer, sizes, parameters, added in former:
            for name, size in sizes.items():
                setattr(layer, name, size)
            for parameter, values in parameters:
                parameter.data = values
            layer._buffers.pop(ADDED_KEY, None)
            if added is not None:
                layer.register_buffer(ADDED_KEY, added)
        raise


def _has_groups(layer: Any) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1


def _append_zeros(tensor: torch.Tensor, dim: int, number: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = number
    return torch.cat([tensor.detach(), tensor.new_zeros(shape)], dim)


def _drop_last(tensor: torch.Tensor, dim: int, number: int) -> torch.Tensor:
    return tensor.detach().narrow(dim, 0, tensor.shape[dim] - number).clone()


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
    added = read_added(layer) + torch.tensor([outputs, inputs])
    layer._buffers.pop(ADDED_KEY, None)
    if added.any():
        layer.register_buffer(ADDED_KEY, added.to(layer.weight.device))
