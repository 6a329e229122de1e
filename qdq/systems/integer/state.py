"""The state of integer layers: buffers that keep their types, in a model that is no replica, codes that are loaded."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from qdq.distributed import find_rank
from qdq.errors import StateError


class TypedState(nn.Module):
    """A module whose own buffers follow it to a device and never to another type.

    `half()` or `to(dtype)` of a model would round scales, ranges and multipliers.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        former = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in former.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def require_original(module: nn.Module, label: str) -> None:
    """Refuse to change the state of a replica, which is thrown away after one forward.

    Args:
        module: The module whose state is about to change.
        label: Name of the layer, for the message.

    Raises:
        StateError: It is a replica of nn.DataParallel.
    """
    if getattr(module, "_is_replica", False):
        raise StateError(
            f"{label}: a replica of nn.DataParallel calibrates, and its ranges would be lost.",
            "calibrate and freeze the model itself, before it is wrapped.",
        )


def require_sole(module: nn.Module, label: str) -> None:
    """Refuse to calibrate where ranges would be lost, or would differ from those of others.

    Args:
        module: The module that calibrates.
        label: Name of the layer, for the message.

    Raises:
        StateError: It is a replica, or there are several processes.
    """
    require_original(module, label)
    _, num_processes = find_rank()
    if num_processes > 1:
        raise StateError(
            f"{label}: {num_processes} processes calibrate, each of which would get its own range.",
            "calibrate in one process and load its state dict in the others.",
        )


def fit_parameters(layer: Any, state_dict: Any, prefix: str, is_frozen: bool) -> None:
    """Give a float layer parameters of the kind in a state dict, codes or floats, before they are loaded.

    Args:
        layer: The layer, with weight and bias.
        state_dict: The state to load.
        prefix: Of the names of the layer in it.
        is_frozen: Whether they are codes.
    """
    dtype = torch.int32 if is_frozen else torch.float32
    device = layer.weight.device
    for name in ("weight", "bias"):
        value = state_dict.get(f"{prefix}{name}")
        former = getattr(layer, name)
        is_other = former is None or former.is_floating_point() == is_frozen
        if value is not None and is_other:
            empty = torch.empty(value.shape, dtype=dtype, device=device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=not is_frozen))
