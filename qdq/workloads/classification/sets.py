"""All images of a folder, or crops of the packaged photographs, as sets to train, validate, calibrate and test on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qdq.errors import ArgumentError, DataError
from qdq.workloads.classification import load_images, load_training_images
from qdq.workloads.classification.batches import CropBatches, ImageBatches, cache_images
from qdq.workloads.classification.images import read_image
from qdq.workloads.classification.models import LoadedModel

CALIBRATION_CROPS = 256
"""Crops of the packaged photographs to calibrate on."""

TEST_CROPS = 500
"""Crops of the packaged photographs to test on."""


@dataclass(frozen=True)
class EvaluationSets:
    """The images of a model that is not trained.

    Args:
        calibration: Training images, not more than there are test images.
        test: Images to evaluate on.
    """

    calibration: ImageBatches
    test: ImageBatches


@dataclass(frozen=True)
class TrainingSets:
    """The images of a training.

    Args:
        training: Random crops.
        validation: Images to measure on after each epoch; None: there are none.
    """

    training: CropBatches
    validation: ImageBatches | None


def load_evaluation_sets(
    data_dir: Path | None, model: LoadedModel, batch_size: int = 32, seed: int = 0
) -> EvaluationSets:
    """Load the images to calibrate and to test on.

    With `data_dir`/train and `data_dir`/val all images of val are the test set, and as many of train are for
    calibration. Of a single folder, half of the images are for calibration.

    Args:
        data_dir: The folder, or None for the packaged photographs.
        model: Model that gives the transform and the classes.
        batch_size: Images per batch.
        seed: Seed of the choice and of the crops.

    Raises:
        ArgumentError: As for `load_images`.
        DataError: As for `load_images`.
        DependencyError: As for `load_images`.
    """
    numbers = _count_images(data_dir)
    return EvaluationSets(*load_images(data_dir, model, *numbers, batch_size, seed))


def load_training_sets(
    data_dir: Path | None,
    model: LoadedModel,
    validation_split: float,
    batch_size: int = 32,
    seed: int = 0,
) -> TrainingSets:
    """Load the images to train and to validate on; none of them is in the test set of `load_evaluation_sets`.

    Args:
        data_dir: The folder.
        model: As for `load_evaluation_sets`.
        validation_split: Fraction of the training images for validation, at least 0 and below 1.
        batch_size: As for `load_evaluation_sets`.
        seed: Likewise.

    Raises:
        ArgumentError: As for `load_training_images`.
        DataError: Likewise; or there are no labels to train on.
    """
    if data_dir is None:
        raise DataError(
            "the packaged photographs to train on have no labels.",
            "give a folder of images with one folder per class.",
        )
    numbers = _count_images(data_dir)
    crops = load_training_images(data_dir, model, None, *numbers, batch_size, seed)
    if crops.labels is None:
        raise DataError(
            f"the class folders of {data_dir} are not classes of {model.name}: there are no labels to train on.",
            "name the folders by class index or category, or load weights with as many classes as folders.",
        )
    num_validation = round(len(crops.files) * validation_split)
    num_training = len(crops.files) - num_validation
    if num_training < 1:
        raise DataError(f"{data_dir} has too few images to train on.", "add images.")
    validation = None
    if num_validation:
        validation = _make_validation(crops, num_training)
    return TrainingSets(_take_crops(crops, num_training), validation)


def _count_images(data_dir: Path | None) -> tuple[int, int]:
    """How many images there are to calibrate and to test on."""
    if data_dir is None:
        return CALIBRATION_CROPS, TEST_CROPS
    train, val = data_dir / "train", data_dir / "val"
    if train.is_dir() and val.is_dir():
        num_test = _count_files(val)
        return max(min(_count_files(train), num_test), 1), max(num_test, 1)
    num_images = _count_files(data_dir)
    return max(num_images // 2, 1), max(num_images - num_images // 2, 1)


def _count_files(folder: Path) -> int:
    """The number of images in the class folders of a folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sum(path.suffix.lower() in IMG_EXTENSIONS for path in folder.glob("*/**/*"))


def _make_validation(crops: CropBatches, first: int) -> ImageBatches:
    """The images from an index on, through the evaluation transform."""
    files = crops.files[first:]
    assert crops.labels is not None  # noqa: S101  # the caller has asked

    def load(index: int) -> Tensor:
        return crops.preprocess(read_image(files[index]))

    return ImageBatches(
        images=cache_images(load, len(files), crops.preprocess),
        labels=crops.labels[first:],
        batch_size=crops.batch_size,
        num_images=len(files),
        description=f"{len(files)} of the training images",
        label_note="as of the training images",
    )


def _take_crops(crops: CropBatches, count: int) -> CropBatches:
    """Crops of the first images."""
    labels = None if crops.labels is None else crops.labels[:count]
    return replace(
        crops,
        files=crops.files[:count],
        labels=labels,
        num_images=count,
        description=f"random crops of {count} images",
    )


def take_images(images: ImageBatches, fraction: float) -> ImageBatches:
    """The first images of a set, which is in random order; at least one.

    Args:
        images: The set.
        fraction: Above 0 and at most 1.

    Raises:
        ArgumentError: Another fraction.
    """
    return images.subset(_count_part(images.num_images, fraction))


def take_crops(crops: CropBatches, fraction: float) -> CropBatches:
    """Random crops of the first images of a set, at least one.

    Args:
        crops: The set.
        fraction: Above 0 and at most 1.

    Raises:
        ArgumentError: Another fraction.
    """
    return _take_crops(crops, _count_part(len(crops.files), fraction))


def _count_part(count: int, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ArgumentError(
            f"the fraction of the images is {fraction}; it must be above 0 and at most 1.",
            "give a fraction such as 0.05.",
        )
    return max(1, round(count * fraction))
