"""`MaxCalibrator` as pytorch-quantization has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.compat.calib.calibrator import _Calibrator
from qdq.observers import MaxCalibrator as CoreMaxCalibrator
from qdq.observers.max import Axis


class MaxCalibrator(CoreMaxCalibrator, _Calibrator):
    """Running maximum of |x|, in `_calib_amax`.

    Args:
        num_bits: Width of the format; a maximum does not depend on it.
        axis: The kept axes (negative ones count from the end), or None for one maximum.
        unsigned: As `num_bits`.
        track_amax: Keep the maximum of every batch in `amaxs`.
    """

    _num_bits: Any

    def __init__(self, num_bits: Any, axis: Axis, unsigned: bool, track_amax: bool = False) -> None:
        self._track_amax = track_amax
        super().__init__(num_bits, axis, unsigned)

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._amaxs: list[npt.NDArray[np.float32]] = []

    @property
    def amaxs(self) -> list[npt.NDArray[np.float32]]:
        """The maximum of each batch; empty unless tracked."""
        return self._amaxs

    def _reduce(self, inputs: torch.Tensor) -> torch.Tensor:
        """One element is 0-D, whatever the axes."""
        amax = super()._reduce(inputs)
        return amax.reshape(()) if amax.numel() == 1 else amax

    def _merge(self, amax: torch.Tensor) -> None:
        super()._merge(amax)
        if self._track_amax:
            self._amaxs.append(amax.cpu().numpy().copy())

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._track_amax})"

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]} track_amax={self._track_amax})"
