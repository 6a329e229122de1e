"""`TypedState`: buffers that keep their types when a model is cast."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


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
