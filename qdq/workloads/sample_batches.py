"""A list of batches of any kind, with what the report says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qdq.batch import count_samples, take_samples
from qdq.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class SampleBatches:
    """Batches of any form that `qdq.predict` takes; every pass gives the same ones in the same order.

    Args:
        batches: The batches.
        description: Their source, for the report.
        labels: Class index of each sample if the samples have classes, else None.
        label_note: How the labels were found, or why there are none.

    Raises:
        ArgumentError: There is no batch.
    """

    batches: Sequence[Any] = field(repr=False)
    description: str
    labels: list[int] | None = field(default=None, repr=False)
    label_note: str = "none"

    def __post_init__(self) -> None:
        if not self.batches:
            raise ArgumentError(f"there is no batch in {self.description}.", "give more data.")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches."""
        return sum(map(count_samples, self.batches))

    def subset(self, n: int) -> SampleBatches:
        """The first `n` samples, or all if there are fewer; the last batch is cut.

        Raises:
            ArgumentError: `n` is below 1.
        """
        if n < 1:
            raise ArgumentError(f"n is {n}; it must be 1 or more.", "pass a positive n.")
        if n >= self.num_samples:
            return self
        batches = []
        remaining = n
        for batch in self.batches:
            if remaining <= 0:
                break
            batches.append(take_samples(batch, remaining))
            remaining -= count_samples(batch)
        labels = None if self.labels is None else self.labels[:n]
        description = f"the first {n} of: {self.description}"
        return replace(self, batches=batches, labels=labels, description=description)


@dataclass(frozen=True, eq=False)
class ShuffledBatches(SampleBatches):
    """Batches to train on: every pass gives them in another order, drawn from torch's global generator."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(self.batches)).tolist():
            yield self.batches[index]
