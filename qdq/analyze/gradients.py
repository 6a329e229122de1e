"""Gradients during an analysis: a check that they exist, and a block that prepares layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qdq.errors import StateError


def require_gradients(model: nn.Module) -> None:
    """Refuse `confirm` where autograd does not work.

    Raises:
        StateError: In `torch.inference_mode`, or for a model that was created there.
    """
    if not has_gradients(model):
        raise StateError(
            "confirm needs gradients, and torch.inference_mode has none.",
            "create and analyze the model outside of it, or omit confirm.",
        )


def has_gradients(model: nn.Module) -> bool:
    """Whether autograd works: not in `torch.inference_mode`, nor for a model that was created there."""
    tensors = [*model.parameters(), *model.buffers()]
    is_made_without = any(tensor.is_inference() for tensor in tensors)
    return not (is_made_without or torch.is_inference_mode_enabled())


@contextmanager
def recording_recurrence(model: nn.Module) -> Iterator[None]:
    """Have the recurrent layers of a model on a GPU record what their gradients need, with the same outputs.

    cuDNN does so only in training mode, where a layer also drops values out, so the block sets dropout to 0.
    """
    layers = []
    for layer in model.modules():
        is_on_cpu = all(parameter.device.type == "cpu" for parameter in layer.parameters())
        if isinstance(layer, nn.RNNBase) and not is_on_cpu:
            layers.append((layer, layer.training, layer.dropout))
    try:
        for layer, _, _ in layers:
            layer.training, layer.dropout = True, 0.0
        yield
    finally:
        for layer, is_training, dropout in layers:
            layer.training, layer.dropout = is_training, dropout
