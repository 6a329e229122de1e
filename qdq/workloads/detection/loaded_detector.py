"""A detector as the network that is quantized and the functions around it, and its score on pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qdq.workloads.detection.average_precision import AveragePrecision
from qdq.workloads.detection.classes import match_classes, rename_classes
from qdq.workloads.detection.pictures import PictureBatches

Outputs = Mapping[str, Any]
"""The outputs of the network by name, as tensors or arrays."""


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready for inference.

    Args:
        name: Its name on the command line.
        module: The network that is quantized and exported, in evaluation mode, without NMS.
        weights: Where its weights come from, in words.
        categories: Name of each class, in the order of their indices.
        size: Side of the images in pixels.
        prepare: Images `[N, 3, size, size]` from 0 to 1 -> inputs of the network.
        detect: Outputs of the network and those images -> for each image boxes, scores and labels.
    """

    name: str
    module: nn.Module
    weights: str
    categories: tuple[str, ...]
    size: int
    prepare: Callable[[Tensor], Tensor]
    detect: Callable[[Outputs, Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class DetectorInputs:
    """Pictures as batches of inputs of a detector, without the objects.

    Args:
        detector: The detector.
        pictures: The pictures.
    """

    detector: LoadedDetector
    pictures: PictureBatches

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.pictures:
            yield self.detector.prepare(images)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def num_samples(self) -> int:
        """Number of images in a pass."""
        return self.pictures.num_samples

    @property
    def num_sources(self) -> int:
        """Number of images: each is a source of its own."""
        return self.num_samples

    @property
    def labels(self) -> None:
        """None: a picture has many objects."""

    @property
    def description(self) -> str:
        """Source, number and seed of the pictures."""
        return self.pictures.description

    @property
    def label_note(self) -> str:
        """Where the objects are used."""
        return "boxes and classes of the objects, which mAP needs"

    def subset(self, n: int) -> DetectorInputs:
        """The first `n` images, or all if there are fewer.

        Args:
            n: At least 1.
        """
        return DetectorInputs(self.detector, self.pictures.subset(n))

    def without_first(self, n: int) -> DetectorInputs:
        """All images but the first `n`.

        Args:
            n: At least 0.

        Raises:
            ArgumentError: There are no more.
        """
        return DetectorInputs(self.detector, self.pictures.without_first(n))

    def hold_out(self, n: int) -> tuple[DetectorInputs, DetectorInputs]:
        """All images but the first `n`, and these.

        Args:
            n: At least 1, and fewer than there are.
        """
        return self.without_first(n), self.subset(n)

    def by_source(self) -> DetectorInputs:
        """The same images in the same order: each is a source of its own."""
        return self


def make_score(
    detector: LoadedDetector, pictures: PictureBatches, names: Sequence[str]
) -> Callable[[Callable[[Any], Any]], dict[str, float]]:
    """The function that measures mAP on pictures.

    Args:
        detector: The detector.
        pictures: The pictures to evaluate on.
        names: Classes of the pictures.

    Returns:
        `score(predict)`, where `predict` gives the outputs of the network for its inputs, in torch, of an ONNX file or
        of an engine. It returns `mAP` and `mAP50` from 0 to 1.

    Raises:
        ModelError: The detector lacks a class of the pictures.
        DependencyError: A package that computes mAP is not installed.
    """
    classes = match_classes(names, detector.categories, detector.name)
    AveragePrecision()  # a missing package is reported before the work

    def score(predict: Callable[[Any], Any]) -> dict[str, float]:
        precision = AveragePrecision()
        for images, targets in pictures:
            outputs = predict(detector.prepare(images))
            detections = detector.detect(outputs, images)
            precision.update(
                [rename_classes(detection, classes) for detection in detections], targets
            )
        return precision.compute()

    return score
