"""`TensorCollector`: takes the batches of one tensor and keeps its statistics on the device."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from qdq.device import copy_to_host
from qdq.errors import CalibrationError
from qdq.observers.finite import require_tensor
from qdq.observers.on_device import DeviceSummary, DeviceTally
from qdq.observers.summarize import Summary, summarize
from qdq.observers.tensor_statistics import Counts, TensorStatistics, coarsen

AnySummary = Summary | DeviceSummary


class TensorReader:
    """Summaries of the tensors of one batch: a tensor with several readers, like the input of a block, is read once.

    Call `forget` between batches: a caller may reuse the memory of an input, which the tensor does not show.
    """

    def __init__(self) -> None:
        self._summaries: MutableMapping[torch.Tensor, tuple[object, AnySummary]] = (
            WeakIdKeyDictionary()
        )

    def forget(self) -> None:
        """Read all tensors again."""
        self._summaries.clear()

    def read(self, inputs: torch.Tensor, channel_axis: int | None) -> AnySummary:
        """As `summarize`."""
        if inputs.is_inference():  # it has no version, so a change would not be noticed
            return summarize(inputs, channel_axis)
        state = inputs._version, channel_axis
        if inputs in self._summaries:
            summary_state, summary = self._summaries[inputs]
            if summary_state == state:
                return summary
        summary = summarize(inputs, channel_axis)
        self._summaries[inputs] = state, summary
        return summary


class _HostTally:
    """Adds up the summaries of one tensor on the CPU."""

    def __init__(self, summary: Summary) -> None:
        self._counts: Counts = np.zeros_like(summary.counts.numpy())
        self._exponent = int(summary.exponent)
        self._channel_absmax: torch.Tensor | None = torch.zeros_like(summary.channel_absmax)
        # float64 [7] by number of the batch
        self._records: dict[int, torch.Tensor] = {}

    def add(self, number: int, summary: Summary) -> None:
        """Add a summary to the batch with this number."""
        exponent = int(summary.exponent)
        common = max(self._exponent, exponent)
        added = coarsen(summary.counts.numpy(), common - exponent)
        self._counts = coarsen(self._counts, common - self._exponent) + added
        self._exponent = common
        self._add_channels(summary.channel_absmax)
        self._add_record(number, torch.cat([summary.extremes, summary.sums]))

    def _add_channels(self, absmax: torch.Tensor) -> None:
        """Add the maxima of the channels; give them up for good if their shape changes."""
        if self._channel_absmax is None:
            return
        if self._channel_absmax.shape != absmax.shape:
            self._channel_absmax = None
            return
        self._channel_absmax = torch.maximum(self._channel_absmax, absmax)

    def _add_record(self, number: int, record: torch.Tensor) -> None:
        """Add the numbers of a batch, of which another part may have come earlier."""
        former = self._records.get(number)
        if former is not None:
            low = torch.minimum(former[:1], record[:1])
            high = torch.maximum(former[1:2], record[1:2])
            record = torch.cat([low, high, former[2:] + record[2:]])
        self._records[number] = record

    def read(self) -> TensorStatistics:
        """The statistics."""
        numbers = sorted(self._records)
        channel_absmax = None
        if self._channel_absmax is not None:
            channel_absmax = self._channel_absmax.numpy().copy()
        return TensorStatistics(
            counts=self._counts,
            exponent=self._exponent,
            channel_absmax=channel_absmax,
            numbers=np.array(numbers, np.int64),
            records=torch.stack([self._records[number] for number in numbers]).numpy(),
        )


class TensorCollector:
    """Collects everything that any solver needs from one tensor, in one pass.

    Only seven numbers of a batch are kept. On a GPU nothing waits for the device until `statistics` is called. The
    tensors may come from several devices.

    Args:
        channel_axis: The axis of the channels; None: axis 1 of four and more dimensions, else the last.
        reader: Shared by the collectors of one pass; None: every tensor is read, even if another collector has read it.

    Attributes:
        batch: Number of the current batch; several calls with one number count as one batch. None: every call is a
            separate batch.
    """

    def __init__(self, channel_axis: int | None = None, reader: TensorReader | None = None) -> None:
        self.channel_axis = channel_axis
        self._read = summarize if reader is None else reader.read
        self.batch: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._numbers: set[int] = set()
        self._host_tally: _HostTally | None = None
        self._device_tallies: dict[torch.device, DeviceTally] = {}

    @property
    def num_batches(self) -> int:
        """Number of batches so far."""
        return len(self._numbers)

    @torch.no_grad()
    def collect(self, inputs: torch.Tensor) -> None:
        """Add a tensor; an empty one changes nothing.

        Args:
            inputs: Any shape, float16, bfloat16, float32 or float64; taken as float32.

        Raises:
            CalibrationError: NaN or Inf, with their number and the place of the first; on a GPU `statistics` raises it.
            ArgumentTypeError: Not a tensor.
        """
        require_tensor(inputs)
        if inputs.numel() == 0:
            return
        number = self.batch if self.batch is not None else max(self._numbers, default=-1) + 1
        summary = self._read(inputs, self.channel_axis)
        if isinstance(summary, DeviceSummary):
            tally = self._device_tallies.setdefault(inputs.device, DeviceTally())
            tally.add(number, summary)
        else:
            self._add_on_host(number, summary, inputs.numel())
        self._numbers.add(number)

    def _add_on_host(self, number: int, summary: Summary, size: int) -> None:
        count, first = summary.defects.tolist()
        if count:
            raise _defect_error(count, first, size)
        if self._host_tally is None:
            self._host_tally = _HostTally(summary)
        self._host_tally.add(number, summary)

    def statistics(self) -> TensorStatistics:
        """The statistics collected so far, on the CPU; each device is waited for once.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU.
        """
        return self.finish(iter(copy_to_host(self.tensors())))

    def tensors(self) -> list[torch.Tensor]:
        """What `finish` needs, on the devices: the tensors of several collectors can be copied to the CPU together."""
        tensors = []
        for tally in self._device_tallies.values():
            tensors += tally.tensors()
        return tensors

    def finish(self, tensors: Iterator[torch.Tensor]) -> TensorStatistics:
        """As `statistics`.

        Args:
            tensors: The result of `tensors`, on the CPU; those of the next collector may follow.

        Raises:
            CalibrationError: As for `statistics`.
        """
        statistics = TensorStatistics.empty()
        if self._host_tally is not None:
            statistics = self._host_tally.read()
        for tally in self._device_tallies.values():
            part, defects = tally.read(tensors)
            if defects is not None:
                error = _defect_error(defects.count, defects.first, defects.size)
                raise CalibrationError(f"batch {defects.number}: {error.message}", error.fix)
            statistics = statistics.add_part(part)
        return statistics


def _defect_error(count: int, first: int, size: int) -> CalibrationError:
    return CalibrationError(
        f"{count} of {size} values are NaN or Inf, the first at flat index {first}; a range needs finite ones.",
        "run the float model on this batch: either the data or a layer before this one is broken.",
    )
