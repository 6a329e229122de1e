"""A layer whose input is multiplied by a factor for each channel, in front of its quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.quantize import own_tensor

_ATTRIBUTE = "input_factors"


def scale_input(layer: nn.Module, factors: torch.Tensor) -> None:
    """Multiply the input of a layer by factors, which are a buffer of it, whenever it is called; in place.

    The product is outside of the forward of the layer, so `swap_modules` puts the quantizer behind it. A layer that has
    factors gets their product with the new ones.

    Args:
        layer: A layer with one input.
        factors: In a shape that broadcasts with the input: `[C]`, or `[C, 1, 1]` for a convolution of images.
    """
    former = layer._buffers.get(_ATTRIBUTE)
    if former is not None:
        former.mul_(factors)
        return
    layer.register_buffer(_ATTRIBUTE, own_tensor(factors))
    layer.register_forward_pre_hook(_multiply_input, with_kwargs=True)


def restore_input(layer: nn.Module) -> None:
    """Undo `scale_input`; nothing if the layer has no factors.

    Args:
        layer: Any module.
    """
    if _ATTRIBUTE not in layer._buffers:
        return
    delattr(layer, _ATTRIBUTE)
    for number, hook in list(layer._forward_pre_hooks.items()):
        if hook is _multiply_input:
            del layer._forward_pre_hooks[number]
            layer._forward_pre_hooks_with_kwargs.pop(number, None)


def _multiply_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the input scaled; it is the first argument, by position or by name."""
    factors = getattr(layer, _ATTRIBUTE)
    if args:
        return (args[0] * factors, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: kwargs[name] * factors}
