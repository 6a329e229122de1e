"""The statistics of one tensor on a CPU; `on_device` has those on other devices.

Torch's threads compute extremes and sums of all values; then one thread finds the bins, in pieces that fit a cache.
(More threads for the bins do not help: Python threads wait for the interpreter lock. Torch's threads save little, and
on a busy machine each of the many short operations waits for the slowest thread.)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qdq.observers.on_device import DeviceSummary, summarize_on_device
from qdq.observers.tensor_statistics import (
    LEAST_EXPONENT,
    LOG_BINS,
    NUM_BINS,
    exponent_of,
)

_PIECE = (1 << 15) - 64  # torch divides work of 2^15 elements and more among threads
_CHUNK = 8 * _PIECE
_TURNS = 2
_ROW = 1 << 11


@dataclass(frozen=True)
class Summary:
    """Result of `summarize` on a CPU.

    Args:
        counts: int64 `[2, NUM_BINS]`.
        exponent: int64 `[]`, see `TensorStatistics`.
        channel_absmax: float32, of the rank of the values, with size 1 on all axes except the channel axis.
        extremes: float64 `[2]`: the smallest and the largest value.
        sums: float64 `[5]`: sum of x, |x| and x^2, number of values, number of values that are not zero.
        defects: int64 `[2]`: number of NaN or Inf, flat index of the first one; the other fields are valid for finite
            values only.
    """

    counts: torch.Tensor
    exponent: torch.Tensor
    channel_absmax: torch.Tensor
    extremes: torch.Tensor
    sums: torch.Tensor
    defects: torch.Tensor


def summarize(values: torch.Tensor, channel_axis: int | None = None) -> Summary | DeviceSummary:
    """Read a tensor once.

    Args:
        values: Any shape with at least one element, any floating type; taken as float32.
        channel_axis: The axis of the channels; None: 1 of four and more dimensions, else the last.
    """
    if channel_axis is None:
        channel_axis = 1 if values.dim() >= 4 else -1
    # The modes are per thread; in inference mode, this thread would make tensors that the others could not write to.
    with torch.inference_mode(False), torch.no_grad():
        values = values.reshape(1) if values.dim() == 0 else values
        if values.device.type != "cpu":
            return summarize_on_device(values, channel_axis)
        summary = _summarize_on_cpu(values, _as_matrices(values, channel_axis))
        shape = [1] * values.dim()
        shape[channel_axis] = -1
        return replace(summary, channel_absmax=summary.channel_absmax.reshape(shape))


def locate_defects(values: torch.Tensor) -> torch.Tensor:
    """Number of values that are NaN or Inf as float32, and the flat index of the first: int64 `[2]`."""
    is_defect = ~torch.isfinite(values.float()).flatten()
    return torch.stack([is_defect.sum(), is_defect.to(torch.uint8).argmax()])


@dataclass(frozen=True)
class _Matrix:
    """Part of a tensor as `[rows, columns]` in memory order; the channel is the row modulo C, or the column."""

    values: torch.Tensor
    channels: int
    channels_are_columns: bool


def _as_matrices(values: torch.Tensor, channel_axis: int) -> list[_Matrix]:
    """The tensor in memory order without a copy; a tensor with gaps in memory as copied slices."""
    channel_axis %= values.dim()
    strides = values.stride()
    order = sorted(range(values.dim()), key=lambda dim: (-strides[dim], dim))
    sorted_view = values.permute(order)
    if not sorted_view.is_contiguous():
        return _copy_slices(values, channel_axis)
    position = order.index(channel_axis)
    shape = sorted_view.shape
    inner = math.prod(shape[position + 1 :])
    if inner == 1:
        return [_Matrix(sorted_view.reshape(-1, shape[position]), shape[position], True)]
    return [_Matrix(sorted_view.reshape(-1, inner), shape[position], False)]


def _copy_slices(values: torch.Tensor, channel_axis: int) -> list[_Matrix]:
    """A tensor with gaps in memory, as contiguous copies of its slices along the first axis that can be split."""
    parts: Sequence[torch.Tensor] = [values]
    for dim in range(values.dim()):
        if dim != channel_axis and values.shape[dim] > 1:
            parts = torch.split(values, 1, dim)
            break
    matrices = []
    for part in parts:
        matrices += _as_matrices(part.contiguous(), channel_axis)
    return matrices


def _channel_extremes(matrices: list[_Matrix]) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each channel, float32 `[C]`; they do not depend on how torch divides the work."""
    lows = [_reduce(matrix, torch.amin) for matrix in matrices]
    highs = [_reduce(matrix, torch.amax) for matrix in matrices]
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def _reduce(matrix: _Matrix, reduction: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The extreme of each channel, float32 `[C]`."""
    reduced_axis = 0 if matrix.channels_are_columns else 1
    reduced: torch.Tensor = reduction(matrix.values, reduced_axis)
    return reduction(reduced.reshape(-1, matrix.channels), 0).float()


def _split_signs(histogram: torch.Tensor, negatives: torch.Tensor | int) -> torch.Tensor:
    """Split a histogram of x into one of positive and one of negative values.

    Args:
        histogram: int64, counts of trunc(x 2^-k), from 1 - NUM_BINS to NUM_BINS - 1.
        negatives: Number of x below 0.

    Returns:
        int64 `[2, NUM_BINS]`, as `Summary.counts`.
    """
    counts = torch.stack([histogram[NUM_BINS - 1 :], histogram[:NUM_BINS].flip(0)])
    # Negative values whose bin is 0, which has no sign.
    near_zero = negatives - histogram[: NUM_BINS - 1].sum()
    counts[0, 0] -= near_zero
    counts[1, 0] = near_zero
    return counts


def _summarize_on_cpu(values: torch.Tensor, matrices: list[_Matrix]) -> Summary:
    lows, highs = _channel_extremes(matrices)
    low, high = float(lows.amin()), float(highs.amax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return _only_defects(values, lows)
    counter = _Counter(exponent_of(max(-low, high)), signed=low < 0)
    for matrix in matrices:
        counter.read(matrix.values)
    return Summary(
        counts=counter.counts(),
        exponent=torch.tensor(counter.exponent),
        channel_absmax=torch.maximum(-lows, highs),
        extremes=torch.tensor([low, high], dtype=torch.float64),
        sums=torch.tensor(counter.sums(), dtype=torch.float64),
        defects=torch.zeros(2, dtype=torch.int64),
    )


def _only_defects(values: torch.Tensor, channels: torch.Tensor) -> Summary:
    return Summary(
        counts=torch.zeros(2, NUM_BINS, dtype=torch.int64),
        exponent=torch.tensor(LEAST_EXPONENT),
        channel_absmax=torch.full_like(channels, math.nan),
        extremes=torch.full((2,), math.nan, dtype=torch.float64),
        sums=torch.full((5,), math.nan, dtype=torch.float64),
        defects=locate_defects(values),
    )


class _Buffers(threading.local):
    """Memory for intermediate results, one set for each thread: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            self.converted, self.single = torch.empty(_PIECE), torch.empty(_PIECE)
            self.signs = torch.empty(_PIECE, dtype=torch.int32)
            self.bins = torch.empty(_CHUNK, dtype=torch.int16)


_buffers = _Buffers()


class _Counter:
    """Counts finite values in bins, and adds them up.

    Neighbours are counted in two histograms in turn: after a ReLU they often fall into one bin, and a core finishes one
    addition to a bin before it begins the next.

    Args:
        exponent: The exponent of the width of a bin; no value is beyond the last bin.
        signed: Whether there are values below 0.
    """

    def __init__(self, exponent: int, signed: bool) -> None:
        self.exponent, self._signed = exponent, signed
        first = 1 - NUM_BINS if signed else 0
        self._counts = torch.zeros(_TURNS, NUM_BINS - first, dtype=torch.int64)
        starts = torch.arange(_TURNS, dtype=torch.int16) * self._counts.shape[1] - first
        self._starts = starts.repeat(_PIECE // _TURNS)
        self._sums: list[tuple[float, float]] = []  # of x and x^2
        self._negative_sums: list[float] = []
        self._size = self._positives = self._negatives = 0

    def read(self, values: torch.Tensor) -> None:
        """Add values."""
        values = values.view(-1)
        at_once = self._can_be_summed(values)
        if at_once:
            self._sum(values)
        for chunk in torch.split(values, _CHUNK):
            bins = _buffers.bins[: chunk.numel()]
            pieces = zip(torch.split(chunk, _PIECE), torch.split(bins, _PIECE), strict=True)
            for piece, place in pieces:
                if piece.dtype != torch.float32:
                    piece = _buffers.converted[: piece.numel()].copy_(piece)
                if not at_once:
                    self._sum(piece if self._can_be_summed(piece) else piece.double())
                self._find_bins(piece, place)
            self._counts += torch.bincount(bins, minlength=self._counts.numel()).view_as(
                self._counts
            )
        self._size += values.numel()

    def _can_be_summed(self, values: torch.Tensor) -> bool:
        """Whether the squares of values as large as the largest one are far from the limits of their type."""
        return values.dtype == torch.float32 and abs(self.exponent + LOG_BINS) <= 40

    def _sum(self, values: torch.Tensor) -> None:
        """Sum in rows; torch gives each row to one thread, so that nothing depends on the number of threads."""
        whole = values.numel() // _ROW * _ROW
        for rows in (values[:whole].view(-1, _ROW), values[whole:].view(1, -1)):
            squares = torch.linalg.vector_norm(rows, dim=1).double().square_()
            self._sums += zip(rows.sum(1).tolist(), squares.tolist(), strict=True)

    def _find_bins(self, piece: torch.Tensor, bins: torch.Tensor) -> None:
        single = _buffers.single[: piece.numel()]
        self._positives += _count_positives(piece)
        if self._signed:
            torch.neg(piece, out=single)
            self._negatives += _count_positives(single)
            self._negative_sums.append(float(single.clamp_(0).sum(dtype=torch.float64)))
        torch.mul(piece, math.ldexp(1.0, -self.exponent), out=single)
        bins.copy_(single).add_(self._starts[: piece.numel()])  # the copy rounds towards 0

    def counts(self) -> torch.Tensor:
        """As `Summary.counts`."""
        counts = self._counts.sum(0)
        if self._signed:
            return _split_signs(counts, self._negatives)
        return torch.stack([counts, torch.zeros_like(counts)])

    def sums(self) -> list[float]:
        """As `Summary.sums`."""
        total, squares = (math.fsum(column) for column in zip(*self._sums, strict=True))
        total_abs = total + 2 * math.fsum(self._negative_sums)
        return [total, total_abs, squares, self._size, self._positives + self._negatives]


def _count_positives(values: torch.Tensor) -> int:
    """Number of values above 0, from the bits, which takes a third of the time of a comparison."""
    signs = torch.clamp(values.view(torch.int32), 0, 1, out=_buffers.signs[: values.numel()])
    return int(signs.sum(dtype=torch.int32))
