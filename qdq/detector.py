"""Detectors of torchvision in two parts: backbone and head, which an engine runs, and the rest around them.

The rest resizes images, decodes boxes and suppresses overlapping ones (NMS). What it computes depends on the values of
its inputs, so `torch.export` cannot capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qdq.device import find_device
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.forward import evaluating, require_model
from qdq.text import list_names

_TRANSFORM = "GeneralizedRCNNTransform"
_FEATURE = "feature_"
_SCORES = "objectness_"
_DELTAS = "deltas_"


def is_detector(model: nn.Module) -> bool:
    """Whether a model is a detector of torchvision, or contains one.

    Args:
        model: Any module.
    """
    return any(type(module).__name__ == _TRANSFORM for module in model.modules())


class _Proposals(nn.Module):
    """Holds the head of the first stage under the name that it has in the detector.

    Args:
        head: The head.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head


class DetectorCore(nn.Module):
    """Backbone and head of a detector, whose layers have the names that they have in the detector.

    Args:
        detector: The detector; its modules are shared, not copied.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.has_proposals = hasattr(detector, "rpn")
        if self.has_proposals:
            self.rpn = _Proposals(detector.rpn.head)
        else:
            self.head = detector.head
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of the head for images `[N, 3, H, W]` from `SplitDetector.preprocess`, by name."""
        features = _name_features(self.backbone(images))
        levels = list(features.values())
        if not self.has_proposals:
            return dict(self.head(levels))
        outputs = {f"{_FEATURE}{name}": level for name, level in features.items()}
        scores, deltas = self.rpn.head(levels)
        for index, (level_scores, level_deltas) in enumerate(zip(scores, deltas, strict=True)):
            outputs[f"{_SCORES}{index}"] = level_scores
            outputs[f"{_DELTAS}{index}"] = level_deltas
        return outputs


def _name_features(features: Any) -> dict[str, torch.Tensor]:
    """The feature maps of a backbone by name."""
    return {"0": features} if isinstance(features, torch.Tensor) else dict(features)


class SplitDetector:
    """A detector whose backbone and head can be quantized and exported by themselves; see `split_detector`.

    Args:
        detector: The detector.

    Attributes:
        core: Backbone and head: images `[N, 3, H, W]` -> outputs by name.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._detector: Any = detector
        self.core = DetectorCore(detector)
        self._shapes: dict[torch.Size, dict[str, torch.Size]] = {}
        self._names: list[str] = []

    def preprocess(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Images `[3, H, W]` resized, normalised and padded to one batch `[N, 3, H, W]` for `core`.

        Args:
            images: As for the detector.
        """
        device = find_device(self._detector)
        with evaluating(self._detector):
            batch, _ = self._detector.transform([image.to(device) for image in images])
        tensors: torch.Tensor = batch.tensors
        return tensors

    def postprocess(
        self, outputs: Mapping[str, Any], images: Sequence[torch.Tensor]
    ) -> list[dict[str, torch.Tensor]]:
        """The detections of the detector from the outputs of its core, wherever that ran.

        The second stage of a detector with proposals runs here, in torch.

        Args:
            outputs: Name -> tensor or array, as `core` returns them.
            images: The images that `preprocess` was given.

        Returns:
            For each image what the detector returns: boxes, labels, scores.

        Raises:
            ArgumentError: Outputs are missing.
        """
        device = find_device(self._detector)
        named = {name: torch.as_tensor(value).to(device) for name, value in outputs.items()}
        batch = self.preprocess(images)
        features = self._make_features(named, batch)
        head: nn.Module = self.core.rpn.head if self.core.has_proposals else self.core.head
        heads = _list_proposals(named, len(features)) if self.core.has_proposals else named
        with (
            evaluating(self._detector),
            _answering(self.core.backbone, lambda _: features),
            _answering(head, lambda _: heads),
        ):
            detections: list[dict[str, torch.Tensor]] = self._detector(
                [image.to(device) for image in images]
            )
        return detections

    def _make_features(
        self, outputs: Mapping[str, torch.Tensor], batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The feature maps by name; of a detector without proposals only their sizes matter.

        Raises:
            ArgumentError: Outputs are missing.
        """
        size = batch.shape[-2:]
        if size not in self._shapes:
            with evaluating(self.core):
                features = _name_features(self.core.backbone(batch[:1]))
                expected = self.core(batch[:1])
            self._shapes[size] = {name: level.shape[1:] for name, level in features.items()}
            self._names = list(expected)
        missing = [name for name in self._names if name not in outputs]
        if missing:
            raise ArgumentError(
                f"the outputs of the core lack {list_names(missing, 5)}; there are {list_names(list(outputs), 5)}.",
                "pass all that it returns, by name.",
            )
        if self.core.has_proposals:
            return {name: outputs[f"{_FEATURE}{name}"] for name in self._shapes[size]}
        shapes = self._shapes[size].items()
        return {name: batch.new_zeros(1).expand(len(batch), *shape) for name, shape in shapes}


def _list_proposals(
    outputs: Mapping[str, torch.Tensor], num_levels: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores and deltas of every level, as the head of a detector with proposals returns them."""
    levels = range(num_levels)
    scores = [outputs[f"{_SCORES}{level}"] for level in levels]
    deltas = [outputs[f"{_DELTAS}{level}"] for level in levels]
    return scores, deltas


@contextmanager
def _answering(module: nn.Module, answer: Callable[[Any], Any]) -> Iterator[None]:
    """Have a module return something else in the block."""
    attributes = vars(module)
    before = {name: attributes[name] for name in ("forward",) if name in attributes}
    attributes["forward"] = answer
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)


def split_detector(model: nn.Module) -> SplitDetector:
    """Split a detector of torchvision into a core that can be quantized and exported, and functions around it.

    `split.core` is a model like any other: `swap_modules(split.core, split.preprocess(images))`. It shares its layers
    with the detector. `split.postprocess(outputs, images)` gives the detections, from the outputs of the core in torch,
    of the ONNX file or of the engine.

    Args:
        model: SSD, SSDlite, RetinaNet, FCOS, Faster, Mask or Keypoint R-CNN.

    Raises:
        ArgumentTypeError: Another model.
    """
    require_model(model)
    has_head = hasattr(model, "rpn") or hasattr(model, "head")
    if not hasattr(model, "backbone") or not has_head or not is_detector(model):
        raise ArgumentTypeError(
            f"the model is of type {type(model).__name__}, and not a detector of torchvision.",
            "write a module that returns the outputs of backbone and head, and call NMS on them outside of it.",
        )
    return SplitDetector(model)
