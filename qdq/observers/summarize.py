"""Statistics of one tensor at hand, on whatever device it is.

On a CPU the tensor is read once, in pieces that stay in a cache: a piece goes through all of the arithmetic before
the next one is touched. A piece is too small for torch to split among threads, so that the sums do not depend on how
many there are. (Threads of our own made it slower: they wait for each other at Python's lock.)

Elsewhere everything stays on the device, and nothing waits for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from qdq.observers.statistics import LEAST_ABSMAX, LEAST_EXPONENT, LOG_BINS, NUM_BINS, exponent_of

_PIECE = (1 << 15) - 64  # torch shares work of 2^15 elements and more among threads
_DEVICE_PIECE = 1 << 24  # float32 counts are exact up to here


@dataclass(frozen=True)
class Summary:
    """What `summarize` found; tensors on the device of the values.

    Args:
        counts: int64 `[2, NUM_BINS]`.
        exponent: int64 `[]`, see `TensorStatistics`.
        channel_absmax: float32, of the rank of the values with size 1 on all axes but that of the channels.
        extremes: float64 `[2]`: the smallest and the largest value.
        sums: float64 `[5]`: sum of x, |x| and x^2, how many values, how many that are not zero.
        defects: int64 `[2]`: how many values are NaN or Inf, flat index of the first one; the rest holds for finite
            values only.
    """

    counts: torch.Tensor
    exponent: torch.Tensor
    channel_absmax: torch.Tensor
    extremes: torch.Tensor
    sums: torch.Tensor
    defects: torch.Tensor


def summarize(values: torch.Tensor, channel_axis: int | None = None) -> Summary:
    """Read a tensor once.

    Args:
        values: Any shape with at least one element, any floating type; taken as float32.
        channel_axis: The axis of the channels; None: 1 of four and more dimensions, else the last.
    """
    if channel_axis is None:
        channel_axis = 1 if values.dim() >= 4 else -1
    # The modes hold for one thread; in inference mode it would make tensors that the others could not write to.
    with torch.inference_mode(False), torch.no_grad():
        values = values.reshape(1) if values.dim() == 0 else values
        matrices = _as_matrices(values, channel_axis)
        found = _on_cpu(values, matrices) if values.device.type == "cpu" else _on_device(values, matrices)
        shape = [1] * values.dim()
        shape[channel_axis] = -1
        return replace(found, channel_absmax=found.channel_absmax.reshape(shape))


def locate_defects(values: torch.Tensor) -> torch.Tensor:
    """How many values are NaN or Inf as float32, and the flat index of the first: int64 `[2]`."""
    bad = ~torch.isfinite(values.float()).flatten()
    return torch.stack([bad.sum(), bad.to(torch.uint8).argmax()])


@dataclass(frozen=True)
class _Matrix:
    """A part of a tensor as `[rows, columns]` in the order of memory; the channel is the row modulo C or the column."""

    values: torch.Tensor
    channels: int
    channels_are_columns: bool


def _as_matrices(values: torch.Tensor, channel_axis: int) -> list[_Matrix]:
    """The tensor in the order of memory without a copy; with gaps in memory, one copied slice at a time."""
    channel_axis %= values.dim()
    strides = values.stride()
    order = sorted(range(values.dim()), key=lambda dim: (-strides[dim], dim))
    sorted_view = values.permute(order)
    if not sorted_view.is_contiguous():
        others = [dim for dim in range(values.dim()) if dim != channel_axis and values.shape[dim] > 1]
        parts = torch.split(values, 1, others[0]) if others else (values,)
        return [matrix for part in parts for matrix in _as_matrices(part.contiguous(), channel_axis)]
    position = order.index(channel_axis)
    shape = sorted_view.shape
    inner = math.prod(shape[position + 1 :])
    if inner == 1:
        return [_Matrix(sorted_view.reshape(-1, shape[position]), shape[position], True)]
    return [_Matrix(sorted_view.reshape(-1, inner), shape[position], False)]


# -- histograms ------------------------------------------------------------------------------------------------------


def add_counts(
    counts: torch.Tensor, exponent: torch.Tensor, others: torch.Tensor, other_exponent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two histograms at the larger of their exponents, without waiting for a device.

    Args:
        counts: int64 `[2, NUM_BINS]`.
        exponent: int64 `[]`.
        others: As `counts`.
        other_exponent: As `exponent`.
    """
    common = torch.maximum(exponent, other_exponent)
    merged = torch.zeros_like(counts)
    bins = torch.arange(NUM_BINS, device=counts.device)
    for part, own in ((counts, exponent), (others, other_exponent)):
        merged.index_add_(1, bins >> (common - own).clamp_max(LOG_BINS), part)
    return merged, common


def _split_signs(both: torch.Tensor, negatives: torch.Tensor | int) -> torch.Tensor:
    """Counts `[2, NUM_BINS]` from those of trunc(x 2^-k), 1 - NUM_BINS to NUM_BINS - 1, and the number of x below 0."""
    counts = torch.stack([both[NUM_BINS - 1 :], both[:NUM_BINS].flip(0)])
    near_zero = negatives - both[: NUM_BINS - 1].sum()  # those whose bin is 0, which has no sign
    counts[0, 0] -= near_zero
    counts[1, 0] = near_zero
    return counts


# -- CPU -------------------------------------------------------------------------------------------------------------


def _on_cpu(values: torch.Tensor, matrices: list[_Matrix]) -> Summary:
    partials = [_Partial(matrix) for matrix in matrices]
    for partial in partials:
        partial.read()
    low, high = min(p.low for p in partials), max(p.high for p in partials)
    if math.isnan(sum(p.low for p in partials)):
        low = high = math.nan
    histograms = [(counts, exponent) for partial in partials for exponent, counts in partial.counts.items()]
    counts, exponent = torch.zeros(2, NUM_BINS, dtype=torch.int64), torch.tensor(LEAST_EXPONENT)
    for others, other_exponent in histograms:
        counts, exponent = add_counts(counts, exponent, others, torch.tensor(other_exponent))
    sums = [math.fsum(column) for column in zip(*(piece for p in partials for piece in p.sums), strict=True)]
    return Summary(
        counts=counts,
        exponent=exponent,
        channel_absmax=torch.stack([partial.fold_channels() for partial in partials]).amax(0),
        extremes=torch.tensor([low, high], dtype=torch.float64),
        sums=torch.tensor(sums or [math.nan] * 5, dtype=torch.float64),
        defects=locate_defects(values) if math.isnan(low) else torch.zeros(2, dtype=torch.int64),
    )


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Pieces that a core's cache holds: several rows, or a part of one."""
    height, length = max(1, _PIECE // columns), min(columns, _PIECE)
    for row in range(0, rows, height):
        for column in range(0, columns, length):
            yield slice(row, min(row + height, rows)), slice(column, min(column + length, columns))


class _Scratch(threading.local):
    """Memory for one piece, one set a thread: fresh memory for every result costs more than the arithmetic."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            self.values = torch.empty(_PIECE)
            self.single = torch.empty(_PIECE)
            self.bins = torch.empty(_PIECE, dtype=torch.int32)
            self.wide = torch.empty(_PIECE, dtype=torch.float64)


_scratch = _Scratch()


class _Partial:
    """What was found in the pieces of a matrix."""

    def __init__(self, matrix: _Matrix) -> None:
        self._matrix = matrix
        self._dim = 0 if matrix.channels_are_columns else 1
        self._absmax = torch.zeros(matrix.values.shape[1 - self._dim])  # of each column or row
        self.low, self.high = math.inf, -math.inf
        self.counts: dict[int, torch.Tensor] = {}  # by exponent
        self.sums: list[tuple[float, ...]] = []

    @torch.no_grad()
    def read(self) -> None:
        """Take all pieces into account, up to the first with NaN or Inf; that makes `low` and `high` NaN."""
        for rows, columns in _tiles(*self._matrix.values.shape):
            piece = _as_float32(self._matrix.values[rows, columns])
            low, high = self._read_extremes(piece, columns if self._dim == 0 else rows)
            if not (math.isfinite(low) and math.isfinite(high)):
                self.low = self.high = math.nan
                return
            self._count(piece.view(-1), low, exponent_of(max(-low, high)))

    def _read_extremes(self, piece: torch.Tensor, place: slice) -> tuple[float, float]:
        lows, highs = piece.amin(self._dim), piece.amax(self._dim)
        absmax = self._absmax[place]
        torch.maximum(absmax, torch.maximum(-lows, highs), out=absmax)
        low, high = float(lows.amin()), float(highs.amax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        return low, high

    def _count(self, values: torch.Tensor, low: float, exponent: int) -> None:
        size = values.numel()
        single, bins, wide = _scratch.single[:size], _scratch.bins[:size], _scratch.wide[:size].copy_(values)
        bins.copy_(torch.mul(values, math.ldexp(1.0, -exponent), out=single))
        # The sign from the bits, once + 0.0 has made 0.0 of -0.0; torch.sign takes ten times as long.
        signs = torch.add(values, 0.0, out=single).view(torch.int32).clamp_(-1, 1)
        counts = self.counts.setdefault(exponent, torch.zeros(2, NUM_BINS, dtype=torch.int64))
        total, balance = float(wide.sum()), int(signs.sum(dtype=torch.int32))
        if low >= 0:
            total_abs, nonzero = total, balance
            counts[0] += torch.bincount(bins, minlength=NUM_BINS)
        else:
            total_abs, nonzero = float(wide.abs_().sum()), int(signs.abs_().sum(dtype=torch.int32))
            both = torch.bincount(bins.add_(NUM_BINS - 1), minlength=2 * NUM_BINS - 1)
            counts += _split_signs(both, (nonzero - balance) // 2)
        self.sums.append((total, total_abs, float(wide.mul_(wide).sum()), size, nonzero))

    def fold_channels(self) -> torch.Tensor:
        """Maximum of |x| in each channel `[C]`."""
        return self._absmax.reshape(-1, self._matrix.channels).amax(0)


def _as_float32(piece: torch.Tensor) -> torch.Tensor:
    if piece.dtype == torch.float32:
        return piece
    return _scratch.values[: piece.numel()].view(piece.shape).copy_(piece)


# -- other devices ---------------------------------------------------------------------------------------------------


def _on_device(values: torch.Tensor, matrices: list[_Matrix]) -> Summary:
    lows, highs = (torch.stack([_reduce(m, reduction) for m in matrices]) for reduction in (torch.amin, torch.amax))
    lows, highs = lows.amin(0), highs.amax(0)
    channel_absmax = torch.maximum(-lows, highs)
    exponent = _exponent_on_device(channel_absmax.amax())
    factor = ((127 - exponent) << 23).to(torch.int32).view(torch.float32)  # 2^-k to the last bit
    counts = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=values.device)
    sums = torch.zeros(5, dtype=torch.float64, device=values.device)
    for piece in (piece for matrix in matrices for piece in torch.split(matrix.values.reshape(-1), _DEVICE_PIECE)):
        single = piece.float()
        bins = (single * factor).trunc_()
        # 2 NUM_BINS bins of width 1 from -NUM_BINS on, of which the first stays empty
        both = torch.histc(bins, 2 * NUM_BINS, -NUM_BINS, NUM_BINS)[1:].long()
        counts += _split_signs(both, (single < 0).sum())
        wide = single.double()
        sums += torch.stack(
            [wide.sum(), wide.abs().sum(), wide.square().sum(), wide.new_tensor(wide.numel()), (wide != 0).sum()]
        )
    extremes = torch.stack([lows.amin(), highs.amax()]).double()
    return Summary(counts, exponent, channel_absmax, extremes, sums, locate_defects(values))


def _reduce(matrix: _Matrix, reduction: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Minimum or maximum of each channel `[C]`."""
    reduced: torch.Tensor = reduction(matrix.values, 0 if matrix.channels_are_columns else 1)
    return reduction(reduced.reshape(-1, matrix.channels), 0).float()


def _exponent_on_device(absmax: torch.Tensor) -> torch.Tensor:
    """As `statistics.exponent_of`."""
    return torch.frexp(torch.nan_to_num(absmax).clamp_min(LEAST_ABSMAX)).exponent.long() - LOG_BINS
