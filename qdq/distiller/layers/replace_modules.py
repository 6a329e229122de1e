"""Modules in the place of others, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from qdq.device import find_device


@contextmanager
def undoing_swap(model: nn.Module) -> Iterator[None]:
    """Put all modules back, with the parameters that they had, if the block fails.

    Args:
        model: The model.
    """
    former = []
    for module in model.modules():
        former.append((module, dict(module._modules), dict(module._parameters)))
    try:
        yield
    except Exception:
        for module, children, parameters in former:
            module._modules.update(children)
            module._parameters.update(parameters)
        raise


def put_in(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, at all their names, on their device and in their mode.

    Args:
        model: The model.
        replacements: Module -> the one that takes its place.
    """
    device = find_device(model)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            replacement = None if child is None else replacements.get(child)
            if child is not None and replacement is not None:
                parameter = next(child.parameters(), None)
                replacement.to(device if parameter is None else parameter.device)
                parent._modules[key] = replacement.train(child.training)
