"""Mean intersection over union of predicted masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qdq.errors import DataError, DependencyError
from qdq.metrics import Outputs, name_arrays
from qdq.predictor import Predict
from qdq.workloads.segmentation.masked_images import IGNORED, MaskBatches
from qdq.workloads.workload import Score

_OUTPUT = "out"  # of the networks of torchvision
_METRIC = "mIoU"


def make_score(batches: MaskBatches, num_classes: int) -> Score:
    """The function that measures the mean IoU of all classes on some images.

    Args:
        batches: The images to evaluate on.
        num_classes: Number of classes of the network, the background included.

    Returns:
        `score(predict)`, which returns `mIoU` from 0 to 1: over all pixels together, then the mean over the classes
        that are in the masks or predicted.

    Raises:
        DependencyError: torchmetrics is not installed.
    """
    _make_metric(num_classes)  # a missing package is reported before the work

    def score(predict: Predict) -> dict[str, float]:
        metric = _make_metric(num_classes)
        for batch in batches:
            _require_classes(batch.labels, num_classes)
            metric.update(_find_classes(predict(batch.inputs)), batch.labels)
        return {_METRIC: float(metric.compute())}

    return score


def _make_metric(num_classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise DependencyError(
            f"the mean IoU needs torchmetrics ({error}).", "pip install 'qdq[metrics]'"
        ) from error
    return MulticlassJaccardIndex(num_classes, average="macro", ignore_index=IGNORED)


def _find_classes(outputs: Outputs) -> torch.Tensor:
    """The class of every pixel `[N, H, W]` from scores `[N, classes, H, W]`."""
    named = name_arrays(outputs)
    scores = named[_OUTPUT] if _OUTPUT in named else next(iter(named.values()))
    return torch.from_numpy(np.asarray(scores)).argmax(dim=1)


def _require_classes(masks: torch.Tensor, num_classes: int) -> None:
    """Refuse masks with a class that the network does not have.

    Raises:
        DataError: There is one.
    """
    classes = masks[masks != IGNORED]
    if classes.numel() and int(classes.max()) >= num_classes:
        raise DataError(
            f"a mask has the class {int(classes.max())}, and the network has {num_classes} classes.",
            f"use masks with 0 to {num_classes - 1}, and {IGNORED} for pixels that do not count.",
        )
