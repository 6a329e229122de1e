"""Hooks on the layers of a model, which show the inputs and outputs of each call to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from qdq.device import without_tf32
from qdq.distiller.settings.positions import as_positional
from qdq.errors import StateError
from qdq.forward import evaluating
from qdq.text import printable

_PASSING = (_DropoutNd, nn.Identity)  # in evaluation, they return their input


class Slot(NamedTuple):
    """One tensor of a layer.

    Args:
        layer: Name of the layer.
        position: Position of the input; None is the output.
    """

    layer: str
    position: int | None

    @property
    def label(self) -> str:
        """The name for messages."""
        kind = "output" if self.position is None else f"input {self.position}"
        return f"{kind} of {printable(self.layer)}"


Observe = Callable[[Slot, torch.Tensor], None]


@contextmanager
def watching_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    begin: Callable[[], None],
    observe: Observe,
) -> Iterator[None]:
    """Show every floating-point tensor that enters or leaves a layer, in calls of the model in the block.

    In the block the model is in evaluation mode, without gradients, without TF32, and no layer works in place. Inputs
    are shown before the call.

    Args:
        model: The model.
        layers: Name -> layer.
        begin: Called before each call of the model.
        observe: Takes a slot and a tensor with values.

    Raises:
        StateError: A layer changes its input in place although it has no such setting; raised by the call.
    """
    with ExitStack() as exits:
        exits.enter_context(evaluating(model))
        exits.enter_context(without_tf32())
        exits.enter_context(_out_of_place(model))
        exits.callback(model.register_forward_pre_hook(lambda *_: begin()).remove)
        for name, layer in layers.items():
            watcher = _Watcher(name, observe)
            exits.callback(layer.register_forward_pre_hook(watcher.enter, with_kwargs=True).remove)
            exits.callback(layer.register_forward_hook(watcher.leave, with_kwargs=True).remove)
        yield


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch off the setting of layers that work in place."""
    changed: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in changed:
        module.inplace = False
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True


class _Watcher:
    """The hooks of one layer."""

    def __init__(self, name: str, observe: Observe) -> None:
        self._name = name
        self._observe = observe
        self._versions: dict[int, int | None] = {}  # id of an input -> its version before the call

    def enter(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Before a call."""
        args, _ = as_positional(layer, self._name, args, keywords)
        self._versions = {id(value): _version_of(value) for value in args}
        for position, value in enumerate(args):
            self._show(position, value)

    def leave(
        self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        """After a call."""
        args, _ = as_positional(layer, self._name, args, keywords)
        is_input = any(output is value for value in args)
        if is_input and not isinstance(layer, _PASSING):
            self._require_unchanged(layer, output)
        self._show(None, output)

    def _show(self, position: int | None, value: Any) -> None:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if is_float and value.numel():
            self._observe(Slot(self._name, position), value)

    def _require_unchanged(self, layer: nn.Module, output: Any) -> None:
        """Refuse an output that is the input and was changed; a tensor without versions may have been."""
        version = _version_of(output)
        if version is not None and version == self._versions[id(output)]:
            return
        raise StateError(
            f"{printable(self._name)}, a {type(layer).__name__}, changes its input in place.",
            "write it so that it returns a new tensor; a layer may have the setting inplace, which is switched off.",
        )


def _version_of(value: Any) -> int | None:
    """How often a tensor has been changed in place; None if it does not know."""
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version
