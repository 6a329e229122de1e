"""The base class of calibrators."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import UnsupportedError
from qdq.observers.max import Axis


class _Calibrator:
    """The base of every calibrator; scripts derive their own from it.

    Args:
        num_bits: Width of the format, (4, 3) for FP8.
        axis: The kept axes, or None for one range.
        unsigned: Whether codes start at 0.
    """

    _num_bits: Any  # an int or (4, 3); every value is accepted until a solver needs it

    def __init__(self, num_bits: Any, axis: Axis, unsigned: bool) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned

    def collect(self, x: torch.Tensor) -> None:
        """Add one batch."""
        raise _not_overridden(self, "collect")

    def reset(self) -> None:
        """Forget all batches."""
        raise _not_overridden(self, "reset")

    def compute_amax(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The range, None before data."""
        raise _not_overridden(self, "compute_amax")


def _not_overridden(calibrator: _Calibrator, method: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(calibrator).__name__} has no {method}().", f"define {method} in the class."
    )
