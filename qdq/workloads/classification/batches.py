"""Batches of images: fixed sets to calibrate and to evaluate on, and random crops to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qdq.errors import ArgumentError
from qdq.workloads.classification.images import draw_crop, read_cached_image
from qdq.workloads.classification.models import Preprocess

CALIBRATION_IMAGES = 128
"""Default number of calibration images."""

EVALUATION_IMAGES = 500
"""Default number of evaluation images."""

CACHE_BYTES = 2**30
"""Sets of float32 images up to this size are preprocessed once and kept; larger ones are preprocessed in every pass."""


class Images(Protocol):
    """A set from which batches are cut: a slice of it is float32 `[n, 3, H, W]`."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """A set of images as batches; every pass gives the same batches in the same order.

    Iterating gives `(images, labels)`: float32 `[B, 3, H, W]` and int64 `[B]`, or None if labels are not known. The
    last batch may be smaller. `len` is the number of batches, as of a DataLoader.

    Args:
        images: A float32 tensor `[N, 3, H, W]`, or anything whose slices are such tensors.
        labels: Class index of each image, or None.
        batch_size: Images per batch.
        num_images: N.
        description: Source, number and seed, for the report.
        label_note: How the labels were found, or why there are none.
        photographs: If the images are crops: the number of the photograph of each. None: each image is its own.

    Raises:
        ArgumentError: `batch_size` is below 1.
    """

    images: Images = field(repr=False)
    labels: list[int] | None = field(repr=False)
    batch_size: int
    num_images: int
    description: str
    label_note: str
    photographs: Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, self.num_images, self.batch_size):
            part = slice(start, min(start + self.batch_size, self.num_images))
            # A clone, so that a model that works in place cannot change the images of the next pass.
            images = self.images[part].clone()
            labels = None if self.labels is None else torch.tensor(self.labels[part])
            yield images, labels

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self.num_images

    @property
    def num_sources(self) -> int:
        """Number of different photographs if the images are crops, else of images."""
        return self.num_images if self.photographs is None else len(set(self.photographs))

    def subset(self, n: int) -> ImageBatches:
        """The first `n` images, or all if there are fewer; shares memory with this set.

        Raises:
            ArgumentError: `n` is below 1.
        """
        require_positive(n=n)
        if n >= self.num_images:
            return self
        labels = None if self.labels is None else self.labels[:n]
        description = f"the first {n} of: {self.description}"
        photographs = None if self.photographs is None else self.photographs[:n]
        return replace(
            self, labels=labels, photographs=photographs, num_images=n, description=description
        )

    def hold_out(self, n: int) -> tuple[ImageBatches, ImageBatches]:
        """Images to fit on, and others to judge on.

        Args:
            n: At least 1, and fewer than there are.

        Returns:
            All images but the first `n`, and these. Of crops, those of a quarter of the photographs, or of one, are
            held out: other crops of a photograph would judge too well.
        """
        photographs = self.photographs
        numbers = sorted(set(photographs or ()))
        if photographs is None or len(numbers) == 1:
            indices = range(n, self.num_images)
            return self._select(indices, f"all but the first {n}, of"), self.subset(n)
        num_held = max(len(numbers) // 4, 1)
        held_numbers = numbers[:num_held]
        held = [index for index, number in enumerate(photographs) if number in held_numbers]
        rest = [index for index, number in enumerate(photographs) if number not in held_numbers]
        first = f"the first {num_held} photographs"
        return (
            self._select(rest, f"{len(rest)} images, without {first}, of"),
            self._select(held, f"{len(held)} images, of {first} only, of"),
        )

    def by_source(self) -> ImageBatches:
        """The same images; crops of one photograph follow each other."""
        photographs = self.photographs
        if photographs is None:
            return self
        order = sorted(range(self.num_images), key=lambda index: photographs[index])
        return self._select(order, "by photograph, of")

    def _select(self, indices: Sequence[int], words: str) -> ImageBatches:
        """Some of the images.

        Args:
            indices: Their numbers.
            words: Which ones, in front of the description of all.
        """
        labels = None if self.labels is None else [self.labels[index] for index in indices]
        photographs = None
        if self.photographs is not None:
            photographs = [self.photographs[index] for index in indices]
        return replace(
            self,
            images=_SelectedImages(self.images, indices),
            labels=labels,
            num_images=len(indices),
            description=f"{words}: {self.description}",
            photographs=photographs,
        )


def cache_images(load: Callable[[int], Tensor], count: int, preprocess: Preprocess) -> Images:
    """Preprocess images now if they fit in CACHE_BYTES, otherwise again in every pass.

    Args:
        load: Gives the preprocessed image of an index, float32 `[3, crop_size, crop_size]`.
        count: Number of images.
        preprocess: Preprocessing that `load` applies.
    """
    images = _LazyImages(load, count, preprocess.crop_size)
    num_bytes = count * 3 * preprocess.crop_size**2 * torch.float32.itemsize
    return images[:] if num_bytes <= CACHE_BYTES else images


class _LazyImages:
    """Images that several threads preprocess when they are needed (Pillow frees the GIL)."""

    def __init__(self, load: Callable[[int], Tensor], count: int, size: int) -> None:
        self._load = load
        self._count = count
        self._size = size

    def __getitem__(self, part: slice, /) -> Tensor:
        indices = range(*part.indices(self._count))
        stacked = torch.empty(len(indices), 3, self._size, self._size)
        with ThreadPoolExecutor() as pool:
            for position, image in enumerate(pool.map(self._load, indices)):
                stacked[position] = image
        return stacked


class _SelectedImages:
    """Some images of a set, by their numbers."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self._images = images
        self._indices = indices

    def __getitem__(self, part: slice, /) -> Tensor:
        return torch.cat([self._images[index : index + 1] for index in self._indices[part]])


@dataclass(frozen=True, eq=False)
class CropBatches:
    """Random-resized crops of images, half of them mirrored, as batches to train on; every pass draws new ones.

    Without labels, half of the crops are blended with another crop of the batch (mixup; Zhang, Cisse, Dauphin,
    Lopez-Paz, ICLR 2018, arXiv 1710.09412): training on a teacher's outputs needs no labels for it, and it gets more
    out of a few photographs. Iterating gives `(images, labels)` as `ImageBatches` does. Order and crops are drawn from
    torch's global generator.

    Args:
        files: The images.
        labels: Class index of each image, or None.
        preprocess: Preprocessing with crop size and normalization.
        batch_size: Crops per batch.
        num_images: Crops per pass; they go through the images in turn.
        description: Source and number, for the report.

    Raises:
        ArgumentError: A number is below 1.
    """

    files: list[Path] = field(repr=False)
    labels: list[int] | None = field(repr=False)
    preprocess: Preprocess
    batch_size: int
    num_images: int
    description: str

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size, num_images=self.num_images)

    @property
    def num_samples(self) -> int:
        """Number of images that crops are drawn of."""
        return len(self.files)

    def without_first(self, n: int) -> CropBatches:
        """Crops of all images but the first `n`: one of each, or as many as before if a pass has several of each.

        Args:
            n: At least 0.

        Raises:
            ArgumentError: There are no more.
        """
        files = self.files[n:]
        num_images = len(files)
        has_several = self.num_images > self.num_samples
        if files and has_several:
            num_images = self.num_images
        labels = None if self.labels is None else self.labels[n:]
        description = (
            f"random crops of {len(files)} images, without the first {n} of: {self.description}"
        )
        return replace(
            self, files=files, labels=labels, num_images=num_images, description=description
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        order = torch.randperm(self.num_images) % len(self.files)
        for batch in torch.split(order, self.batch_size):
            indices = batch.tolist()
            labels = None
            if self.labels is not None:
                labels = torch.tensor([self.labels[index] for index in indices])
            yield self._crop([self.files[index] for index in indices]), labels

    def _crop(self, files: list[Path]) -> Tensor:
        with ThreadPoolExecutor() as pool:  # decoding frees the GIL
            photographs = list(pool.map(read_cached_image, files))
            boxes = [draw_crop(photograph) for photograph in photographs]  # here, in a fixed order
            crops = torch.stack(list(pool.map(self.preprocess.crop, photographs, boxes)))
        is_mirrored = torch.rand(len(crops), 1, 1, 1) < 0.5
        crops = torch.where(is_mirrored, crops.flip(-1), crops)
        if self.labels is None:
            crops = _blend(crops)
        return crops.contiguous(memory_format=torch.channels_last)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)


def _blend(crops: Tensor) -> Tensor:
    """Blend half of the crops with another crop of the batch, in random proportions."""
    shape = (len(crops), 1, 1, 1)
    is_blended = torch.rand(shape) < 0.5
    fraction = torch.where(is_blended, torch.rand(shape), 1.0)
    partners = crops[torch.randperm(len(crops))]
    return torch.lerp(partners, crops, fraction)


def require_positive(**numbers: int) -> None:
    """Refuse a number below 1.

    Args:
        numbers: Name of each number in the message, and the number.

    Raises:
        ArgumentError: One of them is below 1.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ArgumentError(
                f"{name} is {number}; it must be 1 or more.", f"pass a positive {name}."
            )
