"""Histogram of |x| with a bounded number of bins."""

from __future__ import annotations

import math

import torch

from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.formats import Format
from qdq.observers.entropy import solve_entropy
from qdq.observers.finite import require_finite
from qdq.observers.mse import solve_mse
from qdq.observers.percentile import solve_percentile

# The histogram may grow to this many times `num_bins`; then neighbouring bins merge pairwise, so that data of
# any ratio between first and largest batch fits.
_MAX_GROWTH = 16


class HistogramCalibrator:
    """Counts |x| in bins of equal width from 0, on the device of the data.

    The first batch with a non-zero value sets the width to `max / num_bins`; later, larger values append bins of
    that width. Above 16 x `num_bins` neighbouring bins merge (the width doubles, counts stay exact).

    Args:
        num_bits: Width of the format that the solvers assume.
        axis: Must be None: histograms are per tensor.
        unsigned: Signedness that the solvers assume.
        num_bins: Bins of the first batch.
        skip_zeros: Leave exact zeros out of the counts.
    """

    def __init__(
        self, num_bits: int, axis: int | None, unsigned: bool, num_bins: int = 2048, skip_zeros: bool = False
    ) -> None:
        if axis is not None:
            raise ArgumentError(
                f"histogram calibration only supports per tensor scaling, found axis={axis}.",
                "use calib_method='max' for per-channel ranges.",
            )
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned
        self._num_bins = num_bins
        self._skip_zeros = skip_zeros
        self.reset()

    def reset(self) -> None:
        """Forget all batches; the next one sets the bins anew."""
        self._calib_hist: torch.Tensor | None = None
        self._width = 0.0
        self._zeros_before_width = 0
        self.num_batches = 0

    @property
    def _calib_bin_edges(self) -> torch.Tensor | None:
        """Edges k * width, one more than there are bins; None before data."""
        if self._calib_hist is None:
            return None
        return torch.arange(self._calib_hist.numel() + 1, dtype=torch.float64) * self._width

    @torch.no_grad()
    def collect(self, inputs: torch.Tensor) -> None:
        """Add the counts of one batch; an empty one changes nothing.

        Raises:
            CalibrationError: NaN or Inf in the batch.
        """
        if inputs.numel() == 0:
            return
        values = inputs.detach().abs().float().flatten()
        maximum = values.max()
        require_finite(maximum, inputs)
        self.num_batches += 1
        if self._skip_zeros:
            values = values[values > 0]
        self._add(values, float(maximum))

    def _add(self, values: torch.Tensor, maximum: float) -> None:
        if self._calib_hist is None:
            if maximum == 0:  # no width can be chosen yet
                self._zeros_before_width += values.numel()
                return
            self._width = maximum / self._num_bins
            self._calib_hist = torch.zeros(self._num_bins, dtype=torch.int64, device=values.device)
            self._calib_hist[0] = self._zeros_before_width
        hist = self._grow_to(self._calib_hist.to(values.device), maximum)
        # A float32 quotient is exact enough for a bin, unless the width itself has left float32's normal range.
        if self._width < torch.finfo(torch.float32).tiny:
            values = values.double()
        bins = (values / self._width).to(torch.int64).clamp_(max=hist.numel() - 1)
        self._calib_hist = hist + torch.bincount(bins, minlength=hist.numel())

    def _grow_to(self, hist: torch.Tensor, maximum: float) -> torch.Tensor:
        """The histogram with enough bins for `maximum`; merges pairs where it would get too long."""
        while maximum / self._width > _MAX_GROWTH * self._num_bins:
            if hist.numel() % 2:
                hist = torch.cat([hist, hist.new_zeros(1)])
            hist = hist.reshape(-1, 2).sum(1)
            self._width *= 2
        missing = math.ceil(maximum / self._width) - hist.numel()
        return torch.cat([hist, hist.new_zeros(missing)]) if missing > 0 else hist

    def compute_amax(
        self, method: str, *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99
    ) -> torch.Tensor | None:
        """Solve amax from the counts; may be called again with another method, the counts stay.

        Args:
            method: "percentile", "mse" or "entropy".
            stride: Step between candidate bins ("mse", "entropy").
            start_bin: First candidate bin ("mse", "entropy").
            percentile: 0 to 100 ("percentile").

        Returns:
            A 0-D float32 tensor, 0 if all values were zero, None before data.

        Raises:
            ArgumentTypeError: Unknown method.
            ArgumentError: Percentile outside 0..100.
        """
        if method not in ("percentile", "mse", "entropy"):
            raise ArgumentTypeError(f"Unknown calibration method {method!r}.", "use 'percentile', 'mse' or 'entropy'.")
        if self._calib_hist is None:
            return torch.zeros(()) if self.num_batches else None
        counts = self._calib_hist.cpu().numpy()
        fmt = Format(self._num_bits, self._unsigned)
        if method == "percentile":
            amax = solve_percentile(counts, self._width, percentile)
        elif method == "mse":
            amax = solve_mse(counts, self._width, fmt, stride, start_bin)
        else:
            amax = solve_entropy(counts, self._width, fmt, stride, start_bin)
        return torch.tensor(amax, dtype=torch.float32, device=self._calib_hist.device)

    def saw_zeros_only(self) -> bool:
        """Whether there was data and all of it was zero."""
        return self._calib_hist is None and self.num_batches > 0

    def __repr__(self) -> str:
        edges = self._calib_bin_edges
        if edges is None:
            return "HistogramCalibrator(calib_bin_edges=None)"
        return f"HistogramCalibrator(calib_bin_edges=[0.000, ..., {float(edges[-1]):.3f}]({edges.numel()}))"
