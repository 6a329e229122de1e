"""`TensorCollector`: takes the batches of one tensor and keeps what `TensorStatistics` holds, on the device."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qdq.errors import CalibrationError
from qdq.observers.finite import require_tensor
from qdq.observers.summarize import Summary, add_counts, summarize
from qdq.observers.tensor_statistics import LEAST_EXPONENT, TensorStatistics


class TensorReader:
    """Summaries of the tensors of one batch: the input of a block, which its shortcut sees too, is read once.

    Between batches `forget` must be called: a caller may fill the memory of an input again, and no tensor tells.
    """

    def __init__(self) -> None:
        self._found: MutableMapping[torch.Tensor, tuple[object, Summary]] = WeakIdKeyDictionary()

    def forget(self) -> None:
        """Read all tensors anew."""
        self._found.clear()

    def read(self, inputs: torch.Tensor, channel_axis: int | None) -> Summary:
        """As `summarize`."""
        if inputs.is_inference():  # nobody could tell whether it has been changed since
            return summarize(inputs, channel_axis)
        state = inputs._version, channel_axis
        if inputs not in self._found or self._found[inputs][0] != state:
            self._found[inputs] = state, summarize(inputs, channel_axis)
        return self._found[inputs][1]


class TensorCollector:
    """Collects everything that any solver needs from one tensor, in one pass.

    Nothing is kept of a batch but seven numbers; on a GPU nothing waits for the device until `statistics` is called.

    Args:
        channel_axis: The axis of the channels; None: 1 of four and more dimensions, else the last.
        reader: What several collectors of one pass share; None: every tensor is read, whoever has read it before.

    Attributes:
        batch: Number of the batch at hand; several calls with one number count as one batch. None: every call is a
            batch of its own.
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
        self._records: dict[int, torch.Tensor] = {}  # float64 [7] by number of the batch
        self._defects: dict[
            int, torch.Tensor
        ] = {}  # int64 [3] by number: `Summary.defects` and the size

    @property
    def num_batches(self) -> int:
        """How many batches it has seen."""
        return len(self._records)

    @torch.no_grad()
    def collect(self, inputs: torch.Tensor) -> None:
        """Take a tensor into account; an empty one changes nothing.

        Args:
            inputs: Any shape, float16, bfloat16, float32 or float64; taken as float32.

        Raises:
            CalibrationError: NaN or Inf, with how many and where the first is; from a GPU `statistics` raises it.
            ArgumentTypeError: No tensor.
        """
        require_tensor(inputs)
        if inputs.numel() == 0:
            return
        number = self.batch if self.batch is not None else max(self._records, default=-1) + 1
        found = self._read(inputs, self.channel_axis)
        if inputs.device.type == "cpu" and int(found.defects[0]):
            raise _defective(found.defects, inputs.numel())
        self._note_defects(number, found.defects, inputs.numel())
        self._add(found)
        self._record(number, found)

    def _note_defects(self, number: int, defects: torch.Tensor, size: int) -> None:
        if defects.device.type != "cpu":
            found = torch.cat([defects, defects.new_tensor([size])])
            before = self._defects.get(number, found)
            self._defects[number] = torch.where(before[0] > 0, before, found)

    def _add(self, found: Summary) -> None:
        if self._counts is None:
            self._counts, self._exponent = found.counts, found.exponent
            self._channel_absmax = found.channel_absmax
            return
        device = self._counts.device
        self._counts, self._exponent = add_counts(
            self._counts, self._exponent, found.counts.to(device), found.exponent.to(device)
        )
        if self._channel_absmax is not None:
            if self._channel_absmax.shape == found.channel_absmax.shape:
                self._channel_absmax = torch.maximum(
                    self._channel_absmax, found.channel_absmax.to(device)
                )
            else:
                self._channel_absmax = None

    def _record(self, number: int, found: Summary) -> None:
        record = torch.cat([found.extremes, found.sums])
        if (before := self._records.get(number)) is not None:
            record = record.to(before.device)
            low, high = (
                torch.minimum(before[:1], record[:1]),
                torch.maximum(before[1:2], record[1:2]),
            )
            record = torch.cat([low, high, before[2:] + record[2:]])
        self._records[number] = record

    def statistics(self) -> TensorStatistics:
        """What has been collected so far, on the CPU.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU.
        """
        if self._counts is None:
            return TensorStatistics.empty()
        self._raise_defects()
        numbers = sorted(self._records)
        channels = self._channel_absmax
        return TensorStatistics(
            counts=self._counts.cpu().numpy().copy(),
            exponent=int(self._exponent),
            channel_absmax=None if channels is None else channels.cpu().numpy().copy(),
            numbers=torch.tensor(numbers, dtype=torch.int64).numpy(),
            records=torch.stack([self._records[number] for number in numbers]).cpu().numpy(),
        )

    def _raise_defects(self) -> None:
        for number, defects in self._defects.items():
            if int(defects[0]):
                error = _defective(defects[:2], int(defects[2]))
                raise CalibrationError(f"batch {number}: {error.message}", error.fix)


def _defective(defects: torch.Tensor, size: int) -> CalibrationError:
    count, first = defects.tolist()
    return CalibrationError(
        f"{count} of {size} values are NaN or Inf, the first at flat index {first}; a range needs finite ones.",
        "run the float model on this batch: either the data or a layer before this one is broken.",
    )
