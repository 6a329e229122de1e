"""`HistogramCalibrator` as pytorch-quantization has it."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qdq.compat.calib.bins import bin_of, count_bins
from qdq.compat.calib.calibrator import _Calibrator
from qdq.compat.tensor_quant import E4M3, EPS
from qdq.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qdq.formats import Format
from qdq.observers.entropy import solve_entropy
from qdq.observers.finite import require_finite, require_tensor
from qdq.observers.max import Axis, reduce_amax
from qdq.observers.methods import DEFAULT_PERCENTILE
from qdq.observers.mse import solve_mse_levels
from qdq.observers.percentile import solve_percentile

logger = logging.getLogger(__name__)

# The histogram may grow to this many times `num_bins`; then neighbouring bins merge pairwise, so that data of
# any ratio between first and largest batch fits.
_MAX_GROWTH = 16

# Number of elements that are put in bins at a time: as many as fit a CPU cache, or the free memory of a GPU.
_CHUNK = {"cpu": 1 << 16}
_CHUNK_ELSEWHERE = 1 << 24


class HistogramCalibrator(_Calibrator):
    """Counts |x| in bins of equal width from 0, on the device of the data, which each batch waits for once.

    The first batch with a non-zero value sets the width to `max / num_bins`; later, larger values append bins of
    that width. Above 16 x `num_bins` neighbouring bins merge (the width doubles, counts stay exact).

    `_calib_hist` and `_calib_bin_edges` are views of one state: tensors if `_torch_hist`, else ndarrays. Both may be
    set, in either order.

    Args:
        num_bits: Width of the format that the solvers assume, (4, 3) for FP8.
        axis: Must be None.
        unsigned: Whether the solvers assume that codes start at 0.
        num_bins: Number of bins of the first batch.
        grow_method: Ignored, with a warning.
        skip_zeros: Leave exact zeros out of the counts.
        torch_hist: Whether the state is shown as tensors.

    Raises:
        NotImplementedError: An axis.
        ValueError: No bin.
    """

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
            logger.warning(
                "grow_method=%r is ignored: bins are appended as the data needs them.", grow_method
            )
        if num_bins < 1:
            raise ArgumentError(
                f"num_bins is {num_bins}; a histogram needs at least one bin.",
                "2048 is the default.",
            )
        super().__init__(num_bits, None, unsigned)
        self._num_bins = num_bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        self.reset()

    def reset(self) -> None:
        """Forget all batches; the next one sets the bins again."""
        self._counts: torch.Tensor | None = None
        self._width = 0.0
        self._zeros: torch.Tensor | None = None  # number of zeros before there was a width, 0-D
        self.num_batches = 0

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
        self._counts = counts.to(
            torch.float64 if counts.is_floating_point() else torch.int64, copy=True
        )
        self._width = self._width or 1.0  # until the edges are set

    @property
    def _calib_bin_edges(self) -> Any:
        """Edges k * W, one more than there are bins; None before data."""
        return self._as_shown(self._edges())

    @_calib_bin_edges.setter
    def _calib_bin_edges(self, value: Any) -> None:
        if value is None:
            self._forget_counts()
            return
        edges = torch.as_tensor(value).double().cpu().flatten()
        num_bins = edges.numel() - 1
        width = float(edges[-1]) / num_bins if num_bins > 0 else 0.0
        if not width > 0 or bool(
            ((edges - torch.arange(num_bins + 1) * width).abs() > width / 4).any()
        ):
            raise ArgumentError(
                f"_calib_bin_edges are {edges.numel()} numbers that are not 0, W, 2W, ... with one width W > 0.",
                "give edges of bins of equal width that start at 0.",
            )
        self._width = width
        if self._counts is None or self._counts.numel() != num_bins:
            self._counts = torch.zeros(num_bins, dtype=torch.int64)

    def _as_shown(self, state: torch.Tensor | None) -> Any:
        if state is None or self._torch_hist:
            return state
        return state.cpu().numpy()

    def _forget_counts(self) -> None:
        self._counts = self._zeros = None
        self._width = 0.0

    def _edges(self) -> torch.Tensor | None:
        if self._counts is None:
            return None
        return (
            torch.arange(self._counts.numel() + 1, dtype=torch.float64, device=self._counts.device)
            * self._width
        )

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Add the counts of one batch; an empty one changes nothing.

        Raises:
            CalibrationError: NaN or Inf in the batch.
        """
        require_tensor(x)
        if x.numel() == 0:
            return
        values = x.detach().float().flatten()
        maximum = float(reduce_amax(values, None))  # the only value that a GPU is waited for
        require_finite(torch.tensor(maximum), x)
        self.num_batches += 1
        if maximum or not self._skip_zeros:
            self._add(values, maximum)

    def _add(self, values: torch.Tensor, maximum: float) -> None:
        if self._counts is None:
            zeros = values.new_zeros((), dtype=torch.int64) if self._zeros is None else self._zeros
            if maximum == 0:  # no width can be chosen yet
                self._zeros = zeros + values.numel()
                return
            self._width = maximum / self._num_bins
            self._counts = values.new_zeros(self._num_bins, dtype=torch.int64)
            self._counts[0] = zeros
        hist = self._grow_to(self._counts.to(values.device), maximum)
        width = torch.full((1,), self._width, dtype=torch.float64, device=values.device)
        if self._skip_zeros:
            hist = hist.clone()
            hist[0] -= (values == 0).sum()
        for chunk in torch.split(values, _CHUNK.get(values.device.type, _CHUNK_ELSEWHERE)):
            hist = hist + count_bins(bin_of(chunk, width, hist.numel()), hist.numel())
        self._counts = hist

    def _grow_to(self, hist: torch.Tensor, maximum: float) -> torch.Tensor:
        """The histogram with enough bins for `maximum`; merges pairs if it would become too long."""
        while maximum / self._width > _MAX_GROWTH * self._num_bins:
            if hist.numel() % 2:
                hist = torch.cat([hist, hist.new_zeros(1)])
            hist = hist.reshape(-1, 2).sum(1)
            self._width *= 2
        missing = math.ceil(maximum / self._width) - hist.numel()
        if missing > 0:
            return torch.cat([hist, hist.new_zeros(missing)])
        return hist

    def compute_amax(
        self,
        method: str,
        *,
        stride: int = 1,
        start_bin: int = 128,
        percentile: float = DEFAULT_PERCENTILE,
    ) -> torch.Tensor | None:
        """Compute amax from the counts; may be called again with another method, the counts stay.

        Args:
            method: "percentile", "mse" or "entropy".
            stride: Step between candidate bins ("mse", "entropy").
            start_bin: First candidate bin ("mse", "entropy").
            percentile: 0 to 100 ("percentile").

        Returns:
            A 0-D float32 tensor, 0 if all values were zero, None before data.

        Raises:
            ArgumentTypeError: Unknown method, or a bin that is not an integer.
            ArgumentError: Percentile outside 0..100, or invalid bins or format.
        """
        if method not in ("percentile", "mse", "entropy"):
            raise ArgumentTypeError(
                f"Unknown calibration method {method!r}.", "use 'percentile', 'mse' or 'entropy'."
            )
        if self._counts is None:
            if self._zeros is None:
                return None
            return torch.zeros((), device=self._zeros.device)
        if not bool(self._counts.any()):
            return None
        amax = self._solve(self._counts.cpu().numpy(), method, stride, start_bin, percentile)
        return torch.tensor(amax, dtype=torch.float32, device=self._counts.device)

    def _solve(
        self,
        counts: npt.NDArray[np.number],
        method: str,
        stride: int,
        start_bin: int,
        percentile: float,
    ) -> float:
        if method == "percentile":
            return solve_percentile(counts, self._width, percentile)
        if method == "mse":
            return self._solve_mse(counts, stride, start_bin)
        return solve_entropy(counts, self._width, self._format, stride, start_bin)

    @property
    def _format(self) -> Format:
        if isinstance(self._num_bits, tuple):
            raise UnsupportedError(
                f"num_bits={self._num_bits}: 'entropy' counts integer codes, which FP8 does not have.",
                "use 'mse' or 'percentile' with (4, 3).",
            )
        return Format(self._num_bits, self._unsigned)

    def _solve_mse(self, counts: npt.NDArray[np.number], stride: int, start_bin: int) -> float:
        levels = _e4m3_levels() if self._num_bits == E4M3 else np.arange(self._format.qmax + 1.0)
        # `fake_tensor_quant` and `scaled_e4m3` give zeros where amax <= EPS
        return solve_mse_levels(counts, self._width, levels, stride, start_bin, zero_below=EPS)

    def __repr__(self) -> str:
        edges = self._calib_bin_edges
        if edges is None:
            return "HistogramCalibrator(calib_bin_edges=None)"
        return f"HistogramCalibrator(calib_bin_edges=[0.000, ..., {float(edges[-1]):.3f}]({edges.numel()}))"


def _e4m3_levels() -> npt.NDArray[np.float64]:
    """The numbers of the FP8 E4M3 grid from 0 to 448: the bytes 0 to 126 in order, 127 is NaN."""
    levels: npt.NDArray[np.float64] = (
        torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    )
    return levels


def _compute_amax_entropy(
    calib_hist: Any,
    calib_bin_edges: Any,
    num_bits: Any,
    unsigned: bool,
    stride: int = 1,
    start_bin: int = 128,
) -> torch.Tensor | None:
    """As `HistogramCalibrator.compute_amax("entropy")`, for a given histogram; None without one."""
    calibrator = _calibrator_of(calib_hist, calib_bin_edges, num_bits, unsigned)
    if calibrator is None:
        return None
    return calibrator.compute_amax("entropy", stride=stride, start_bin=start_bin)


def _compute_amax_mse(
    calib_hist: Any,
    calib_bin_edges: Any,
    num_bits: Any,
    unsigned: bool,
    stride: int = 1,
    start_bin: int = 128,
) -> torch.Tensor | None:
    """As `HistogramCalibrator.compute_amax("mse")`, for a given histogram; None without one."""
    calibrator = _calibrator_of(calib_hist, calib_bin_edges, num_bits, unsigned)
    if calibrator is None:
        return None
    return calibrator.compute_amax("mse", stride=stride, start_bin=start_bin)


def _compute_amax_percentile(
    calib_hist: Any, calib_bin_edges: Any, percentile: float
) -> torch.Tensor | None:
    """As `HistogramCalibrator.compute_amax("percentile")`, for a given histogram; None without one."""
    calibrator = _calibrator_of(calib_hist, calib_bin_edges, 8, False)
    if calibrator is None:
        return None
    return calibrator.compute_amax("percentile", percentile=percentile)


def _calibrator_of(
    counts: Any, edges: Any, num_bits: Any, unsigned: bool
) -> HistogramCalibrator | None:
    """A calibrator with the given counts, tensors or ndarrays."""
    if counts is None or edges is None:
        return None
    calibrator = HistogramCalibrator(num_bits, None, unsigned)
    calibrator._calib_bin_edges = edges
    if len(counts) != len(edges) - 1:
        raise ArgumentError(
            f"calib_hist has {len(counts)} bins, calib_bin_edges {len(edges)} numbers.",
            "give one edge more than bins.",
        )
    calibrator._calib_hist = counts
    return calibrator
