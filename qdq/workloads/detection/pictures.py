"""Pictures with boxes around the objects in them, and how they become batches of squares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qdq.errors import ArgumentError
from qdq.workloads.sample_batches import DrawnBatches

_BORDER = 114 / 255  # the grey around letterboxed images that YOLO is trained with


@dataclass(frozen=True, eq=False)
class Target:
    """The objects of one picture.

    Args:
        boxes: float32 `[K, 4]`: left, top, right, bottom in pixels.
        labels: int64 `[K]`: index of the class of each object.
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and its objects.

    Args:
        image: uint8 `[3, H, W]`.
        target: The objects.
    """

    image: Tensor
    target: Target


class Pictures(Protocol):
    """Pictures by index, which are read or drawn when they are needed; `description` is for the report."""

    @property
    def description(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture: ...


@dataclass(frozen=True, eq=False)
class PictureBatches(DrawnBatches):
    """Pictures as batches of squares.

    Iterating gives `(images, targets)`: float32 `[B, 3, size, size]` from 0 to 1, and a `Target` for each image in the
    pixels of the square.

    Args:
        items: The pictures.
        size: Side of the squares in pixels.

    Raises:
        ArgumentError: `size` is below 1.
    """

    items: Pictures = field(repr=False)
    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ArgumentError(f"size is {self.size}; it must be 1 or more.", "raise size.")

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target]]]:
        for pictures in self.load_items():
            squares = [letterbox(picture, self.size) for picture in pictures]
            images, targets = zip(*squares, strict=True)
            yield torch.stack(images), list(targets)


def letterbox(picture: Picture, size: int) -> tuple[Tensor, Target]:
    """Fit a picture into a square: its longer side becomes the side, and grey fills the rest on both sides.

    Args:
        picture: The picture.
        size: Side of the square in pixels.

    Returns:
        The image, float32 `[3, size, size]` from 0 to 1, and the objects in its pixels.
    """
    image = picture.image.float() / 255
    height, width = image.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    if (new_height, new_width) != (height, width):
        image = F.interpolate(
            image[None], (new_height, new_width), mode="bilinear", antialias=True
        )[0]
    left, top = (size - new_width) // 2, (size - new_height) // 2
    square = torch.full((3, size, size), _BORDER)
    square[:, top : top + new_height, left : left + new_width] = image
    factors = torch.tensor([new_width / width, new_height / height]).repeat(2)
    boxes = picture.target.boxes * factors + torch.tensor([left, top]).repeat(2)
    return square, Target(boxes, picture.target.labels)
