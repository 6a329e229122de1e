"""What the accuracy passes changed in a model, so that it can be taken back and done again.

`round_weights` and `correct_bias` fit weights and biases to the ranges, and to the layers that are in int8. A call that
changes ranges or layers afterwards therefore takes these changes back, does its own work on the weights of the float
model, and does the passes again: rounding first, then biases. So every order of the calls gives the same model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdq.nn import QuantMixin

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_accuracy_passes"  # of a model


@dataclass(frozen=True, eq=False)
class AccuracyPass:
    """A pass that has changed a model.

    Args:
        name: The public function.
        rank: Passes run in the order of their ranks.
        run: Does it again on a model, with the same options and data.
    """

    name: str
    rank: int
    run: Callable[[nn.Module], object]

    def __deepcopy__(self, _: dict[int, Any]) -> AccuracyPass:
        return self  # a copy of the model shares the data of the pass


def list_passes(model: nn.Module) -> list[AccuracyPass]:
    """The passes that have changed a model, in the order of their ranks.

    Args:
        model: Any model; what is none has no passes, and the call that got it refuses it.
    """
    passes: list[AccuracyPass] = getattr(model, "__dict__", {}).get(_ATTRIBUTE, [])
    return list(passes)


def record_pass(model: nn.Module, accuracy_pass: AccuracyPass) -> None:
    """Remember that a pass has changed a model; an earlier one of the same name is forgotten.

    Args:
        model: The model.
        accuracy_pass: The pass.
    """
    passes = [former for former in list_passes(model) if former.name != accuracy_pass.name]
    passes.append(accuracy_pass)
    vars(model)[_ATTRIBUTE] = sorted(passes, key=lambda entry: entry.rank)


def forget_passes(model: nn.Module) -> None:
    """Forget the passes and the kept weights: what the passes changed is part of the model from now on.

    Args:
        model: The model.
    """
    vars(model).pop(_ATTRIBUTE, None)
    for layer in _list_layers(model):
        layer.forget_float()


def undo_passes(model: nn.Module) -> list[AccuracyPass]:
    """Give all layers the weights and biases of the float model, and forget the passes.

    Args:
        model: The model.

    Returns:
        The passes, for `redo_passes`.
    """
    passes = list_passes(model)
    for layer in _list_layers(model):
        layer.restore_float()
    forget_passes(model)
    return passes


def redo_passes(model: nn.Module, passes: list[AccuracyPass]) -> None:
    """Do passes again, each with the data that it was called with.

    Args:
        model: The model.
        passes: From `undo_passes`.
    """
    for accuracy_pass in passes:
        logger.info("%s is done again", accuracy_pass.name)
        accuracy_pass.run(model)


@contextmanager
def redoing_passes(model: nn.Module) -> Iterator[None]:
    """In the block the model has the weights of the float model; after it, the passes are done again.

    If the block or a pass fails, weights, biases and passes are those of before.

    Args:
        model: The model.
    """
    if not list_passes(model):
        yield
        return
    former = Snapshot(model)
    passes = undo_passes(model)
    try:
        yield
        redo_passes(model, passes)
    except BaseException:
        former.restore(model)
        raise


@contextmanager
def undoing_passes(model: nn.Module) -> Iterator[list[AccuracyPass]]:
    """Like `redoing_passes`, but the block itself does again what it wants; it gets the passes.

    If the block fails, weights, biases and passes are those of before. After Ctrl-C, what the block did stays.

    Args:
        model: The model.
    """
    former = Snapshot(model)
    passes = undo_passes(model)
    try:
        yield passes
    except Exception:
        former.restore(model)
        raise


class Snapshot:
    """The weights and biases that passes gave a model, and these passes.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._passes = list_passes(model)
        self._layers = [(layer, _copy_parameters(layer)) for layer in _list_layers(model)]

    def restore(self, model: nn.Module) -> None:
        """Give the model these weights, biases and passes again."""
        undo_passes(model)
        for layer, parameters in self._layers:
            _put_back(layer, parameters)
        for accuracy_pass in self._passes:
            record_pass(model, accuracy_pass)


def _list_layers(model: nn.Module) -> list[QuantMixin]:
    """The layers whose weight or bias a pass has changed."""
    layers = []
    for module in model.modules():
        if isinstance(module, QuantMixin) and module.keeps_float:
            layers.append(module)
    return layers


def _copy_parameters(layer: QuantMixin) -> dict[str, torch.Tensor]:
    parameters = layer.named_parameters(recurse=False)
    return {name: parameter.detach().clone() for name, parameter in parameters}


def _put_back(layer: QuantMixin, parameters: dict[str, torch.Tensor]) -> None:
    """Give a layer the parameters that a pass gave it; those of the float layer are kept beside them."""
    layer.keep_float()
    with torch.no_grad():
        for name, values in parameters.items():
            if layer._parameters.get(name) is None:
                layer._parameters[name] = nn.Parameter(values, bool(layer.weight.requires_grad))
            else:
                layer._parameters[name].copy_(values)  # type: ignore[union-attr]
