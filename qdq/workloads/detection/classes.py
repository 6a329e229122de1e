"""The classes of a data set among those of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qdq.errors import ModelError
from qdq.text import list_names

_SHOWN = 5


def match_classes(names: Sequence[str], categories: Sequence[str], model: str) -> Tensor:
    """The class of a data set for each class of a detector.

    Args:
        names: Classes of the data set.
        categories: Classes of the detector.
        model: Name of the detector.

    Returns:
        int64 `[categories]`: index among the names; -1 for a class that the data set does not have.

    Raises:
        ModelError: The detector lacks a class of the data set.
    """
    missing = [name for name in names if name not in categories]
    if missing:
        raise ModelError(
            f"{model} has no class {list_names(missing, _SHOWN)}; it has {list_names(categories, _SHOWN)}.",
            "name the classes of the data set as the model does, or load weights that were trained on it.",
        )
    indices = {name: index for index, name in enumerate(names)}
    return torch.tensor([indices.get(category, -1) for category in categories])


def rename_classes(detections: Mapping[str, Tensor], classes: Tensor) -> dict[str, Tensor]:
    """Detections with the classes of a data set; those of other classes are dropped.

    Args:
        detections: Of one image, with the classes of the detector.
        classes: From `match_classes`.
    """
    labels = classes[detections["labels"].cpu()]
    is_known = labels >= 0
    return {
        "boxes": detections["boxes"].cpu()[is_known],
        "scores": detections["scores"].cpu()[is_known],
        "labels": labels[is_known],
    }
