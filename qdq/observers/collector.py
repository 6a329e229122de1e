"""`TensorCollector`: takes the batches of one tensor and keeps its statistics on the device."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qdq.errors import CalibrationError
from qdq.observers.finite import require_tensor
from qdq.observers.summarize import Summary, add_counts, summarize
from qdq.observers.tensor_statistics import LEAST_EXPONENT, TensorStatistics


class TensorReader:
    """Summaries of the tensors of one batch: a tensor with several readers, like the input of a block, is read once.

    Call `forget` between batches: a caller may reuse the memory of an input, which the tensor does not show.
    """

    def __init__(self) -> None:
        self._summaries: MutableMapping[torch.Tensor, tuple[object, Summary]] = (
            WeakIdKeyDictionary()
        )

    def forget(self) -> None:
        """Read all tensors again."""
        self._summaries.clear()

    def read(self, inputs: torch.Tensor, channel_axis: int | None) -> Summary:
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


class TensorCollector:
    """Collects everything that any solver needs from one tensor, in one pass.

    Only seven numbers of a batch are kept. On a GPU nothing waits for the device until `statistics` is called.

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
        self._counts: torch.Tensor | None = None
        self._exponent = torch.tensor(LEAST_EXPONENT)
        self._channel_absmax: torch.Tensor | None = None
        # float64 [7] by number of the batch
        self._records: dict[int, torch.Tensor] = {}
        # int64 [3] by number of the batch: `Summary.defects` and the size
        self._defects: dict[int, torch.Tensor] = {}

    @property
    def num_batches(self) -> int:
        """Number of batches so far."""
        return len(self._records)

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
        number = self.batch if self.batch is not None else max(self._records, default=-1) + 1
        summary = self._read(inputs, self.channel_axis)
        if inputs.device.type != "cpu":
            self._note_defects(number, summary.defects, inputs.numel())
        elif int(summary.defects[0]):
            raise _defect_error(summary.defects, inputs.numel())
        self._add_counts(summary)
        self._add_record(number, summary)

    def _note_defects(self, number: int, defects: torch.Tensor, size: int) -> None:
        """Keep the first defects of a batch on the device."""
        entry = torch.cat([defects, defects.new_tensor([size])])
        former = self._defects.get(number, entry)
        self._defects[number] = torch.where(former[0] > 0, former, entry)

    def _add_counts(self, summary: Summary) -> None:
        """Add the histogram and the maxima of the channels."""
        if self._counts is None:
            self._counts = summary.counts
            self._exponent = summary.exponent
            self._channel_absmax = summary.channel_absmax
            return
        device = self._counts.device
        self._counts, self._exponent = add_counts(
            self._counts, self._exponent, summary.counts.to(device), summary.exponent.to(device)
        )
        if self._channel_absmax is None:
            return
        if self._channel_absmax.shape != summary.channel_absmax.shape:
            self._channel_absmax = None
            return
        absmax = summary.channel_absmax.to(device)
        self._channel_absmax = torch.maximum(self._channel_absmax, absmax)

    def _add_record(self, number: int, summary: Summary) -> None:
        """Add the numbers of a batch, of which another part may have come earlier."""
        record = torch.cat([summary.extremes, summary.sums])
        former = self._records.get(number)
        if former is not None:
            record = record.to(former.device)
            low = torch.minimum(former[:1], record[:1])
            high = torch.maximum(former[1:2], record[1:2])
            record = torch.cat([low, high, former[2:] + record[2:]])
        self._records[number] = record

    def statistics(self) -> TensorStatistics:
        """The statistics collected so far, on the CPU.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU.
        """
        if self._counts is None:
            return TensorStatistics.empty()
        self._raise_defects()
        numbers = sorted(self._records)
        channel_absmax = None
        if self._channel_absmax is not None:
            channel_absmax = self._channel_absmax.cpu().numpy().copy()
        return TensorStatistics(
            counts=self._counts.cpu().numpy().copy(),
            exponent=int(self._exponent),
            channel_absmax=channel_absmax,
            numbers=torch.tensor(numbers, dtype=torch.int64).numpy(),
            records=torch.stack([self._records[number] for number in numbers]).cpu().numpy(),
        )

    def _raise_defects(self) -> None:
        for number, defects in self._defects.items():
            if int(defects[0]):
                error = _defect_error(defects[:2], int(defects[2]))
                raise CalibrationError(f"batch {number}: {error.message}", error.fix)


def _defect_error(defects: torch.Tensor, size: int) -> CalibrationError:
    count, first = defects.tolist()
    return CalibrationError(
        f"{count} of {size} values are NaN or Inf, the first at flat index {first}; a range needs finite ones.",
        "run the float model on this batch: either the data or a layer before this one is broken.",
    )
