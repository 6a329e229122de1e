"""Gradients during an analysis: a check that they exist, and a block that freezes the parameters."""

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
    tensors = [*model.parameters(), *model.buffers()]
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        raise StateError(
            "confirm needs gradients, and torch.inference_mode has none.",
            "create and analyze the model outside of it, or omit confirm.",
        )


@contextmanager
def freezing_parameters(model: nn.Module) -> Iterator[None]:
    """Compute no gradients for parameters in the block.

    Parameters created in `torch.inference_mode` never have gradients, and their flag cannot be restored.
    """
    parameters = []
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_inference():
            parameters.append(parameter)

    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
