"""The state of integer layers: buffers that keep their types, in one model that is no replica."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

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
