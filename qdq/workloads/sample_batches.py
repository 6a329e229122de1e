"""A list of batches of any kind, or items that become batches, with what the report says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch

from qdq.batch import count_samples, drop_samples, take_samples
from qdq.errors import ArgumentError
from qdq.seeds import seeded_rng


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

    @property
    def num_sources(self) -> int:
        """Number of samples: each is a source of its own."""
        return self.num_samples

    def subset(self, n: int) -> Self:
        """The first `n` samples, or all if there are fewer; the last batch is cut.

        Raises:
            ArgumentError: `n` is below 1.
        """
        _require_positive(n)
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

    def without_first(self, n: int) -> Self:
        """All samples but the first `n`; the first batch is cut.

        Args:
            n: At least 0.

        Raises:
            ArgumentError: There are no more.
        """
        batches = []
        remaining = n
        for batch in self.batches:
            size = count_samples(batch)
            if remaining < size:
                batches.append(drop_samples(batch, remaining) if remaining > 0 else batch)
            remaining -= size
        labels = None if self.labels is None else self.labels[n:]
        description = _describe_rest(n, self.description)
        return replace(self, batches=batches, labels=labels, description=description)

    def hold_out(self, n: int) -> tuple[Self, Self]:
        """All samples but the first `n`, and these.

        Args:
            n: At least 1, and fewer than there are.
        """
        return self.without_first(n), self.subset(n)

    def by_source(self) -> Self:
        """The same samples in the same order: each is a source of its own."""
        return self


class Items(Protocol):
    """Samples by index, which are read or drawn when they are needed; `description` is for the report."""

    @property
    def description(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class DrawnBatches:
    """Some of many items, in batches; every pass gives the same batches in the same order. The last may be smaller.

    Args:
        items: The items.
        indices: Those of them that are used, in order.
        batch_size: Items in a batch.
        description: Source, number and seed, for the report.

    Raises:
        ArgumentError: `batch_size` is below 1, or no item is used.
    """

    items: Items = field(repr=False)
    indices: Sequence[int] = field(repr=False)
    batch_size: int
    description: str

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ArgumentError(
                f"batch_size is {self.batch_size}; it must be 1 or more.", "pass a positive one."
            )
        if not self.indices:
            raise ArgumentError(
                "there are no images to make batches of.",
                "raise --calib-batches and --eval-images.",
            )

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Number of items in a pass."""
        return len(self.indices)

    @property
    def num_sources(self) -> int:
        """Number of items: each is a source of its own."""
        return self.num_samples

    def subset(self, n: int) -> Self:
        """The first `n` items, or all if there are fewer.

        Raises:
            ArgumentError: `n` is below 1.
        """
        _require_positive(n)
        if n >= self.num_samples:
            return self
        description = f"the first {n} of: {self.description}"
        return replace(self, indices=self.indices[:n], description=description)

    def without_first(self, n: int) -> Self:
        """All items but the first `n`.

        Args:
            n: At least 0.

        Raises:
            ArgumentError: There are no more.
        """
        description = _describe_rest(n, self.description)
        return replace(self, indices=self.indices[n:], description=description)

    def hold_out(self, n: int) -> tuple[Self, Self]:
        """All items but the first `n`, and these.

        Args:
            n: At least 1, and fewer than there are.
        """
        return self.without_first(n), self.subset(n)

    def by_source(self) -> Self:
        """The same samples in the same order: each is a source of its own."""
        return self

    def load_items(self) -> Iterator[list[Any]]:
        """The items of each batch."""
        for start in range(0, len(self.indices), self.batch_size):
            indices = self.indices[start : start + self.batch_size]
            yield [self.items[index] for index in indices]


def draw_indices(items: Items, count: int, seed: int) -> tuple[list[int], str]:
    """Some items in random order, all if there are fewer; a larger count begins with the same ones.

    Args:
        items: The items.
        count: Number of those to draw.
        seed: Seed of the order. The global random state does not change.

    Returns:
        Their indices, and what they are, for the report.
    """
    with seeded_rng(seed):
        indices = torch.randperm(len(items))[:count].tolist()
    return indices, f"{len(indices)} of {len(items)} {items.description}, drawn with seed {seed}"


def _require_positive(n: int) -> None:
    """Refuse a number of samples below 1."""
    if n < 1:
        raise ArgumentError(f"n is {n}; it must be 1 or more.", "pass a positive n.")


def _describe_rest(n: int, description: str) -> str:
    return f"all but the first {n} of: {description}" if n else description


@dataclass(frozen=True, eq=False)
class ShuffledBatches(SampleBatches):
    """Batches to train on: every pass gives them in another order, drawn from torch's global generator."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(self.batches)).tolist():
            yield self.batches[index]
