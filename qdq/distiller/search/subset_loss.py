"""`SubsetLoss`: the loss of a model on a fixed part of labelled batches, which a search asks for again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from qdq.batch import count_samples, require_batches, tensors_of
from qdq.device import find_device, move_batch, without_tf32
from qdq.distiller.search.fingerprint import digest_batches
from qdq.errors import DataError
from qdq.forward import call_model, evaluating
from qdq.qat.losses import cross_entropy

Criterion = Callable[[torch.Tensor, Any], torch.Tensor]
"""The mean loss of a batch from the outputs of the model and the batch."""


class SubsetLoss:
    """The mean loss over the samples of the first batches.

    Args:
        batches: A list or a loader of `(inputs, labels)`, which gives the same batches in every pass.
        criterion: The loss of a batch.
        fraction: Of the batches, above 0 to 1; below 1, their number must be known.
        memoize: Keep the batches in memory instead of reading them in each pass.

    Raises:
        ArgumentTypeError: One tensor instead of batches.
        DataError: There is no batch with samples, or a fraction of an unknown number is asked for.

    Attributes:
        first_batch: The first batch with samples.
    """

    def __init__(
        self,
        batches: Any,
        criterion: Criterion = cross_entropy,
        fraction: float = 1.0,
        memoize: bool = False,
    ) -> None:
        require_batches(batches)
        self._batches = batches
        self._criterion = criterion
        self._num_batches = _count_batches(batches, fraction)
        self._memory: list[Any] | None = None
        self._marks: list[list[float]] = []
        self._num_samples = 0
        self.first_batch: Any = None
        self._look_through(memoize)

    def __call__(self, model: nn.Module) -> float:
        """The loss.

        Args:
            model: The model; batches are moved to its device.

        Raises:
            DataError: The batches differ from those of an earlier pass, or have no labels.
        """
        total = 0.0
        device = find_device(model)
        with torch.no_grad(), evaluating(model), without_tf32():
            for batch in self._read_again():
                size = count_samples(batch)
                if size:
                    outputs = call_model(model, batch)
                    loss = self._criterion(outputs, move_batch(batch, device))
                    total += size * float(loss)
        return total / self._num_samples

    def digest(self) -> str:
        """A hash of the batches and the name of the criterion, for a journal; it reads all data once."""
        name = getattr(self._criterion, "__qualname__", "")
        return digest_batches(self._read_again(), name)

    def _look_through(self, memoize: bool) -> None:
        """The first pass."""
        batches = []
        for batch in islice(self._batches, self._num_batches):
            self._marks.append(_mark(batch))
            self._num_samples += count_samples(batch)
            if self.first_batch is None and self._num_samples:
                self.first_batch = batch
            if memoize:
                batches.append(batch)
        if not self._num_samples:
            raise DataError(
                "there is no batch with samples to evaluate on.", "give labelled batches."
            )
        if memoize:
            self._memory = batches

    def _read_again(self) -> Iterator[Any]:
        """The batches of the first pass.

        Raises:
            DataError: They are others now.
        """
        if self._memory is not None:
            yield from self._memory
            return
        number = 0
        for batch in islice(self._batches, self._num_batches):
            if number < len(self._marks) and _mark(batch) != self._marks[number]:
                raise _changed(f"batch {number} differs from that of the first pass")
            number += 1
            yield batch
        if number != len(self._marks):
            raise _changed(f"there were {len(self._marks)} batches, and now there are {number}")


def _changed(difference: str) -> DataError:
    return DataError(
        f"{difference}; a search needs the same data for every evaluation.",
        "use a list or a loader without shuffle and random crops, or keep the batches in memory "
        "(lapq_eval_memoize_dataloader).",
    )


def _count_batches(batches: Any, fraction: float) -> int | None:
    """How many batches a fraction is; None: all of them."""
    if fraction == 1:
        return None
    try:
        return math.ceil(fraction * len(batches))
    except TypeError as error:
        raise DataError(
            f"a fraction of {fraction} of the batches is asked for, and they have no length.",
            "give a list or a loader with a length, or the fraction 1.",
        ) from error


def _mark(batch: Any) -> list[float]:
    """Numbers that change with the samples of a batch and with their order; cheap beside a forward."""
    marks = []
    for tensor in tensors_of(batch):
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
        sums = rows.sum(1, dtype=torch.float64)
        places = torch.arange(1, len(sums) + 1, dtype=torch.float64, device=sums.device)
        marks.append(float(sums @ places))
    return marks
