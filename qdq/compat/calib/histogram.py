"""`HistogramCalibrator` as pytorch-quantization has it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.compat.calib.calibrator import _Calibrator
from qdq.compat.tensor_quant import E4M3, EPS
from qdq.errors import ArgumentError, UnsupportedError
from qdq.formats import Format
from qdq.observers import HistogramCalibrator as CoreHistogramCalibrator
from qdq.observers.max import Axis
from qdq.observers.mse import solve_mse_levels

logger = logging.getLogger(__name__)


class HistogramCalibrator(CoreHistogramCalibrator, _Calibrator):
    """Counts |x| in bins of equal width from 0.

    `_calib_hist` and `_calib_bin_edges` are views of one state: tensors if `_torch_hist`, else ndarrays. Both may be
    set, in either order.

    Args:
        num_bits: Width of the format that the solvers assume, (4, 3) for FP8.
        axis: Must be None.
        unsigned: Whether the solvers assume codes from 0 on.
        num_bins: Bins of the first batch.
        grow_method: Ignored, with a warning.
        skip_zeros: Leave exact zeros out of the counts.
        torch_hist: Whether the state shows as tensors.

    Raises:
        NotImplementedError: An axis.
    """

    _num_bits: Any
    _axis: None

    def __init__(
        self,
        num_bits: Any,
        axis: Axis,
        unsigned: bool,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
    ) -> None:
        if axis is not None:
            raise UnsupportedError(
                f"Calibrator histogram collection only supports per tensor scaling, found axis={axis}.",
                "use calib_method='max' for per-channel ranges, or calibrate_weights for weights.",
            )
        if grow_method is not None:
            logger.warning("grow_method=%r is ignored: bins are appended as the data needs them.", grow_method)
        self._torch_hist = torch_hist
        super().__init__(num_bits, None, unsigned, num_bins=num_bins, skip_zeros=skip_zeros)

    @property
    def _calib_hist(self) -> Any:
        """Occupation of the bins, shared with the calibrator on a CPU; None before data."""
        return self._as_shown(self._counts)

    @_calib_hist.setter
    def _calib_hist(self, value: Any) -> None:
        if value is None:
            self._forget_counts()
            return
        counts = torch.as_tensor(value).flatten()
        self._counts = counts.to(torch.float64 if counts.is_floating_point() else torch.int64, copy=True)
        self._width = self._width or 1.0  # until the edges are set

    @property
    def _calib_bin_edges(self) -> Any:
        """Edges k * W, one more than there are bins; None before data."""
        return self._as_shown(super()._calib_bin_edges)

    @_calib_bin_edges.setter
    def _calib_bin_edges(self, value: Any) -> None:
        if value is None:
            self._forget_counts()
            return
        edges = torch.as_tensor(value).double().cpu().flatten()
        num_bins = edges.numel() - 1
        width = float(edges[-1]) / num_bins if num_bins > 0 else 0.0
        if not width > 0 or bool(((edges - torch.arange(num_bins + 1) * width).abs() > width / 4).any()):
            raise ArgumentError(
                f"_calib_bin_edges are {edges.numel()} numbers that are not 0, W, 2W, ... with one width W > 0.",
                "give edges of bins of equal width that start at 0.",
            )
        self._width = width
        if self._counts is None or self._counts.numel() != num_bins:
            self._counts = torch.zeros(num_bins, dtype=torch.int64)

    def _as_shown(self, state: torch.Tensor | None) -> Any:
        return state if state is None or self._torch_hist else state.cpu().numpy()

    def _forget_counts(self) -> None:
        self._counts = self._zeros = None
        self._width = 0.0

    @property
    def _format(self) -> Format:
        if isinstance(self._num_bits, tuple):
            raise UnsupportedError(
                f"num_bits={self._num_bits}: 'entropy' counts integer codes, which FP8 does not have.",
                "use 'mse' or 'percentile' with (4, 3).",
            )
        return super()._format

    def _solve_mse(self, counts: npt.NDArray[np.number], stride: int, start_bin: int) -> float:
        levels = _e4m3_levels() if self._num_bits == E4M3 else np.arange(self._format.qmax + 1.0)
        # `fake_tensor_quant` and `scaled_e4m3` give zeros where amax <= EPS
        return solve_mse_levels(counts, self._width, levels, stride, start_bin, zero_below=EPS)


def _e4m3_levels() -> npt.NDArray[np.float64]:
    """The numbers of the FP8 E4M3 grid from 0 to 448: the bytes 0 to 126 in order, 127 is NaN."""
    levels: npt.NDArray[np.float64] = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    return levels
