"""A folder of images with masks: `images/NAME.jpg` and `masks/NAME.png`, in one folder or in train and val."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qdq.errors import DataError
from qdq.text import list_names
from qdq.workloads.classification.images import read_image
from qdq.workloads.segmentation.masked_images import IGNORED
from qdq.workloads.segmentation.torchvision_segmenters import normalize

logger = logging.getLogger(__name__)

_IMAGES = "images"
_MASKS = "masks"
_MASK_SUFFIX = ".png"
_MASK_MODES = ("L", "P", "I;16", "I")  # one number a pixel
_SHOWN_FILES = 3


@dataclass(frozen=True)
class MaskFolder:
    """Images of a folder with their masks, which are read when they are needed.

    Args:
        files: The images; the mask of `images/a.jpg` is `masks/a.png`.
        size: Side of the squares that they are resized into, in pixels.
        description: Where they come from, for the report.
    """

    files: tuple[Path, ...] = field(repr=False)
    size: int
    description: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        """The image and the mask of an index, in a square; what is outside of the image is ignored.

        Raises:
            DataError: One of them cannot be read, or they differ in size.
        """
        from torchvision.transforms.functional import pil_to_tensor

        image = pil_to_tensor(read_image(self.files[index]))
        mask = _read_mask(find_mask(self.files[index]))
        if mask.shape != image.shape[-2:]:
            raise DataError(
                f"{find_mask(self.files[index])} is {list(mask.shape)}, and its image {list(image.shape[-2:])}.",
                "give them the same height and width.",
            )
        return _fit(normalize(image), mask, self.size)


def find_mask(image: Path) -> Path:
    """The file of the mask of an image.

    Args:
        image: `FOLDER/images/NAME.jpg`.
    """
    return image.parents[1] / _MASKS / f"{image.stem}{_MASK_SUFFIX}"


def _read_mask(path: Path) -> Tensor:
    """The class of every pixel, int64 `[H, W]`.

    Raises:
        DataError: It is no image with one number a pixel.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in _MASK_MODES:
                raise DataError(
                    f"{path} has the mode {image.mode}; expected one number a pixel.",
                    "save the index of the class of each pixel as a PNG in grey.",
                )
            return torch.from_numpy(np.array(image).astype(np.int64))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.", "save it as a PNG again.") from error


def _fit(image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Resize so that the longer side fits, and fill the rest: with the mean colour, and with ignored pixels."""
    height, width = mask.shape
    scale = size / max(height, width)
    new_size = (max(round(height * scale), 1), max(round(width * scale), 1))
    resized = F.interpolate(image[None], new_size, mode="bilinear", antialias=True)[0]
    classes = F.interpolate(mask[None, None].double(), new_size, mode="nearest-exact")[0, 0].long()
    square = torch.zeros(3, size, size)
    square[:, : new_size[0], : new_size[1]] = resized
    square_mask = torch.full((size, size), IGNORED)
    square_mask[: new_size[0], : new_size[1]] = classes
    return square, square_mask


def read_mask_folder(folder: Path, size: int, seed: int = 0) -> tuple[MaskFolder, MaskFolder]:
    """List the images of a folder.

    Args:
        folder: With `train` and `val`, or a single set; each has `images` and `masks`. A mask is a PNG with the index
            of the class of each pixel; 255 does not count.
        size: Side of the squares, in pixels.
        seed: Seed with which a single set is divided in halves.

    Returns:
        Images to calibrate and to train on, and images to evaluate on.

    Raises:
        DataError: The folder is missing or has no images, or images have no mask.
    """
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        parts = []
        for name in ("train", "val"):
            files = _list_files(folder / name)
            parts.append(MaskFolder(files, size, f"images of {folder / name}"))
        return parts[0], parts[1]
    whole = MaskFolder(_list_files(folder), size, f"images of {folder}")
    if len(whole) < 2:
        raise DataError(
            f"{folder} has 1 image; expected at least 2, to calibrate and to evaluate on.",
            "add images.",
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(whole), generator=generator).tolist()
    half = len(order) // 2
    first = tuple(whole.files[index] for index in order[:half])
    second = tuple(whole.files[index] for index in order[half:])
    return replace(whole, files=first), replace(whole, files=second)


def _list_files(folder: Path) -> tuple[Path, ...]:
    """The images of a set, each of which has a mask.

    Raises:
        DataError: There are none, or some have no mask.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    images = folder / _IMAGES
    if not images.is_dir():
        raise DataError(
            f"{folder} has no folder {_IMAGES}; expected {_IMAGES} and {_MASKS}.",
            "put the images into one, and the masks with the same names into the other.",
        )
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(f"there is no image in {images}.", "add images.")
    unmasked = [path.name for path in files if not find_mask(path).is_file()]
    if unmasked:
        raise DataError(
            f"{len(unmasked)} of {len(files)} images in {images} have no mask: "
            f"{list_names(unmasked, _SHOWN_FILES)}.",
            f"add {find_mask(images / unmasked[0])}, or remove the image.",
        )
    return tuple(files)
