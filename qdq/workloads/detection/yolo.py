"""Detectors of ultralytics: a `.pt` file as a network that returns boxes and scores, and NMS around it.

ultralytics is licensed under AGPL-3.0 and is no dependency of qdq. Its files are pickles of modules, which its own
loader reads. qdq has it allow only the classes of ultralytics and torch, so that a file cannot run other code.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdq.errors import ArgumentError, DependencyError, ModelError
from qdq.text import printable
from qdq.workloads.detection.loaded_detector import LoadedDetector

_STRIDE = 32  # the sides of images are multiples of the coarsest map
_SIZE = 640  # of the training of nearly all published files
_MIN_SCORE = 0.001  # as in the validation of ultralytics: mAP wants the uncertain detections, too
_MAX_IOU = 0.7
_MOST_CANDIDATES = 30_000
_MOST_DETECTIONS = 300


class YoloNetwork(nn.Module):
    """A detector of ultralytics without NMS; its layers have their names there behind `detector.`.

    Args:
        detector: A `DetectionModel` with a head `Detect`; it is put into evaluation mode, and its head set to return
            the decoded output alone.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        head = detector.model[-1]
        if getattr(head, "end2end", False):
            head.end2end = False
            head.fuse()  # drops the head that needs no NMS, which nothing reads now
        head.export = True
        self.num_classes = int(head.nc)
        self.detector = detector
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Decode all anchors of images `[N, 3, H, W]` from 0 to 1, whose sides are multiples of 32.

        Returns:
            `boxes` `[N, 4, anchors]`: centre x, centre y, width and height in pixels; `scores`
            `[N, classes, anchors]` from 0 to 1.
        """
        decoded = self.detector(images)
        return {"boxes": decoded[:, :4], "scores": decoded[:, 4:]}


def load_yolo(path: Path, size: int | None = None) -> LoadedDetector:
    """Load a detector that ultralytics has saved.

    Args:
        path: The `.pt` file, of YOLOv8, 11, 12 or another model with the same head.
        size: Side of the images in pixels, a multiple of 32; None means that of its training.

    Raises:
        ArgumentError: Another size.
        DependencyError: ultralytics is not installed, or too old to read files safely.
        ModelError: There is no such file, it cannot be read, or holds a model for another task.
    """
    if not path.is_file():
        raise ModelError(
            f"there is no file {path}.",
            "pass yolo/FILE.pt with a file that exists; none is fetched.",
        )
    checkpoint = _read_checkpoint(path)
    detector = checkpoint.get("ema") or checkpoint.get("model")
    head = _describe_head(detector)
    if head != "Detect":
        raise ModelError(
            f"{path} holds {head}; expected a detector that ends in Detect.",
            "pass a model for detection, without segments, poses or rotated boxes.",
        )
    assert isinstance(detector, nn.Module)  # noqa: S101
    module = YoloNetwork(detector.float())
    names: Any = getattr(detector, "names", None) or range(module.num_classes)
    trained_size = (checkpoint.get("train_args") or {}).get("imgsz", _SIZE)
    return LoadedDetector(
        name=f"yolo/{path.name}",
        module=module,
        weights=f"checkpoint {path}",
        categories=tuple(str(names[index]) for index in range(module.num_classes)),
        size=_require_size(trained_size if size is None else size),
        prepare=_keep_images,
        detect=_detect,
    )


def _keep_images(images: Tensor) -> Tensor:
    return images


def _detect(outputs: Mapping[str, Any], images: Tensor) -> list[dict[str, Tensor]]:
    return select_detections(outputs)


def import_ultralytics(module: str) -> Any:
    """Import a module of ultralytics.

    Args:
        module: Its name, such as "ultralytics.nn.tasks".

    Raises:
        DependencyError: It is not installed, or lacks a package itself.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"a YOLO needs ultralytics, which cannot be imported ({printable(error)}).",
            "pip install ultralytics (its licence is AGPL-3.0); --no-deps keeps your torch.",
        ) from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a `.pt` file, read with the classes of ultralytics and torch only."""
    tasks = import_ultralytics("ultralytics.nn.tasks")
    if not getattr(getattr(tasks, "_SafeLoad", None), "SUPPORTED", False):
        raise DependencyError(
            "this ultralytics reads a file only as a pickle, which may run any code.",
            "pip install --upgrade ultralytics",
        )
    try:
        content: dict[str, Any] = tasks.torch_safe_load(str(path), safe_only=True)[0]
    except Exception as error:  # damaged files make the unpickler raise anything
        raise ModelError(
            f"{path} cannot be read as a model of ultralytics: {printable(error)}.",
            "pass a file that ultralytics has saved.",
        ) from error
    return content


def _describe_head(detector: Any) -> str:
    """The class of the last layer, or what there is instead of a model."""
    layers = getattr(detector, "model", None)
    if not isinstance(layers, nn.Sequential) or not len(layers):
        return f"a {type(detector).__name__}"
    return type(layers[-1]).__name__


def _require_size(size: int) -> int:
    """Refuse a side of images that the maps of a YOLO do not divide."""
    if size < _STRIDE or size % _STRIDE:
        nearest = max(round(size / _STRIDE), 1) * _STRIDE
        raise ArgumentError(
            f"the side of the images is {size}; it must be a multiple of {_STRIDE}.",
            f"pass --image-size {nearest}.",
        )
    return size


def select_detections(outputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The detections of each image: NMS for each class, with the limits of ultralytics' validation.

    Args:
        outputs: `boxes` and `scores` of `YoloNetwork`, as tensors or arrays.

    Returns:
        For each image boxes `[K, 4]` (left, top, right, bottom in pixels), scores `[K]` and labels `[K]`.
    """
    boxes = torch.as_tensor(outputs["boxes"]).mT
    scores = torch.as_tensor(outputs["scores"]).mT
    centres, halves = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centres - halves, centres + halves], dim=-1)
    return [_suppress(*image) for image in zip(corners, scores, strict=True)]


def _suppress(boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """NMS for the boxes `[anchors, 4]` of one image; each class of an anchor is a candidate.

    Args:
        boxes: Left, top, right, bottom.
        scores: `[anchors, classes]`.
    """
    from torchvision.ops import batched_nms

    anchors, labels = (scores > _MIN_SCORE).nonzero(as_tuple=True)
    values, order = scores[anchors, labels].sort(descending=True)
    values, order = values[:_MOST_CANDIDATES], order[:_MOST_CANDIDATES]
    anchors, labels = anchors[order], labels[order]
    best = batched_nms(boxes[anchors], values, labels, _MAX_IOU)[:_MOST_DETECTIONS]
    return {"boxes": boxes[anchors[best]], "scores": values[best], "labels": labels[best]}
