"""`MaxCalibrator` as pytorch-quantization has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.compat.calib.calibrator import _Calibrator
from qdq.errors import CalibrationError, StateError
from qdq.observers.finite import require_finite, require_tensor
from qdq.observers.max import Axis, reduce_amax


class MaxCalibrator(_Calibrator):
    """Running maximum of |x|, in `_calib_amax`.

    On a GPU nothing waits for the device before `compute_amax`, which then refuses NaN and Inf.

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
        self._amaxs: list[torch.Tensor] = []
        # Number of the first batch with NaN or Inf, -1 if there is none; only of batches on a GPU.
        self._first_defect: torch.Tensor | None = None
        self.num_batches = 0

    @property
    def amaxs(self) -> list[npt.NDArray[np.float32]]:
        """The maximum of each batch; empty unless tracked."""
        return [amax.cpu().numpy() for amax in self._amaxs]

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Add one batch; an empty one changes nothing.

        Raises:
            CalibrationError: NaN or Inf in the batch; on a GPU `compute_amax` raises it.
            RuntimeError: The length of the kept axis has changed.
            ValueError: The batch does not have the kept axis.
        """
        require_tensor(x)
        if x.numel() == 0:
            return
        amax = reduce_amax(x, self._axis)
        # One element is 0-D, whatever the axes.
        amax = amax.reshape(()) if amax.numel() == 1 else amax
        if x.is_cpu:
            require_finite(amax, x)
        else:
            self._note_defect(amax)
        self._merge(amax)
        self.num_batches += 1

    def _note_defect(self, amax: torch.Tensor) -> None:
        """Remember on the device whether this batch is the first one with NaN or Inf."""
        is_broken = ~torch.isfinite(amax).all()
        number = torch.full_like(is_broken, self.num_batches, dtype=torch.int64)
        defect = torch.where(is_broken, number, torch.full_like(number, -1))
        if self._first_defect is not None:
            former = self._first_defect.to(defect.device)
            defect = torch.where(former < 0, defect, former)
        self._first_defect = defect

    def _require_no_defect(self) -> None:
        if self._first_defect is None:
            return
        number = int(self._first_defect)
        if number >= 0:
            raise CalibrationError(
                f"batch {number} has values that are NaN or Inf; a range needs finite ones.",
                "run the float model on this batch: either the data or a layer before this one is broken.",
            )

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
            self._amaxs.append(amax.clone())

    def compute_amax(self) -> torch.Tensor | None:
        """The maximum so far as a copy, or None before any data.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU.
        """
        if self._calib_amax is None:
            return None
        self._require_no_defect()
        return self._calib_amax.clone()

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._track_amax})"

    def __repr__(self) -> str:
        return (
            f"MaxCalibrator(num_bits={self._num_bits} axis={self._axis} unsigned={self._unsigned} "
            f"calib_amax={self._calib_amax} track_amax={self._track_amax})"
        )
