"""Object detection: detectors of torchvision and ultralytics, pictures with boxes, and mean average precision.

A detector is quantized and exported without NMS (`torchvision_detectors`, `yolo`). The pictures are generated
(`shapes`) or come from a data set in the format of ultralytics (`yolo_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdq.errors import ArgumentError
from qdq.seeds import seeded_rng
from qdq.workloads.detection.loaded_detector import DetectorInputs, LoadedDetector, make_score
from qdq.workloads.detection.pictures import PictureBatches, Pictures
from qdq.workloads.detection.shapes import SHAPE_NAMES, ShapePictures
from qdq.workloads.detection.torchvision_detectors import load_torchvision_detector
from qdq.workloads.detection.yolo import load_yolo
from qdq.workloads.detection.yolo_data import read_yolo_data

YOLO_PREFIX = "yolo/"
"""What the name of a model starts with if the rest is a file of ultralytics."""

_TRAINING_SHAPES = 2000  # generated pictures to fine-tune on
_CALIBRATION_PICTURES = 128
_EVALUATION_PICTURES = 500


@dataclass(frozen=True)
class DetectionWorkload:
    """A detector with pictures to calibrate, to fine-tune and to evaluate on.

    Args:
        name: The model, as on the command line.
        weights: Source of the weights, in words.
        module: The network that is quantized and exported.
        calibration: Batches of inputs to calibrate on.
        evaluation: Batches of inputs to evaluate on.
        training: Batches of inputs to fine-tune on.
        score: Function of `predict` that gives mAP and mAP50 on the evaluation pictures.
    """

    name: str
    weights: str
    module: nn.Module
    calibration: DetectorInputs
    evaluation: DetectorInputs
    training: Iterable[Tensor]
    score: Callable[[Callable[[Any], Any]], Mapping[str, float]]


def load_detection(
    model: str,
    weights: str = "random",
    data: Path | None = None,
    size: int | None = None,
    calibration: int = _CALIBRATION_PICTURES,
    evaluation: int = _EVALUATION_PICTURES,
    batch_size: int = 16,
    seed: int = 0,
) -> DetectionWorkload:
    """Load a detector and the pictures for it.

    Args:
        model: "yolo/FILE.pt", a file that ultralytics has saved, or the name of a detector of torchvision.
        weights: As for `load_torchvision_detector`; a file of ultralytics has its own.
        data: YAML file of a data set in the format of ultralytics; None for generated pictures of shapes.
        size: Side of the images in pixels; None means that of the model.
        calibration: Number of pictures to calibrate on, of those for training.
        evaluation: Number of pictures to evaluate on, of those for validation.
        batch_size: Pictures in a batch.
        seed: Seed of the choice of pictures and of random weights.

    Raises:
        ArgumentError: A number is too small, or `weights` of a file of ultralytics.
        DataError: The data set cannot be read.
        DependencyError: A package is not installed.
        ModelError: The model or its weights cannot be loaded, or lack a class of the data set.
    """
    for name, number in (("calibration", calibration), ("evaluation", evaluation)):
        if number < 1:
            raise ArgumentError(
                f"{name} is {number}; it must be 1 or more.", f"pass a positive {name}."
            )
    data_set = None if data is None else read_yolo_data(data)
    names = SHAPE_NAMES if data_set is None else data_set.names
    detector = _load_detector(model, weights, names, size, seed)
    train: Pictures = ShapePictures(_TRAINING_SHAPES, detector.size, 2 * seed)
    val: Pictures = ShapePictures(evaluation, detector.size, 2 * seed + 1)
    if data_set is not None:
        train, val = data_set.train, data_set.val

    def take(pictures: Pictures, count: int) -> PictureBatches:
        return _draw_batches(pictures, count, detector.size, batch_size, seed)

    evaluating = take(val, evaluation)
    return DetectionWorkload(
        name=detector.name,
        weights=detector.weights,
        module=detector.module,
        calibration=DetectorInputs(detector, take(train, calibration)),
        evaluation=DetectorInputs(detector, evaluating),
        training=DetectorInputs(detector, take(train, len(train))),
        score=make_score(detector, evaluating, names),
    )


def _load_detector(
    model: str, weights: str, names: tuple[str, ...], size: int | None, seed: int
) -> LoadedDetector:
    """The detector that a name and weights mean."""
    if not model.startswith(YOLO_PREFIX):
        return load_torchvision_detector(model, names, weights, size, seed)
    if weights != "random":
        raise ArgumentError(
            f"weights is {weights!r}, and {model} has its own.", "leave weights out."
        )
    return load_yolo(Path(model.removeprefix(YOLO_PREFIX)), size)


def _draw_batches(
    pictures: Pictures, count: int, size: int, batch_size: int, seed: int
) -> PictureBatches:
    """Some of the pictures in random order, all if there are fewer."""
    with seeded_rng(seed):
        indices = torch.randperm(len(pictures))[:count].tolist()
    description = (
        f"{len(indices)} of {len(pictures)} {pictures.description}, drawn with seed {seed}"
    )
    return PictureBatches(pictures, indices, size, batch_size, description)
