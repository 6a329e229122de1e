"""Sums over the batches of one tensor, which stay on its device until the end of a pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from qdq.distiller.statistics.records import TensorRecord
from qdq.errors import CalibrationError

_PENDING = 64  # small tensors on a device, before they become one
_MEND = "run the float model on this data: either the data or a layer before this one is broken."


class Tally:
    """Adds up a tensor, batch by batch. A row is what one call of the layer has added.

    Attributes:
        num_values: Number of values so far.
        center: The value about which deviations are measured; 0 for none.
    """

    def __init__(self, center: float = 0.0) -> None:
        self.num_values = 0
        self.center = center
        self._rows: list[torch.Tensor] = []

    @abstractmethod
    def measure(self, values: torch.Tensor) -> torch.Tensor:
        """The row of a tensor, float64 on its device."""

    @abstractmethod
    def finish(self, rows: npt.NDArray[np.float64], label: str) -> TensorRecord:
        """The record of the tensor.

        Args:
            rows: The rows, on the CPU.
            label: Name of the tensor, for messages.

        Raises:
            CalibrationError: NaN or Inf, or other data than in an earlier pass.
        """

    def add(self, values: torch.Tensor, row: torch.Tensor) -> None:
        """Add a tensor.

        Args:
            values: The tensor.
            row: Its row.
        """
        self.num_values += values.numel()
        self._rows.append(row[None])
        if len(self._rows) == _PENDING:
            self._rows = [torch.cat(self._rows)]

    def rows(self) -> torch.Tensor:
        """All rows `[calls, ...]`, on the device."""
        return torch.cat(self._rows)


class RangeTally(Tally):
    """Pass 1: extremes, their means over the samples, and the mean. A sample is a slice along axis 0.

    If a sample is one value, the extremes are those of the batch, which counts as often as it has samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_samples = 0
        self._shape = ""

    def measure(self, values: torch.Tensor) -> torch.Tensor:
        """Smallest and largest value, sums of the samples' smallest and largest values, sum."""
        values = _widen(values)
        axes = _sample_axes(values)
        lows, highs = values.amin(axes).double(), values.amax(axes).double()
        weight = 1 if lows.dim() else count_samples(values)
        total = values.sum(axes).double().sum()
        columns = [lows.min(), highs.max(), weight * lows.sum(), weight * highs.sum(), total]
        return torch.stack(columns)

    def add(self, values: torch.Tensor, row: torch.Tensor) -> None:
        """Add a tensor, see `Tally.add`."""
        self._shape = self._shape or str(tuple(values.shape))
        self._num_samples += count_samples(values)
        super().add(values, row)

    def finish(self, rows: npt.NDArray[np.float64], label: str) -> TensorRecord:
        """The record without the results of pass 2, see `Tally.finish`."""
        _require_finite(rows, label)
        low, high = rows[:, 0].min(), rows[:, 1].max()
        low_sum, high_sum, total = rows[:, 2:].sum(0)
        return TensorRecord(
            min=float(low),
            max=float(high),
            avg_min=float(low_sum / self._num_samples),
            avg_max=float(high_sum / self._num_samples),
            mean=float(total / self.num_values),
            shape=self._shape,
            total_numel=self.num_values,
        )


class DeviationTally(Tally):
    """Pass 2: standard deviation and mean absolute deviation about the mean of pass 1.

    Args:
        record: The record of pass 1.
    """

    def __init__(self, record: TensorRecord) -> None:
        assert record.mean is not None  # noqa: S101  # pass 1 has it
        super().__init__(record.mean)
        self._record = record

    def measure(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of squares and of absolute values of x - mean."""
        axes = _sample_axes(values)
        deviations = _widen(values) - self.center
        absolute = deviations.abs().sum(axes)
        squares = deviations.square_().sum(axes)
        return torch.stack([squares.double().sum(), absolute.double().sum()])

    def finish(self, rows: npt.NDArray[np.float64], label: str) -> TensorRecord:
        """The complete record, see `Tally.finish`."""
        _require_finite(rows, label)
        if self.num_values != self._record.total_numel:
            raise CalibrationError(
                f"{label} has {self.num_values} values in pass 2; it had {self._record.total_numel} in pass 1.",
                "run the same data in both passes.",
            )
        squares, absolute = rows.sum(0)
        return replace(
            self._record,
            std=math.sqrt(squares / self.num_values),
            b=float(absolute / self.num_values),
        )


def count_samples(values: torch.Tensor) -> int:
    """Number of samples of a tensor; a scalar is one.

    Args:
        values: Axis 0 counts samples.
    """
    return len(values) if values.dim() else 1


def _sample_axes(values: torch.Tensor) -> tuple[int, ...]:
    """The axes of a sample, or all if a sample is one value."""
    if values.numel() == count_samples(values):
        return tuple(range(values.dim()))
    return tuple(range(1, values.dim()))


def _widen(values: torch.Tensor) -> torch.Tensor:
    """The values in a type whose sums are accurate."""
    return values if values.dtype == torch.float64 else values.float()


def _require_finite(rows: npt.NDArray[np.float64], label: str) -> None:
    """Refuse values without a range.

    Raises:
        CalibrationError: The message says in which call of the layer the first of them came.
    """
    is_wrong = ~np.isfinite(rows).all(1)
    if is_wrong.any():
        call = int(is_wrong.argmax()) + 1
        raise CalibrationError(
            f"{label}: there is NaN or Inf, or values too large to add, in call {call} of {len(rows)}.",
            _MEND,
        )
