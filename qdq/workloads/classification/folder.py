"""Folders of images: one folder for each class, with train and val above them or without."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qdq.errors import DataError
from qdq.text import list_names
from qdq.workloads.classification.batches import (
    CALIBRATION_IMAGES,
    EVALUATION_IMAGES,
    CropBatches,
    ImageBatches,
    cache_images,
    require_positive,
)
from qdq.workloads.classification.images import read_image
from qdq.workloads.classification.models import LoadedModel, Preprocess

# torchvision is imported where it is used; its `datasets` take a moment.

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 3  # in a message


class _ClassImage(NamedTuple):
    """An image file, and the name of its class folder."""

    path: Path
    class_name: str


@dataclass(frozen=True)
class _ImageFolder:
    """The contents of a folder of class folders."""

    path: Path
    class_names: list[str]
    images: list[_ClassImage]


@dataclass(frozen=True)
class _Splits:
    """A folder to calibrate and train on and one to evaluate on, or a single folder for both."""

    train: _ImageFolder
    val: _ImageFolder

    @property
    def is_single(self) -> bool:
        return self.train is self.val

    @property
    def class_names(self) -> list[str]:
        return sorted({*self.train.class_names, *self.val.class_names})


@dataclass(frozen=True)
class _ClassMatch:
    """The model's class of each class folder.

    Args:
        index_of: Class index by name of the class folder; None if the folders do not match the model's classes.
        note: How the classes were found, or why they were not.
    """

    index_of: dict[str, int] | None
    note: str

    def label(self, images: Iterable[_ClassImage]) -> list[int] | None:
        """Class index of each image; None if the classes are not known."""
        if self.index_of is None:
            return None
        return [self.index_of[image.class_name] for image in images]


def load_image_folder(
    data_dir: str | Path,
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Images of a folder with one folder per class, through the model's own evaluation transform.

    With `data_dir`/train and `data_dir`/val, calibration images come from train and evaluation images from val.
    Otherwise both come from `data_dir`, and no image is in both. The seed decides which images are taken. If there are
    fewer than requested, all are used; a single folder is then divided in the requested proportion.

    Args:
        data_dir: The folder.
        model: Model that gives the transform, and the classes that the names of the folders are matched with.
        calibration: Number of images to calibrate on.
        evaluation: Number of images to evaluate on.
        batch_size: Images per batch.
        seed: Seed of the choice of images.

    Returns:
        The sets to calibrate and to evaluate on. A file that is not an image raises a DataError here or, in a
        set larger than CACHE_BYTES, when its batch is reached.

    Raises:
        ArgumentError: A number is below 1.
        DataError: A folder is missing, unreadable or empty, or a file is not an image.
    """
    require_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    splits = _open_folder(Path(data_dir))
    classes = _match_classes(splits.class_names, model)
    if classes.index_of is None:
        logger.warning("labels: %s", classes.note)
    calibration_images, evaluation_images = _draw_images(splits, calibration, evaluation, seed)

    batches = []
    for folder, images, requested in (
        (splits.train, calibration_images, calibration),
        (splits.val, evaluation_images, evaluation),
    ):
        used = images[:requested]
        description = (
            f"{len(used)} of {len(folder.images)} images in {folder.path}, drawn with seed {seed}"
        )
        if len(used) < requested:
            description += f" ({requested} were requested)"
            logger.warning("%s", description)
        batches.append(_make_batches(used, classes, model.preprocess, batch_size, description))
    return batches[0], batches[1]


def _make_batches(
    images: list[_ClassImage],
    classes: _ClassMatch,
    preprocess: Preprocess,
    batch_size: int,
    description: str,
) -> ImageBatches:
    def load(index: int) -> Tensor:
        return preprocess(read_image(images[index].path))

    return ImageBatches(
        images=cache_images(load, len(images), preprocess),
        labels=classes.label(images),
        batch_size=batch_size,
        num_images=len(images),
        description=description,
        label_note=classes.note,
    )


def load_training_folder(
    data_dir: str | Path,
    model: LoadedModel,
    num_images: int | None = None,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> CropBatches:
    """Random crops to train on: all images of train, or all of a single folder except those to evaluate on.

    Args:
        data_dir: The folder.
        model: Model that gives crop size, normalization and classes.
        num_images: Crops per pass; None means one of each image.
        calibration: As for `load_image_folder`.
        evaluation: As for `load_image_folder`.
        batch_size: Crops per batch.
        seed: As for `load_image_folder`.

    Raises:
        ArgumentError: A number is below 1.
        DataError: A folder is missing, unreadable or empty.
    """
    splits = _open_folder(Path(data_dir))
    classes = _match_classes(splits.class_names, model)
    images, evaluation_images = _draw_images(splits, calibration, evaluation, seed)
    if splits.is_single:
        images = images + evaluation_images[evaluation:]
    count = len(images) if num_images is None else num_images
    return CropBatches(
        files=[image.path for image in images],
        labels=classes.label(images),
        preprocess=model.preprocess,
        batch_size=batch_size,
        num_images=count,
        description=f"random crops of {len(images)} images in {splits.train.path}, {count} per pass",
    )


def is_image_of(data_dir: Path | None, path: Path | None) -> bool:
    """Whether a file exists and `load_image_folder` would take it as one of its images."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if data_dir is None or path is None or not path.is_file():
        return False
    is_inside = path.resolve().is_relative_to(data_dir.resolve())
    return is_inside and path.suffix.lower() in IMG_EXTENSIONS


def _open_folder(root: Path) -> _Splits:
    """The folder or folders of images at `root`.

    Raises:
        DataError: There is no folder, it cannot be read, or it lacks class folders or images.
    """
    if not root.is_dir():
        problem = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"{root} {problem}; expected a folder of class folders.", "check --data.")
    try:
        return _find_splits(root)
    except OSError as error:
        raise DataError(
            f"cannot read {root}: {error}.", "check the permissions of the folder."
        ) from error


def _find_splits(root: Path) -> _Splits:
    """`root`/train and `root`/val, or else `root` itself.

    Raises:
        DataError: Only one of train and val has class folders, or there are no images.
    """
    train, val = root / "train", root / "val"
    has_train, has_val = bool(_list_subfolders(train)), bool(_list_subfolders(val))
    if has_train and has_val:
        return _Splits(_scan(train), _scan(val))
    if has_train or has_val:
        present, absent = (train, val) if has_train else (val, train)
        raise DataError(
            f"{present} has class folders and {absent} has none; expected both or neither.",
            f"add {absent}, or pass --data {present} to use its images for both purposes.",
        )
    folder = _scan(root)
    return _Splits(folder, folder)


def _list_subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _scan(folder: Path) -> _ImageFolder:
    """Images and classes of a folder, as torchvision's ImageFolder finds them.

    Raises:
        DataError: There are no class folders, or no images in them.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not _list_subfolders(folder):
        raise _no_class_folders(folder, IMG_EXTENSIONS)
    dataset = ImageFolder(folder, allow_empty=True)
    images: list[_ClassImage] = []
    skipped: list[str] = []
    for file, index in dataset.samples:
        if os.path.isfile(file):
            images.append(_ClassImage(Path(file), dataset.classes[index]))
        else:
            skipped.append(file)

    if skipped:
        logger.warning("not regular files, and skipped: %s", list_names(skipped, _SHOWN_NAMES))
    if not images:
        names = list_names(dataset.classes, _SHOWN_NAMES)
        raise DataError(
            f"the {len(dataset.classes)} class folders of {folder} ({names}) contain no images; "
            f"expected files named {', '.join(IMG_EXTENSIONS)}.",
            "add images, or check --data.",
        )
    empty = sorted(set(dataset.classes) - {image.class_name for image in images})
    if empty:
        names = list_names(empty, _SHOWN_NAMES)
        logger.warning("class folders without an image in %s: %s", folder, names)
    return _ImageFolder(folder, dataset.classes, images)


def _no_class_folders(folder: Path, suffixes: tuple[str, ...]) -> DataError:
    num_images = sum(path.suffix.lower() in suffixes for path in folder.iterdir())
    content = "neither class folders nor images"
    if num_images:
        content = f"{num_images} images but no class folders"
    return DataError(
        f"{folder} contains {content}; expected one folder per class, "
        f"with images ({', '.join(suffixes)}) in it.",
        f"move the images to {folder / 'CLASS'}/, or check --data.",
    )


def _draw_images(
    splits: _Splits, calibration: int, evaluation: int, seed: int
) -> tuple[list[_ClassImage], list[_ClassImage]]:
    """Images to calibrate and to evaluate on in random order, often more than needed; no image is in both.

    Raises:
        DataError: A single folder contains only one image.
    """
    generator = torch.Generator().manual_seed(seed)
    train = _shuffle(splits.train.images, generator)
    if not splits.is_single:
        return train, _shuffle(splits.val.images, generator)

    if len(train) < 2:
        raise DataError(
            f"{splits.train.path} contains 1 image; expected 2 or more: one for calibration and one for evaluation.",
            "add images.",
        )
    if len(train) < calibration + evaluation:
        proportional = round(len(train) * calibration / (calibration + evaluation))
        calibration = min(max(proportional, 1), len(train) - 1)
    return train[:calibration], train[calibration:]


def _shuffle(images: list[_ClassImage], generator: torch.Generator) -> list[_ClassImage]:
    order = torch.randperm(len(images), generator=generator)
    return [images[index] for index in order.tolist()]


def _match_classes(folders: list[str], model: LoadedModel) -> _ClassMatch:
    """Match the names of class folders with the classes of the model."""
    if all(name.isdecimal() and int(name) < model.num_classes for name in folders):
        index_of = {name: int(name) for name in folders}
        return _ClassMatch(index_of, "class folders are named by class index")

    category_index = {name: index for index, name in enumerate(model.categories or [])}
    index_of = {}
    unknown = []
    for name in folders:
        category = name.replace("_", " ")
        if category in category_index:
            index_of[name] = category_index[category]
        else:
            unknown.append(name)
    if not unknown:
        return _ClassMatch(index_of, "class folders are named by category")

    if len(folders) == model.num_classes:
        index_of = {name: index for index, name in enumerate(folders)}
        return _ClassMatch(index_of, "class folders in sorted order are the classes")
    names = list_names(unknown, _SHOWN_NAMES)
    note = (
        f"none, so top-1 cannot be measured: {model.name} has {model.num_classes} classes, the data "
        f"{len(folders)} class folders, of which these are neither index nor category: {names}"
    )
    return _ClassMatch(None, note)
