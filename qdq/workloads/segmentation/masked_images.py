"""Images with the class of every pixel, and how they become batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qdq.batch import Labelled
from qdq.workloads.sample_batches import DrawnBatches

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
class MaskBatches(DrawnBatches):
    """Images as batches of one size.

    Iterating gives `Labelled(images, masks)`: float32 `[B, 3, H, W]` and int64 `[B, H, W]`.

    Args:
        items: The images with their masks.
    """

    items: MaskedImages = field(repr=False)

    def __iter__(self) -> Iterator[Labelled]:
        for pairs in self.load_items():
            images, masks = zip(*pairs, strict=True)
            yield Labelled(torch.stack(images), torch.stack(masks))

    @property
    def labels(self) -> None:
        """None: an image has a class for each pixel."""

    @property
    def label_note(self) -> str:
        """Where the masks are used."""
        return "masks, which the mean IoU needs"
