"""Image classification: images to calibrate, to evaluate and to train on.

They are crops of packaged photographs (`samples`) or images of a folder (`folder`), as batches (`batches`). Trained
classifiers are in `models`.
"""

from __future__ import annotations

from pathlib import Path

from qdq.workloads.classification.batches import (
    CALIBRATION_IMAGES,
    EVALUATION_IMAGES,
    CropBatches,
    ImageBatches,
    require_positive,
)
from qdq.workloads.classification.folder import load_image_folder, load_training_folder
from qdq.workloads.classification.models import LoadedModel
from qdq.workloads.classification.samples import load_sample_images, load_training_samples


def load_images(
    data_dir: str | Path | None,
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Load images to calibrate and to evaluate on.

    It calls `load_image_folder`, or `load_sample_images` without a folder.

    Args:
        data_dir: The folder, or None for the packaged photographs.
        model: Model that gives the transform and the classes.
        calibration: Number of images to calibrate on.
        evaluation: Number of images to evaluate on.
        batch_size: Images per batch.
        seed: Seed of the choice and of the crops.

    Returns:
        The sets to calibrate and to evaluate on.

    Raises:
        ArgumentError: As for these two functions.
        DataError: As for these two functions.
        DependencyError: As for these two functions.
    """
    if data_dir is None:
        return load_sample_images(model, calibration, evaluation, batch_size, seed)
    return load_image_folder(data_dir, model, calibration, evaluation, batch_size, seed)


def load_training_images(
    data_dir: str | Path | None,
    model: LoadedModel,
    num_images: int | None = None,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> CropBatches:
    """Load images to train on.

    None of them is among the images that `load_images` returns for evaluation with the same arguments. Without a folder
    these are the photographs that `load_images` calibrates on, without labels. With `data_dir`/train and `data_dir`/val
    they are all images of train. With a single folder they are all images except those to evaluate on.

    Args:
        data_dir: The folder, or None for the packaged photographs.
        model: Model that gives crop size, normalization and classes.
        num_images: Crops per pass. None means one of each image, or 1024 of the packaged photographs.
        calibration: As for `load_images`.
        evaluation: As for `load_images`.
        batch_size: Crops per batch.
        seed: As for `load_images`.

    Raises:
        ArgumentError: As for `load_images`.
        DataError: As for `load_images`.
        DependencyError: As for `load_images`.
    """
    require_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    if data_dir is None:
        return load_training_samples(model, num_images, batch_size)
    return load_training_folder(
        data_dir, model, num_images, calibration, evaluation, batch_size, seed
    )
