"""A layer whose input is multiplied by a factor for each channel, or shifted, in front of its quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qdq.quantize import own_tensor

_FACTORS = "input_factors"
OFFSET_KEY = "input_offset"
"""The buffer of a layer that has an offset."""
_HANDLES = "_input_handles"

_Hook = Callable[..., Any]


def scale_input(layer: nn.Module, factors: torch.Tensor) -> None:
    """Multiply the input of a layer by factors, which are a buffer of it, whenever it is called; in place.

    The product is outside of the forward of the layer, so `swap_modules` puts the quantizer behind it. A layer that has
    factors gets their product with the new ones.

    Args:
        layer: A layer with one input.
        factors: In a shape that broadcasts with the input: `[C]`, or `[C, 1, 1]` for a convolution of images.
    """
    former = layer._buffers.get(_FACTORS)
    if former is not None:
        former.mul_(factors)
        return
    layer.register_buffer(_FACTORS, own_tensor(factors))
    _add_hook(layer, _multiply_input)


def factors_of(layer: nn.Module) -> torch.Tensor | None:
    """A copy of the factors of a layer; None if it has none."""
    factors = layer._buffers.get(_FACTORS)
    return None if factors is None else factors.clone()


def restore_input(layer: nn.Module) -> None:
    """Undo `scale_input`; nothing if the layer has no factors.

    Args:
        layer: Any module.
    """
    if _FACTORS in layer._buffers:
        delattr(layer, _FACTORS)
        _remove_hook(layer, _multiply_input)


def shift_input(layer: nn.Module, offset: torch.Tensor) -> None:
    """Subtract an offset, which is a buffer of the layer, from its input whenever it is called; in place.

    As for `scale_input`, the quantizer is behind it.

    Args:
        layer: A layer with one input, which has no offset yet.
        offset: A scalar, `[]`.
    """
    layer.register_buffer(OFFSET_KEY, own_tensor(offset))
    _add_hook(layer, _subtract_offset)


def unshift_input(layer: nn.Module) -> None:
    """Undo `shift_input`.

    Args:
        layer: A layer that has an offset.
    """
    delattr(layer, OFFSET_KEY)
    _remove_hook(layer, _subtract_offset)


def is_shifted(layer: nn.Module) -> bool:
    """Whether a layer has an offset."""
    return OFFSET_KEY in layer._buffers


def offset_of(layer: nn.Module) -> float:
    """The offset of a layer, 0 if it has none."""
    return float(getattr(layer, OFFSET_KEY)) if is_shifted(layer) else 0.0


def shift_of_mean(layer: nn.Module, quantized: torch.Tensor) -> torch.Tensor:
    """What the rounding of the weight takes away from the bias of a shifted layer, `[Cout]`.

    With an input x, a layer computes W (x - c) + b for its offset c, where b has W c already. With rounded weights W',
    b must have W' c instead: then the offset does not move the mean of the output, however the weight is rounded.

    Args:
        layer: A convolution or linear layer that has an offset.
        quantized: Its rounded weight.
    """
    weight = layer._parameters["weight"]  # `layer.weight` may be the rounded one, see QuantMixin
    assert weight is not None  # noqa: S101
    shift: torch.Tensor = getattr(layer, OFFSET_KEY) * (quantized - weight).flatten(1).sum(1)
    return shift


def list_offsets(model: nn.Module) -> list[float]:
    """The offsets of all layers of a model."""
    offsets = []
    for layer in model.modules():
        if is_shifted(layer):
            offsets.append(offset_of(layer))
    return offsets


def _add_hook(layer: nn.Module, hook: _Hook) -> None:
    """Call a function before each forward of a layer.

    The layer keeps the handle: a process that loads the pickled layer then gives its new hooks other numbers. torch
    counts hooks from 0 in each process. A global hook with the same number would get the arguments of this one, and a
    new hook of the layer would replace it.
    """
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    vars(layer).setdefault(_HANDLES, {})[hook] = handle


def _remove_hook(layer: nn.Module, hook: _Hook) -> None:
    """Undo `_add_hook`."""
    handles = vars(layer)[_HANDLES]
    handles.pop(hook).remove()
    if not handles:
        del vars(layer)[_HANDLES]


def _multiply_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    factors = getattr(layer, _FACTORS)
    return change_input(args, kwargs, lambda x: x * factors)


def _subtract_offset(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    offset = getattr(layer, OFFSET_KEY)
    return change_input(args, kwargs, lambda x: x - offset)


def change_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the input changed; it is the first argument, by position or by name.

    Args:
        args: The arguments by position.
        kwargs: The arguments by name.
        change: What is done to the input.
    """
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}
