"""Generated pictures of shapes with the class of every pixel: the background, then those of `detection.shapes`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdq.workloads.detection.shapes import SHAPE_NAMES, ShapePictures, draw_classes
from qdq.workloads.segmentation.torchvision_segmenters import normalize

NUM_CLASSES = 1 + len(SHAPE_NAMES)
"""The background and the shapes."""


@dataclass(frozen=True)
class ShapeMasks:
    """Pictures with masks that are drawn when they are needed.

    Args:
        count: Number of pictures.
        size: Their side in pixels.
        seed: Seed of all of them.
    """

    count: int
    size: int
    seed: int = 0

    @property
    def description(self) -> str:
        """What the pictures show."""
        return self._pictures.description

    @property
    def _pictures(self) -> ShapePictures:
        return ShapePictures(self.count, self.size, self.seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        picture = self._pictures[index]
        mask = torch.from_numpy(draw_classes(picture.target, self.size))
        return normalize(picture.image), mask
