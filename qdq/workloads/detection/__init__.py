"""Object detection: detectors of torchvision and ultralytics, pictures with boxes, and mean average precision.

A detector is quantized and exported without NMS (`torchvision_detectors`, `yolo`). The pictures are generated
(`shapes`) or come from a data set in the format of ultralytics (`yolo_data`).
"""

from __future__ import annotations

from pathlib import Path

from qdq.errors import ArgumentError
from qdq.text import list_names
from qdq.workloads.detection.loaded_detector import DetectorInputs, LoadedDetector, make_score
from qdq.workloads.detection.pictures import PictureBatches, Pictures
from qdq.workloads.detection.shapes import SHAPE_NAMES, ShapePictures
from qdq.workloads.detection.torchvision_detectors import load_torchvision_detector
from qdq.workloads.detection.yolo import load_yolo
from qdq.workloads.detection.yolo_data import read_yolo_data
from qdq.workloads.sample_batches import draw_indices
from qdq.workloads.workload import Workload, WorkloadOptions

YOLO_PREFIX = "yolo/"
"""What the name of a model starts with if the rest is a file of ultralytics."""

_TRAINING_SHAPES = 2000  # generated pictures to fine-tune on


def load_detector(options: WorkloadOptions) -> Workload:
    """A detector with pictures; its metrics are mAP and mAP50.

    Args:
        options: The model is "yolo/FILE.pt", a file that ultralytics has saved, or the name of a detector of
            torchvision, whose weights are as for `load_torchvision_detector`. The data is the YAML file of a data set
            in the format of ultralytics; without one there are generated pictures of shapes.

    Raises:
        ArgumentError: A number is below 1, an image size that the model cannot use, a metric, weights for a file of
            ultralytics, or no data for a detector that does not know the generated shapes.
        DataError: The data set cannot be read.
        DependencyError: A package is not installed.
        ModelError: The model or its weights cannot be loaded, or lack a class of the data set.
    """
    if options.metric is not None:
        raise ArgumentError(
            f"--metric {options.metric} is given, and {options.model} is measured by mAP.",
            "leave --metric out, or build the model yourself: --model FILE.py:FUNCTION.",
        )
    num_calibration = options.calib_batches * options.batch_size
    numbers = {"calib_batches x batch_size": num_calibration, "eval_samples": options.eval_samples}
    for name, number in numbers.items():
        if number < 1:
            raise ArgumentError(
                f"{name} is {number}; it must be 1 or more.", "pass a positive one."
            )
    data_set = None if options.data is None else read_yolo_data(Path(options.data))
    names = SHAPE_NAMES if data_set is None else data_set.names
    detector = _load_network(options, names)
    if data_set is None:
        _require_shapes(options.model, detector)
    train: Pictures = ShapePictures(_TRAINING_SHAPES, detector.size, 2 * options.seed)
    val: Pictures = ShapePictures(options.eval_samples, detector.size, 2 * options.seed + 1)
    if data_set is not None:
        train, val = data_set.train, data_set.val

    def take(pictures: Pictures, count: int) -> PictureBatches:
        indices, description = draw_indices(pictures, count, options.seed)
        return PictureBatches(pictures, indices, options.batch_size, description, detector.size)

    evaluation = take(val, options.eval_samples)
    return Workload(
        name=options.model,
        weights=detector.weights,
        module=detector.module,
        calibration=DetectorInputs(detector, take(train, num_calibration)),
        evaluation=DetectorInputs(detector, evaluation),
        load_training=lambda: DetectorInputs(detector, take(train, len(train))),
        score=make_score(detector, evaluation, names),
        outputs=options.outputs,
        mask=options.mask,
        output_weights=options.output_weights,
    )


def _load_network(options: WorkloadOptions, names: tuple[str, ...]) -> LoadedDetector:
    """The detector that a name and weights mean."""
    size = options.image_size
    if not options.model.startswith(YOLO_PREFIX):
        return load_torchvision_detector(options.model, names, options.weights, size, options.seed)
    if options.weights != "DEFAULT":
        raise ArgumentError(
            f"--weights {options.weights} is given, and {options.model} has its own.",
            "leave --weights out.",
        )
    return load_yolo(Path(options.model.removeprefix(YOLO_PREFIX)), size)


def _require_shapes(model: str, detector: LoadedDetector) -> None:
    """Refuse the generated pictures for a detector that was trained on other classes.

    Raises:
        ArgumentError: It lacks a class of the pictures.
    """
    if not set(SHAPE_NAMES) <= set(detector.categories):
        raise ArgumentError(
            f"{model} needs pictures: the generated ones show {list_names(SHAPE_NAMES, 3)}, which it does not know.",
            "pass --data FILE.yaml, a data set with its classes.",
        )
