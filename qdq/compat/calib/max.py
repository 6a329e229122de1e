"""`MaxCalibrator` as pytorch-quantization has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.compat.calib.calibrator import _Calibrator
from qdq.errors import StateError
from qdq.observers.finite import require_finite, require_tensor
from qdq.observers.max import Axis, reduce_amax


class MaxCalibrator(_Calibrator):
    """Running maximum of |x|, in `_calib_amax`.

    Args:
        num_bits: Width of the format; a maximum does not depend on it.
        axis: The kept axes (negative ones count from the end), or None for one maximum.
        unsigned: As `num_bits`.
        track_amax: Keep the maximum of every batch in `amaxs`.
    """

    def __init__(self, num_bits: Any, axis: Axis, unsigned: bool, track_amax: bool = False) -> None:
        super().__init__(num_bits, axis, unsigned)
        self._track_amax = track_amax
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._calib_amax: torch.Tensor | None = None
        self._amaxs: list[npt.NDArray[np.float32]] = []
        self.num_batches = 0

    @property
    def amaxs(self) -> list[npt.NDArray[np.float32]]:
        """The maximum of each batch; empty unless tracked."""
        return self._amaxs

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Add one batch; an empty one changes nothing.

        Raises:
            CalibrationError: NaN or Inf in the batch.
            RuntimeError: The length of the kept axis has changed.
            ValueError: The batch does not have the kept axis.
        """
        require_tensor(x)
        if x.numel() == 0:
            return
        amax = reduce_amax(x, self._axis)
        # One element is 0-D, whatever the axes.
        amax = amax.reshape(()) if amax.numel() == 1 else amax
        require_finite(amax, x)
        self._merge(amax)
        self.num_batches += 1

    def _merge(self, amax: torch.Tensor) -> None:
        if self._calib_amax is None:
            self._calib_amax = amax
        elif self._calib_amax.shape != amax.shape:
            raise StateError(
                f"amax shape changed! It was {tuple(self._calib_amax.shape)}, this batch gives {tuple(amax.shape)}.",
                "feed batches whose kept axis always has the same length, or calibrate per tensor (axis=None).",
            )
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax.to(self._calib_amax.device))
        if self._track_amax:
            self._amaxs.append(amax.cpu().numpy().copy())

    def compute_amax(self) -> torch.Tensor | None:
        """The maximum so far as a copy, or None before any data."""
        if self._calib_amax is None:
            return None
        return self._calib_amax.clone()

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._track_amax})"

    def __repr__(self) -> str:
        return (
            f"MaxCalibrator(num_bits={self._num_bits} axis={self._axis} unsigned={self._unsigned} "
            f"calib_amax={self._calib_amax} track_amax={self._track_amax})"
        )
