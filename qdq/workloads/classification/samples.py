"""Crops of the photographs that installed packages contain, for use without an image folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qdq.errors import ArgumentError
from qdq.seeds import seeded_rng
from qdq.workloads.classification.batches import (
    CALIBRATION_IMAGES,
    EVALUATION_IMAGES,
    CropBatches,
    ImageBatches,
    Images,
    cache_images,
    require_positive,
)
from qdq.workloads.classification.images import (
    CALIBRATION_PHOTOGRAPHS,
    CROP_AREA,
    LABELLED_PHOTOGRAPHS,
    draw_crop,
    find_photographs,
    read_image,
)
from qdq.workloads.classification.models import LoadedModel, Preprocess

_MOST_CROPS = 10**6  # the positions of all crops are drawn at once
_TRAINING_CROPS = 1024  # in a pass
_IMAGENET_CLASSES = 1000


def load_sample_images(
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Random-resized crops of the photographs that scikit-image, scikit-learn and foolbox contain.

    Those of scikit-image and scikit-learn are for calibration, the 20 labelled ones of foolbox for evaluation. Crops go
    through the photographs in turn, so that any two photographs differ by at most one crop. They depend only on the
    seed: more images or another batch size do not change them.

    Args:
        model: Model that gives crop size and normalization.
        calibration: Number of crops, without labels.
        evaluation: Number of crops, with the ImageNet class that foolbox gives in the file name.
        batch_size: Images per batch.
        seed: Seed of the crops. The global random state does not change.

    Returns:
        The sets to calibrate and to evaluate on; no photograph is in both.

    Raises:
        ArgumentError: A number is below 1 or above a million.
        DependencyError: One of the three packages is not installed.
    """
    require_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    most = max(calibration, evaluation)
    if most > _MOST_CROPS:
        raise ArgumentError(
            f"{most} crops of a few photographs were requested; the limit is {_MOST_CROPS}.",
            f"pass {_MOST_CROPS} or fewer, or pass --data with images of your own.",
        )
    return (
        _load_calibration_crops(model, calibration, batch_size, seed),
        _load_evaluation_crops(model, evaluation, batch_size, seed),
    )


def _load_calibration_crops(
    model: LoadedModel, count: int, batch_size: int, seed: int
) -> ImageBatches:
    files = find_photographs(CALIBRATION_PHOTOGRAPHS)
    sources = " and ".join(source.description for source in CALIBRATION_PHOTOGRAPHS)
    crops = _describe_crops(count, seed)
    return ImageBatches(
        images=_crop_photographs(files, model.preprocess, count, seed),
        labels=None,
        batch_size=batch_size,
        num_images=count,
        description=f"{crops} of {len(files)} photographs in {sources}",
        label_note="none: calibration needs no labels",
        photographs=[index % len(files) for index in range(count)],
    )


def _load_evaluation_crops(
    model: LoadedModel, count: int, batch_size: int, seed: int
) -> ImageBatches:
    files = LABELLED_PHOTOGRAPHS.find_files()
    crops = _describe_crops(count, seed)
    source = LABELLED_PHOTOGRAPHS.description
    if model.num_classes == _IMAGENET_CLASSES:
        labels = [_read_class(files[index % len(files)]) for index in range(count)]
        label_note = "ImageNet classes in foolbox's file names"
    else:
        labels = None
        label_note = f"none: the photographs have ImageNet's labels, {model.name} other classes"
    return ImageBatches(
        images=_crop_photographs(files, model.preprocess, count, seed),
        labels=labels,
        batch_size=batch_size,
        num_images=count,
        description=f"{crops} of {len(files)} labelled ImageNet photographs in {source}",
        label_note=label_note,
        photographs=[index % len(files) for index in range(count)],
    )


def _read_class(file: Path) -> int:
    """The ImageNet class in a name such as `imagenet_00_243.jpg`."""
    return int(file.stem.rpartition("_")[2])


def _describe_crops(count: int, seed: int) -> str:
    smallest, largest = CROP_AREA
    return f"{count} random-resized crops (area {smallest:.0%} to {largest:.0%}, seed {seed})"


def _crop_photographs(files: list[Path], preprocess: Preprocess, count: int, seed: int) -> Images:
    """Random-resized crops of photographs that are taken in turn."""
    photographs = [read_image(file) for file in files]
    with seeded_rng(seed):  # torchvision draws from the global generator only
        boxes = [draw_crop(photographs[index % len(files)]) for index in range(count)]

    def load(index: int) -> Tensor:
        return preprocess.crop(photographs[index % len(files)], boxes[index])

    return cache_images(load, count, preprocess)


def load_training_samples(
    model: LoadedModel, num_images: int | None = None, batch_size: int = 32
) -> CropBatches:
    """Random crops for training, without labels, of the photographs that `load_sample_images` calibrates on.

    Args:
        model: Model that gives crop size and normalization.
        num_images: Crops per pass; None means 1024.
        batch_size: Crops per batch.

    Raises:
        ArgumentError: A number is below 1.
        DependencyError: One of the packages is not installed.
    """
    files = find_photographs(CALIBRATION_PHOTOGRAPHS)
    count = _TRAINING_CROPS if num_images is None else num_images
    description = (
        f"random crops of the {len(files)} photographs that are calibrated on, {count} per pass"
    )
    return CropBatches(files, None, model.preprocess, batch_size, count, description)
