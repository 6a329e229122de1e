"""Pictures with boxes around the objects in them, and how they become batches of squares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qdq.errors import ArgumentError

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
class PictureBatches:
    """Pictures as batches of squares; every pass gives the same batches in the same order.

    Iterating gives `(images, targets)`: float32 `[B, 3, size, size]` from 0 to 1, and a `Target` for each image in the
    pixels of the square. The last batch may be smaller.

    Args:
        pictures: The pictures.
        indices: Those of them that are used, in order.
        size: Side of the squares in pixels.
        batch_size: Images in a batch.
        description: Source, number and seed, for the report.

    Raises:
        ArgumentError: A number is below 1, or there are no pictures.
    """

    pictures: Pictures = field(repr=False)
    indices: Sequence[int] = field(repr=False)
    size: int
    batch_size: int
    description: str

    def __post_init__(self) -> None:
        for name, number in (("size", self.size), ("batch_size", self.batch_size)):
            if number < 1:
                raise ArgumentError(f"{name} is {number}; it must be 1 or more.", f"raise {name}.")
        if not self.indices:
            raise ArgumentError("there are no pictures to make batches of.", "use one or more.")

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target]]]:
        for start in range(0, len(self.indices), self.batch_size):
            indices = self.indices[start : start + self.batch_size]
            squares = [letterbox(self.pictures[index], self.size) for index in indices]
            images, targets = zip(*squares, strict=True)
            yield torch.stack(images), list(targets)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def num_images(self) -> int:
        """Number of images in a pass."""
        return len(self.indices)

    def subset(self, n: int) -> PictureBatches:
        """The first `n` images, or all if there are fewer.

        Raises:
            ArgumentError: `n` is below 1.
        """
        if n >= self.num_images:
            return self
        description = f"the first {n} of: {self.description}"
        return replace(self, indices=self.indices[:n], description=description)


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
