"""The statistics of one tensor on a GPU, where nothing waits for the device until they are read.

The time of a GPU goes into passes over memory, and that of the host into the number of operators. So a dozen operators
read a tensor, and what is left of it, a few kilobytes, is added to the rest eight tensors at a time.

Every value gets a code: the number of edges that are not above it. The edges are those of the bins, two around zero,
and two beyond the largest value. One count of the codes then gives the histogram, the signs, the zeros, and the values
that are NaN or Inf. Comparisons are exact, so the counts are those of the CPU. Codes are integers, whose histogram is
deterministic on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qdq.observers.tensor_statistics import (
    LEAST_EXPONENT,
    LOG_BINS,
    MOST_EXPONENT,
    NUM_BINS,
    TensorStatistics,
    combine_records,
)

_PIECE = (
    1 << 24
)  # elements of the intermediate results, 8 bytes each, or 12 if the values are no float32
_ROW = 1 << 11  # elements that are added in float32
_PENDING = 8  # summaries that are added at once, of 35 kB each

_ZERO = NUM_BINS + 1
"""The code of 0. Code 4096 - i is bin i of negative values, 4098 + i bin i of positive ones."""
_NUM_CODES = 2 * NUM_BINS + 3
"""The first code is -Inf, the last one Inf and NaN."""

_FLOAT32_BIAS = 127
_FLOAT64_BIAS = 1023
_LEAST_FLOAT32 = 2.0**-149
_FAR = 1 << 62  # beyond any place in a tensor


@dataclass(frozen=True)
class Layout:
    """How the values of a tensor lie in memory.

    Args:
        shape: The shape of the tensor.
        order: The axes from the outermost in memory to the innermost.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def locate(self, place: int) -> int:
        """The flat index of the value at a place in memory."""
        sorted_shape = [self.shape[axis] for axis in self.order]
        coordinates = dict(zip(self.order, np.unravel_index(place, sorted_shape), strict=True))
        sorted_coordinates = [coordinates[axis] for axis in range(len(self.shape))]
        return int(np.ravel_multi_index(sorted_coordinates, self.shape))


@dataclass(frozen=True)
class DeviceSummary:
    """Result of `summarize_on_device`; tensors on the device of the values.

    Args:
        counts: Integers `[_NUM_CODES]`, how often each code occurs.
        exponent: int32 `[]`, the exponent k of `TensorStatistics`.
        channel_absmax: As `Summary.channel_absmax`.
        low: The smallest value, `[]` of the type of the values.
        high: The largest value.
        sums: float64 `[3]`: sum of x and |x| in units of 2^k, of x^2 in units of 4^k.
        places: int64 `[2]`: place in memory of the first -Inf, and of the first Inf or NaN, if there is one.
        layout: The layout of the values.
    """

    counts: torch.Tensor
    exponent: torch.Tensor
    channel_absmax: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    sums: torch.Tensor
    places: torch.Tensor
    layout: Layout


def summarize_on_device(values: torch.Tensor, channel_axis: int) -> DeviceSummary:
    """Read a tensor without waiting for its device.

    Args:
        values: As for `summarize`, with at least one axis.
        channel_axis: The axis of the channels.
    """
    channel_absmax = _reduce_absmax(values, channel_axis)
    low, high = torch.aminmax(values)
    exponent = _find_exponent(channel_absmax.amax())
    width = ((exponent + _FLOAT32_BIAS) << 23).view(torch.float32)  # 2^k
    inverse_width = width.reciprocal()
    units, least = _make_edges(values.device)
    edges = torch.addcmul(least, units, width)

    flat, layout = _flatten(values)
    counts, places, sums = [], [], []
    for piece in torch.split(flat, _PIECE):
        single = piece.float()
        codes = torch.bucketize(single, edges, right=True, out_int32=True)
        counts.append(torch.histc(codes, _NUM_CODES, 0, _NUM_CODES))
        places.append(torch.stack([codes.argmin(), codes.argmax()]))
        del codes
        sums.append(_sum(single, inverse_width))
    return DeviceSummary(
        counts=counts[0] if len(counts) == 1 else torch.stack(counts).sum(0),
        exponent=exponent,
        channel_absmax=channel_absmax,
        low=low,
        high=high,
        sums=sums[0] if len(sums) == 1 else torch.stack(sums).sum(0),
        places=_find_first(counts, places),
        layout=layout,
    )


def _reduce_absmax(values: torch.Tensor, channel_axis: int) -> torch.Tensor:
    """The maximum of |x| in each channel, float32."""
    reduced_axes = [axis for axis in range(values.dim()) if axis != channel_axis % values.dim()]
    if not reduced_axes:
        return values.abs().float()
    absmax: torch.Tensor = torch.linalg.vector_norm(values, math.inf, reduced_axes, keepdim=True)
    return absmax.float()


def _find_exponent(absmax: torch.Tensor) -> torch.Tensor:
    """As `tensor_statistics.exponent_of`, int32; the largest exponent for NaN and Inf."""
    biased = (absmax.view(torch.int32) >> 23) & 0xFF
    exponent: torch.Tensor = biased - (_FLOAT32_BIAS - 1 + LOG_BINS)
    return exponent.clamp_(LEAST_EXPONENT, MOST_EXPONENT)


@functools.cache
def _make_edges(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges as multiples of the width of a bin, and what is added to them, float32 `[_NUM_CODES - 1]`.

    A bin of positive values contains its edge next to 0, and so does one of negative values. So the edges of negative
    values are moved up by one float.
    """
    steps = torch.arange(1, NUM_BINS + 1, dtype=torch.float32, device=device)
    negative_steps = torch.nextafter(-steps, torch.zeros_like(steps)).flip(0)
    units = torch.cat([negative_steps, steps.new_zeros(2), steps])
    least = torch.zeros_like(units)
    least[_ZERO].fill_(_LEAST_FLOAT32)
    return units, least


def _flatten(values: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """The values in memory order `[n]` without a copy; those of a tensor with gaps in memory in a copy."""
    strides = values.stride()
    order = sorted(range(values.dim()), key=lambda axis: (-strides[axis], axis))
    if not values.permute(order).is_contiguous():
        order = list(range(values.dim()))
    return values.permute(order).reshape(-1), Layout(tuple(values.shape), tuple(order))


def _sum(values: torch.Tensor, inverse_width: torch.Tensor) -> torch.Tensor:
    """As `DeviceSummary.sums`: rows in float32, whose squares are far from its limits, then their sums in float64."""
    size = values.numel()
    scaled = values.new_empty(math.ceil(size / _ROW) * _ROW)
    torch.mul(values, inverse_width, out=scaled[:size])
    if size < scaled.numel():
        scaled[size:].zero_()
    rows = scaled.view(-1, _ROW)
    row_sums = [
        rows.sum(1),
        torch.linalg.vector_norm(rows, 1, 1),
        torch.linalg.vector_norm(rows, 2, 1),
    ]
    wide = torch.stack(row_sums).double()
    wide[2].square_()
    return wide.sum(1)


def _find_first(counts: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
    """The places of the first defects in all pieces."""
    first = places[-1]
    if len(places) == 1:
        return first
    first = first + (len(places) - 1) * _PIECE
    for index in reversed(range(len(places) - 1)):
        is_in_piece = _count_defects(counts[index]) > 0
        first = torch.where(is_in_piece, places[index] + index * _PIECE, first)
    return first


def _count_defects(counts: torch.Tensor) -> torch.Tensor:
    """Number of -Inf, and of Inf and NaN `[..., 2]`."""
    return counts[..., :: _NUM_CODES - 1]


@dataclass(frozen=True)
class Defects:
    """The NaN and Inf of one tensor.

    Args:
        number: Number of the batch.
        count: How many there are.
        first: Flat index of the first one.
        size: Number of values.
    """

    number: int
    count: int
    first: int
    size: int


class DeviceTally:
    """Adds up the summaries of one tensor; all of it stays on the device."""

    def __init__(self) -> None:
        self._pending: list[DeviceSummary] = []
        self._numbers: list[int] = []
        self._layouts: list[Layout] = []
        # float64 [P, 8]: low, high, the three sums, number of zeros, number of defects, place of the first one
        self._rows: list[torch.Tensor] = []
        self._counts: torch.Tensor | None = None  # int64 [2, NUM_BINS]
        self._exponent: torch.Tensor | None = None  # int64 []
        self._channel_absmax: torch.Tensor | None = None

    def add(self, number: int, summary: DeviceSummary) -> None:
        """Add a summary to the batch with this number."""
        self._numbers.append(number)
        self._layouts.append(summary.layout)
        self._pending.append(summary)
        if len(self._pending) == _PENDING:
            self._add_pending()

    def tensors(self) -> list[torch.Tensor]:
        """What `read` needs, on the device."""
        with torch.inference_mode(False), torch.no_grad():
            self._add_pending()
            assert self._counts is not None  # noqa: S101  # a tally is made for its first summary
            assert self._exponent is not None  # noqa: S101
            tensors = [self._counts, self._exponent, torch.cat(self._rows)]
        if self._channel_absmax is not None:
            tensors.append(self._channel_absmax)
        return tensors

    def read(self, tensors: Iterator[torch.Tensor]) -> tuple[TensorStatistics, Defects | None]:
        """The statistics, which are valid if there is no defect, and the first defects.

        Args:
            tensors: The result of `tensors`, on the CPU; more may follow.
        """
        counts = next(tensors).numpy()
        exponent = int(next(tensors))
        rows = next(tensors).numpy()
        channel_absmax = None
        if self._channel_absmax is not None:
            channel_absmax = next(tensors).numpy()
        sizes = np.array([layout.size for layout in self._layouts], np.float64)
        records = np.column_stack([rows[:, :5], sizes, sizes - rows[:, 5]])
        numbers, records = combine_records(np.array(self._numbers), records)
        statistics = TensorStatistics(
            counts=counts,
            exponent=exponent,
            channel_absmax=channel_absmax,
            numbers=numbers,
            records=records,
        )
        return statistics, self._find_defects(rows)

    def _find_defects(self, rows: npt.NDArray[np.float64]) -> Defects | None:
        """The defects of the first tensor that has any."""
        indices = np.flatnonzero(rows[:, 6])
        if not indices.size:
            return None
        index = int(indices[0])
        layout = self._layouts[index]
        count, place = rows[index, 6:].astype(int).tolist()
        return Defects(self._numbers[index], count, layout.locate(place), layout.size)

    def _add_pending(self) -> None:
        """Add the summaries that have come since the last call, all at once."""
        summaries = self._pending
        if not summaries:
            return
        self._add_channels([summary.channel_absmax for summary in summaries])
        counts = torch.stack([summary.counts for summary in summaries]).long()
        exponents = torch.stack([summary.exponent for summary in summaries]).long()
        self._rows.append(_make_rows(summaries, counts, exponents))
        histograms = _split_signs(counts)
        if self._counts is not None and self._exponent is not None:
            histograms = torch.cat([self._counts[None], histograms])
            exponents = torch.cat([self._exponent[None], exponents])
        self._counts, self._exponent = add_histograms(histograms, exponents)
        self._pending = []

    def _add_channels(self, maxima: list[torch.Tensor]) -> None:
        """Add the maxima of the channels; give them up for good if their shape changes."""
        is_first = not self._rows
        if self._channel_absmax is not None:
            maxima = [self._channel_absmax, *maxima]
        elif not is_first:
            return
        self._channel_absmax = None
        if all(absmax.shape == maxima[0].shape for absmax in maxima):
            self._channel_absmax = torch.stack(maxima).amax(0)


def _make_rows(
    summaries: list[DeviceSummary], counts: torch.Tensor, exponents: torch.Tensor
) -> torch.Tensor:
    """A row of `DeviceTally` for each summary.

    Args:
        summaries: `P` summaries.
        counts: Their counts, int64 `[P, _NUM_CODES]`.
        exponents: Their exponents, int64 `[P]`.
    """
    widths = ((exponents + _FLOAT64_BIAS) << 52).view(torch.float64)
    extremes = [summary.low for summary in summaries] + [summary.high for summary in summaries]
    sums = torch.stack([summary.sums for summary in summaries])
    places = torch.stack([summary.places for summary in summaries])
    defects = _count_defects(counts)
    first = places.masked_fill(defects == 0, _FAR).amin(1)
    facts = torch.stack([counts[:, _ZERO], defects.sum(1), first], 1)
    columns = [
        torch.stack(extremes).float().double().view(2, -1).T,
        sums * torch.stack([widths, widths, widths.square()], 1),
        facts.double(),
    ]
    return torch.cat(columns, 1)


def _split_signs(counts: torch.Tensor) -> torch.Tensor:
    """Histograms as in `TensorStatistics` `[P, 2, NUM_BINS]`.

    Args:
        counts: int64 `[P, _NUM_CODES]`.
    """
    positives = counts[:, _ZERO + 1 : -1]
    negatives = counts[:, 1:_ZERO].flip(1)
    histograms = torch.stack([positives, negatives], 1)
    histograms[:, 0, 0] += counts[:, _ZERO]
    return histograms


def add_histograms(
    histograms: torch.Tensor, exponents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of histograms at the largest of their exponents.

    A bin of the sum is a difference of the running total, because adding into bins by an index is not deterministic on
    a GPU, or slow.

    Args:
        histograms: int64 `[P, 2, NUM_BINS]`.
        exponents: int64 `[P]`.

    Returns:
        int64 `[2, NUM_BINS]`, and the exponent, int64 `[]`.
    """
    exponent = exponents.amax()
    shifts = (exponent - exponents).clamp_max_(LOG_BINS)
    starts = torch.arange(NUM_BINS + 1, device=histograms.device) << shifts[:, None]
    starts.clamp_max_(NUM_BINS)
    running = torch.nn.functional.pad(histograms.cumsum(2), (1, 0))
    totals = running.gather(2, starts[:, None].expand(-1, 2, -1)).sum(0)
    return totals.diff(dim=1), exponent
