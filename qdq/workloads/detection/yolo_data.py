"""Data sets in the format of ultralytics: a YAML file that names the folders of images and the classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from qdq.errors import DataError
from qdq.text import list_names, printable
from qdq.workloads.detection.label_files import find_label_file, read_label_file
from qdq.workloads.detection.pictures import Picture, Target

logger = logging.getLogger(__name__)

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_KEYS = "path, train, val and names"


@dataclass(frozen=True)
class YoloPictures:
    """Images of a data set with their label files, which are read when a picture is needed.

    Args:
        files: The images.
        names: The classes, in the order of their indices.
        description: Where they come from, for the report.
    """

    files: tuple[Path, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    description: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Picture:
        """The picture of an index.

        Raises:
            DataError: The image or its label file cannot be read.
        """
        from PIL import ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        from qdq.workloads.classification.images import read_image

        file = self.files[index]
        # Boxes are drawn on images as a viewer shows them, so the orientation in the EXIF data counts.
        image = pil_to_tensor(ImageOps.exif_transpose(read_image(file)))
        boxes, labels = read_label_file(find_label_file(file), self.names)
        height, width = image.shape[-2:]
        pixels = torch.tensor(boxes).reshape(-1, 4) * torch.tensor([width, height]).repeat(2)
        return Picture(image, Target(pixels, torch.tensor(labels, dtype=torch.int64)))


@dataclass(frozen=True)
class YoloData:
    """A data set.

    Args:
        path: The YAML file.
        train: Pictures to train and to calibrate on.
        val: Pictures to evaluate on.
        names: The classes, in the order of their indices.
    """

    path: Path
    train: YoloPictures
    val: YoloPictures
    names: tuple[str, ...]


def read_yolo_data(path: Path) -> YoloData:
    """Read the YAML file of a data set and list its images.

    Relative paths in it start at `path`, which itself starts at the folder of the file. The labels of
    `images/val/a.jpg` are in `labels/val/a.txt`. An image without a label file shows no objects; how many there are is
    logged.

    Args:
        path: The file. It has the keys `train` and `val`: a folder, a text file with an image on each line, or a list
            of such; `names`: a list, or index -> name; and `path`, the folder above.

    Raises:
        DataError: It cannot be read, lacks a key, or names no images.
    """
    content = _read_yaml(path)
    names = _read_names(path, content["names"])
    root = _find_root(path, content.get("path"))
    parts = []
    for part in ("train", "val"):
        files = _list_images(path, root, part, content[part])
        _report_missing_labels(part, files)
        parts.append(YoloPictures(files, names, f"images of {part} in {path}"))
    return YoloData(path, parts[0], parts[1], names)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The content of the file, with all keys that are needed."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.", f"pass a YAML file with {_KEYS}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as YAML: {printable(error)}.", f"write {_KEYS} in it."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}; expected keys and values.",
            f"write {_KEYS} in it.",
        )
    missing = [key for key in ("train", "val", "names") if not content.get(key)]
    if missing:
        raise DataError(f"{path} lacks {list_names(missing, 3)}.", f"write {_KEYS} in it.")
    return content


def _read_names(path: Path, names: Any) -> tuple[str, ...]:
    """The classes in the order of their indices."""
    by_index = dict(enumerate(names)) if isinstance(names, list) else names
    is_mapping = isinstance(by_index, dict)
    if not is_mapping or set(by_index) != set(range(len(by_index))):
        raise DataError(
            f"names in {path} is {printable(names)}; expected a list, or the indices 0, 1, 2 ... and their names.",
            "name every class, from index 0 on.",
        )
    return tuple(str(by_index[index]) for index in range(len(by_index)))


def _find_root(path: Path, root: Any) -> Path:
    """The folder at which relative paths start."""
    if root is None:
        return path.parent
    folder = path.parent / _as_text(path, "path", root)
    if not folder.is_dir():
        raise DataError(
            f"path in {path} is {printable(root)}, and there is no folder {folder}.",
            f"write the folder of the images, relative to {path.parent}.",
        )
    return folder


def _as_text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{key} in {path} is {printable(value)}; expected a path.",
            "write the name of a folder or of a text file.",
        )
    return value


def _list_images(path: Path, root: Path, key: str, places: Any) -> tuple[Path, ...]:
    """The images of a key, in order.

    Raises:
        DataError: There are none, or one does not exist.
    """
    images: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        images += _list_place(path, key, root / _as_text(path, key, place))
    if not images:
        raise DataError(
            f"{key} in {path} has no images: {printable(places)} contains no file that ends in "
            f"{list_names(_SUFFIXES, len(_SUFFIXES))}.",
            "put images there, or correct the path.",
        )
    return tuple(images)


def _list_place(path: Path, key: str, place: Path) -> list[Path]:
    """The images of a folder and all folders in it, or of a text file."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if _is_image(file))
    if not place.is_file():
        raise DataError(
            f"{key} in {path} is {place}, which does not exist.",
            "correct the path, or write the images there.",
        )
    lines = place.read_text(encoding="utf-8").splitlines()
    images = [place.parent / line.strip() for line in lines if line.strip()]
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(images)} images in {place} do not exist: {list_names(missing, 2)}.",
            f"write paths relative to {place.parent}.",
        )
    return images


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and file.is_file()


def _report_missing_labels(part: str, images: Sequence[Path]) -> None:
    """Log how many images have no label file, or refuse a set in which none has one."""
    missing = [str(image) for image in images if not find_label_file(image).is_file()]
    if not missing:
        return
    if len(missing) == len(images):
        raise DataError(
            f"none of the {len(images)} images of {part} has labels; there is no {find_label_file(images[0])}.",
            "write a text file for each image, in a folder labels beside images.",
        )
    logger.warning(
        "%d of the %d images of %s have no label file, and count as images without objects: %s",
        len(missing),
        len(images),
        part,
        list_names(missing, 2),
    )
