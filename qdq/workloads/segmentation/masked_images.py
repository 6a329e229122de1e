"""Images with the class of every pixel, and how they become batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from qdq.batch import Labelled
from qdq.errors import ArgumentError

IGNORED = 255
"""The class of pixels that count in no figure, as in the masks of PASCAL VOC."""


class MaskedImages(Protocol):
    """Images with masks by index, which are read or drawn when they are needed; `description` is for the report."""

    @property
    def description(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        """An image, float32 `[3, H, W]` normalized for the network, and its mask, int64 `[H, W]`."""


@dataclass(frozen=True, eq=False)
class MaskBatches:
    """Images as batches of one size; every pass gives the same batches in the same order.

    Iterating gives `Labelled(images, masks)`: float32 `[B, 3, H, W]` and int64 `[B, H, W]`. The last batch may be
    smaller.

    Args:
        images: The images with their masks.
        indices: Those of them that are used, in order.
        batch_size: Images in a batch.
        description: Source, number and seed, for the report.

    Raises:
        ArgumentError: `batch_size` is below 1, or there are no images.
    """

    images: MaskedImages = field(repr=False)
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

    def __iter__(self) -> Iterator[Labelled]:
        for start in range(0, len(self.indices), self.batch_size):
            pairs = [self.images[index] for index in self.indices[start : start + self.batch_size]]
            images, masks = zip(*pairs, strict=True)
            yield Labelled(torch.stack(images), torch.stack(masks))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Number of images in a pass."""
        return len(self.indices)

    @property
    def labels(self) -> None:
        """None: an image has a class for each pixel."""

    @property
    def label_note(self) -> str:
        """Where the masks are used."""
        return "masks, which the mean IoU needs"

    def subset(self, n: int) -> MaskBatches:
        """The first `n` images, or all if there are fewer.

        Raises:
            ArgumentError: `n` is below 1.
        """
        if n >= self.num_samples:
            return self
        description = f"the first {n} of: {self.description}"
        return replace(self, indices=self.indices[:n], description=description)
