"""Mean average precision of detections, as COCO defines it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qdq.errors import DependencyError

if TYPE_CHECKING:
    from qdq.workloads.detection.pictures import Target

Detections = Mapping[str, Tensor]
"""Of one image: boxes `[K, 4]` (left, top, right, bottom in pixels), scores `[K]` and labels `[K]`."""


class AveragePrecision:
    """Collects the detections of a pass and computes their mean average precision.

    Raises:
        DependencyError: torchmetrics or faster-coco-eval is not installed.
    """

    def __init__(self) -> None:
        try:
            import faster_coco_eval  # noqa: F401  # torchmetrics would report it without the line of pip
            from torchmetrics.detection import MeanAveragePrecision
        except ImportError as error:
            raise DependencyError(
                f"mAP needs torchmetrics and faster-coco-eval ({error}).",
                "pip install 'qdq[metrics]'",
            ) from error
        self._metric: Any = MeanAveragePrecision(backend="faster_coco_eval")
        self._metric.warn_on_many_detections = False  # COCO counts the best 100 of an image

    def update(self, detections: Iterable[Detections], targets: Iterable[Target]) -> None:
        """Add the detections of some images.

        Args:
            detections: Of each image.
            targets: The objects of each image.
        """
        predicted = [
            {key: detection[key].cpu() for key in ("boxes", "scores", "labels")}
            for detection in detections
        ]
        expected = [{"boxes": target.boxes, "labels": target.labels} for target in targets]
        self._metric.update(predicted, expected)

    def compute(self) -> dict[str, float]:
        """MAP (the mean over IoU thresholds from 0.5 to 0.95) and mAP50 (at 0.5) of all images, from 0 to 1."""
        figures = self._metric.compute()
        return {"mAP": float(figures["map"]), "mAP50": float(figures["map_50"])}
