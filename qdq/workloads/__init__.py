"""Tasks with their models, data and metrics: one file or package for each task."""

from __future__ import annotations

from qdq.workloads.hf import PREFIX, load_transformers_model
from qdq.workloads.own import is_function_of_file, load_own
from qdq.workloads.workload import Workload, WorkloadOptions


def load_workload(options: WorkloadOptions) -> Workload:
    """Load a model with its data and its metric. The form of the name decides the task.

    | model | task |
    |---|---|
    | `net.py:build` | a network of the user's own, see `own.load_own` |
    | `yolo/FILE.pt` | detection, a file of ultralytics |
    | `ssdlite320_mobilenet_v3_large`, another detector of torchvision | detection |
    | `lraspp_mobilenet_v3_large`, another segmentation network of torchvision | segmentation |
    | `hf/FOLDER` | a model that transformers has saved, with texts or images, see `hf.load_transformers_model` |
    | `efficientnet_lite0`, `resnet50`, another classifier of torchvision, `timm/NAME` | classification |

    Args:
        options: Model, weights, data, metric and how much data.

    Raises:
        QdqError: An unknown model, or options that do not fit it; the message says which.
    """
    if is_function_of_file(options.model):
        return load_own(options)
    if options.model.startswith(PREFIX):
        return load_transformers_model(options)
    # These need torchvision.
    from qdq.workloads.classification.classifier import load_classifier
    from qdq.workloads.detection import YOLO_PREFIX, load_detector
    from qdq.workloads.detection.torchvision_detectors import is_detector_name
    from qdq.workloads.segmentation import load_segmenter
    from qdq.workloads.segmentation.torchvision_segmenters import is_segmenter_name

    if options.model.startswith(YOLO_PREFIX) or is_detector_name(options.model):
        return load_detector(options)
    if is_segmenter_name(options.model):
        return load_segmenter(options)
    return load_classifier(options)
