"""The statistics of one tensor from one pass over the data: plain numpy, merged exactly, enough for every solver.

The histogram counts |x| in bins of width 2^k, with values of 0 and above in row 0 and negative ones in row 1. For a
larger value, k grows by d and bin i becomes bin floor(i / 2^d): no count moves to a wrong bin, because floor(|x| 2^-k)
is exact in float32 and floor(floor(a) / 2^d) = floor(a / 2^d). So the counts depend only on the values, not on their
order or on how they were split. Sums are kept for each batch and added by `math.fsum`, which rounds once, so they do
not depend on the order either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qdq.errors import ArgumentError
from qdq.formats import AMAX_FLOOR, Format, scale_from_amax

LOG_BINS = 12
NUM_BINS = 1 << LOG_BINS
"""Number of histogram bins for each sign. With any data, at least half of them cover the range of |x|."""

LEAST_ABSMAX = AMAX_FLOOR
"""Bins are not finer for smaller values: below it all ranges have the same scale."""

LEAST_EXPONENT = -63 - LOG_BINS
MOST_EXPONENT = 128 - LOG_BINS
"""The exponent of the largest float32, which is below 2^128."""

MOST_COUNT = 2**49
"""Upper limit on the values of a bin and on batch numbers, so that sums over all bins are exact in int64."""

MOST_SUM = 2.0**320
"""Upper limit on a sum: the squares of 2^62 values of float32."""

RECORD = ("low", "high", "sum", "sum_abs", "sum_squares", "count", "nonzero")
"""The numbers that are kept for each batch, in this order."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """Statistics of all values of one tensor.

    Args:
        counts: int64 `[2, NUM_BINS]`, see the top of this file.
        exponent: k, the smallest with max|x| < NUM_BINS * 2^k that is not below LEAST_EXPONENT.
        channel_absmax: The maximum of |x| in each channel: float32, of the rank of the tensor, with size 1 on all axes
            except the channel axis; None before data, or if that shape differs from batch to batch.
        numbers: int64 `[B]`, the numbers of the batches, ascending.
        records: float64 `[B, 7]`, see RECORD.
    """

    counts: Counts
    exponent: int
    channel_absmax: npt.NDArray[np.float32] | None
    numbers: Counts
    records: Floats

    @classmethod
    def empty(cls) -> TensorStatistics:
        """Statistics before any data; merging with them changes nothing."""
        counts = np.zeros((2, NUM_BINS), np.int64)
        return cls(counts, LEAST_EXPONENT, None, np.zeros(0, np.int64), np.zeros((0, len(RECORD))))

    def _column(self, name: str) -> Floats:
        column: Floats = self.records[:, RECORD.index(name)]
        return column

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def num_batches(self) -> int:
        """Number of batches that reached the tensor."""
        return len(self.numbers)

    @property
    def end_number(self) -> int:
        """One more than the number of the last batch; 0 before data."""
        return int(self.numbers[-1]) + 1 if self.num_batches else 0

    @property
    def count(self) -> int:
        """Number of values."""
        return round(math.fsum(self._column("count")))

    @property
    def zeros(self) -> int:
        """Number of values that are zero."""
        return self.count - self.nonzero

    @property
    def nonzero(self) -> int:
        """Number of values that are not zero."""
        return round(math.fsum(self._column("nonzero")))

    @property
    def low(self) -> float:
        """The smallest value; 0 before data."""
        return float(self._column("low").min()) if self.num_batches else 0.0

    @property
    def high(self) -> float:
        """The largest value; 0 before data."""
        return float(self._column("high").max()) if self.num_batches else 0.0

    def batch_maxima(self, unsigned: bool = False) -> Floats:
        """Maximum of |x| in each batch `[B]`, in the order of the batches; unsigned: of the values above 0."""
        negated_low = np.zeros(()) if unsigned else -self._column("low")
        maxima: Floats = np.maximum(negated_low, self._column("high"))
        return maxima

    @property
    def absmax(self) -> float:
        """Maximum of |x|; 0 before data."""
        return float(self.batch_maxima().max()) if self.num_batches else 0.0

    @property
    def mean(self) -> float:
        """Mean of x; 0 before data."""
        return math.fsum(self._column("sum")) / max(self.count, 1)

    @property
    def std(self) -> float:
        """Standard deviation of x around its mean; 0 before data."""
        mean_square = math.fsum(self._column("sum_squares")) / max(self.count, 1)
        return math.sqrt(max(mean_square - self.mean**2, 0.0))

    @property
    def laplace_b(self) -> float:
        """Scale of the Laplace distribution around 0 that fits the non-zero values best: their mean |x|.

        Around 0, because codes are symmetric and clip |x|; without zeros, because a ReLU gives exact zeros, which no
        range rounds or clips. Unlike the mean of |x - mean| it merges exactly.
        """
        return math.fsum(self._column("sum_abs")) / max(self.nonzero, 1)

    @property
    def gauss_sigma(self) -> float:
        """Standard deviation of the Gauss distribution around 0 that fits the non-zero values, see `laplace_b`."""
        return math.sqrt(math.fsum(self._column("sum_squares")) / max(self.nonzero, 1))

    def magnitudes(self, unsigned: bool = False) -> Counts:
        """Histogram of |x| `[n]` up to the last occupied bin, at least one bin; unsigned: without negative values."""
        counts = self.counts[0] if unsigned else self.counts.sum(0)
        last_occupied = np.flatnonzero(counts).max(initial=0)
        trimmed: Counts = counts[: last_occupied + 1]
        return trimmed

    def histogram(self, columns: int) -> tuple[Counts, float]:
        """Counts of |x| without zeros, in columns of equal width, and the end of the last column.

        Args:
            columns: Upper limit on the number of columns.
        """
        counts = self.magnitudes().copy()
        counts[0] -= min(self.zeros, int(counts[0]))
        bins = -(-counts.size // columns)
        padded = np.pad(counts, (0, -counts.size % bins))
        return padded.reshape(-1, bins).sum(1), padded.size * self.width

    def rounding_sqnr_db(self, amax: float, fmt: Format) -> float:
        """Signal to quantization noise ratio of these values in a range, in dB, with each value at its bin centre.

        Args:
            amax: The range.
            fmt: The format.

        Returns:
            `inf` if there is no error, for example with zeros only.
        """
        centres = (np.arange(NUM_BINS) + 0.5) * self.width
        values = np.concatenate([centres, -centres])
        counts = self.counts.reshape(-1).astype(np.float64)
        counts[0] -= min(self.zeros, int(self.counts[0, 0]))  # zero is a code
        scale = scale_from_amax(np.float64(amax), fmt)
        errors = _round_to_codes(values / scale, fmt) * scale - values
        noise = float(counts @ errors**2)
        signal = math.fsum(self._column("sum_squares"))
        if not noise or not signal:
            return math.inf
        return 10 * math.log10(signal / noise)

    def clipped_share(self, amax: float, unsigned: bool = False) -> float:
        """Fraction of all values outside a range, 0 to 1; the bin that holds amax is split in proportion.

        Args:
            amax: The range.
            unsigned: Count the values above 0 only.
        """
        counts = self.magnitudes(unsigned)
        largest = self.high if unsigned else self.absmax
        if not self.count or amax >= largest:
            return 0.0
        bin_of_amax = min(int(amax / self.width), counts.size - 1)
        inside = amax / self.width - bin_of_amax
        beyond = int(counts[bin_of_amax + 1 :].sum()) + int(counts[bin_of_amax]) * (1 - inside)
        return beyond / self.count

    def shifted(self, by: int) -> TensorStatistics:
        """These statistics with all batch numbers larger by `by`."""
        return TensorStatistics(
            self.counts, self.exponent, self.channel_absmax, self.numbers + by, self.records
        )

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of one pass over the batches of both.

        Raises:
            ArgumentError: A batch number is in both.
        """
        numbers = np.concatenate([self.numbers, other.numbers])
        if np.unique(numbers).size != numbers.size:
            raise ArgumentError(
                "statistics with the same batches cannot be merged: their batch numbers overlap.",
                "merge files, whose batches are numbered consecutively, or statistics of different batches.",
            )
        order = np.argsort(numbers)
        exponent = max(self.exponent, other.exponent)
        counts = coarsen(self.counts, exponent - self.exponent)
        other_counts = coarsen(other.counts, exponent - other.exponent)
        return TensorStatistics(
            counts=counts + other_counts,
            exponent=exponent,
            channel_absmax=self._merge_channels(other),
            numbers=numbers[order],
            records=np.concatenate([self.records, other.records])[order],
        )

    def add_part(self, other: TensorStatistics) -> TensorStatistics:
        """As `merge`, for other parts of the same batches."""
        merged = self.shifted(other.end_number).merge(other)
        numbers = np.concatenate([other.numbers, self.numbers])
        numbers, records = combine_records(numbers, merged.records)
        return replace(merged, numbers=numbers, records=records)

    def _merge_channels(self, other: TensorStatistics) -> npt.NDArray[np.float32] | None:
        """The maxima of the channels of both; None if their shapes differ."""
        absmax, other_absmax = self.channel_absmax, other.channel_absmax
        if not self.num_batches:
            return other_absmax
        if not other.num_batches:
            return absmax
        if absmax is None or other_absmax is None or absmax.shape != other_absmax.shape:
            return None
        maxima: npt.NDArray[np.float32] = np.maximum(absmax, other_absmax)
        return maxima

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays by name, for a file."""
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "counts": self.counts,
            "exponent": np.array([self.exponent], np.int64),
            "numbers": self.numbers,
            "records": self.records,
        }
        if self.channel_absmax is not None:
            arrays["channel_absmax"] = self.channel_absmax
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[np.generic]]) -> TensorStatistics:
        """The inverse of `to_arrays`.

        Raises:
            ArgumentError: An array is missing, or has another type or shape, or the counts contradict the records.
        """
        try:
            counts, exponent = arrays["counts"], arrays["exponent"]
            numbers, records = arrays["numbers"], arrays["records"]
        except KeyError as error:
            raise _damaged(f"{error.args[0]} is missing") from None
        channels = arrays.get("channel_absmax")
        expected = {
            "counts": (counts, np.int64, (2, NUM_BINS)),
            "exponent": (exponent, np.int64, (1,)),
            "numbers": (numbers, np.int64, (numbers.size,)),
            "records": (records, np.float64, (numbers.size, len(RECORD))),
        }
        for name, (array, dtype, shape) in expected.items():
            if array.dtype != dtype or array.shape != shape:
                raise _damaged(
                    f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}"
                )
        unknown = arrays.keys() - expected.keys() - {"channel_absmax"}
        if unknown:
            raise _damaged(f"{min(unknown)!r:.40} is not one of its arrays")
        if not LEAST_EXPONENT <= exponent[0] <= MOST_EXPONENT:
            raise _damaged(f"exponent is {exponent[0]}, not {LEAST_EXPONENT} to {MOST_EXPONENT}")
        tensor = cls(counts, int(exponent[0]), channels, numbers, records)  # type: ignore[arg-type]  # checked above
        tensor._require_consistent()
        return tensor

    def _require_consistent(self) -> None:
        """Raise ArgumentError if no data could give these arrays, or if they contradict each other."""
        if self.channel_absmax is not None:
            _require_maxima(self.channel_absmax)
        is_ascending = (np.diff(self.numbers, prepend=-1) > 0).all()
        if not is_ascending or self.numbers.max(initial=0) >= MOST_COUNT:
            raise _damaged("its batch numbers do not ascend from 0, or are too large")
        self._require_consistent_records()
        is_countable = self.counts.min() >= 0 and self.counts.max() < MOST_COUNT
        if not is_countable or self.count != self.counts.sum():
            raise _damaged("its counts contradict its records")
        if self.absmax >= NUM_BINS * self.width:
            raise _damaged(f"its largest value {self.absmax:g} lies beyond its last bin")

    def _require_consistent_records(self) -> None:
        is_bounded = (np.abs(self.records) < MOST_SUM).all()
        if not is_bounded or (self._column("low") > self._column("high")).any():
            raise _damaged(
                "its records are not sums of float32, or the lowest value is above the highest"
            )
        values, nonzero = self._column("count"), self._column("nonzero")
        is_possible = ((nonzero >= 0) & (nonzero <= values)).all()
        if not is_possible or (self._column("sum_squares") < 0).any():
            raise _damaged("its records hold impossible counts or sums")


def _require_maxima(channels: npt.NDArray[np.float32]) -> None:
    """Refuse an array that cannot be the maximum of |x| in each channel."""
    if channels.dtype != np.float32 or channels.size != max(channels.shape, default=0):
        raise _damaged(
            f"channel_absmax is {channels.dtype}{list(channels.shape)}, not float32 with one axis"
        )
    if not (np.isfinite(channels) & (channels >= 0)).all():
        raise _damaged("channel_absmax holds numbers that are not maxima")


def coarsen(counts: Counts, steps: int) -> Counts:
    """Counts `[2, NUM_BINS]` of bins that are 2^steps times as wide.

    Args:
        counts: int64 `[2, NUM_BINS]`.
        steps: 0 or more.
    """
    if not steps:
        return counts
    coarse = np.zeros_like(counts)
    factor = 1 << min(steps, LOG_BINS)
    coarse[:, : NUM_BINS // factor] = counts.reshape(2, -1, factor).sum(2)
    return coarse


def combine_records(numbers: Counts, records: Floats) -> tuple[Counts, Floats]:
    """Records of parts of batches, as one record for each batch, and the numbers of the batches, ascending.

    Args:
        numbers: int64 `[P]`, the number of the batch of each part.
        records: float64 `[P, 7]`, see RECORD.
    """
    order = np.argsort(numbers, kind="stable")
    unique_numbers, starts = np.unique(numbers[order], return_index=True)
    sorted_records = records[order]
    low = np.minimum.reduceat(sorted_records[:, :1], starts)
    high = np.maximum.reduceat(sorted_records[:, 1:2], starts)
    sums = np.add.reduceat(sorted_records[:, 2:], starts)
    return unique_numbers, np.concatenate([low, high, sums], axis=1)


def exponent_of(absmax: float) -> int:
    """The exponent k for a maximum of |x|, see `TensorStatistics`."""
    return math.frexp(max(absmax, LEAST_ABSMAX))[1] - LOG_BINS


def _damaged(reason: str) -> ArgumentError:
    return ArgumentError(f"not statistics of a tensor: {reason}.", "collect them again.")


def _round_to_codes(values: npt.NDArray[np.float64], fmt: Format) -> npt.NDArray[np.float64]:
    """The nearest codes of values in units of their scale, half to even."""
    clipped = np.clip(values, fmt.qmin, fmt.qmax)
    if not fmt.is_float:
        return np.round(clipped)
    _, exponents = np.frexp(clipped)
    # 3 bits after the leading one, and 2^-9 is the smallest step.
    steps = np.ldexp(1.0, np.maximum(exponents - 4, -9))
    codes: npt.NDArray[np.float64] = np.round(clipped / steps) * steps
    return codes
