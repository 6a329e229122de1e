"""Segmentation networks of torchvision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdq.errors import DependencyError, ModelError
from qdq.weights import StateDict, read_checkpoint, require_plain
from qdq.workloads.trained_weights import (
    TorchvisionTask,
    fetch_weights,
    find_checkpoint,
    load_state,
    rename_keys,
)

try:
    import torchvision
    from torchvision.transforms import functional as F
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise DependencyError(
        f"torchvision cannot be imported ({str(error).splitlines()[0]}); its networks need it.",
        "pip install 'qdq[demo]'",
    ) from error

_TASK = TorchvisionTask(
    torchvision.models,
    torchvision.models.segmentation,
    "a segmentation network",
    "lraspp_mobilenet_v3_large",
)
_MEAN = [0.485, 0.456, 0.406]  # of ImageNet, with which torchvision trained its weights
_STD = [0.229, 0.224, 0.225]
_AUXILIARY_HEAD = "aux_classifier."  # only training uses it


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmentation network ready for inference.

    Args:
        module: Images `[N, 3, H, W]` -> {"out": scores `[N, classes, H, W]`}, in evaluation mode.
        weights: Where its weights come from, in words.
        num_classes: Number of classes, the background included.
    """

    module: nn.Module
    weights: str
    num_classes: int


def normalize(image: Tensor) -> Tensor:
    """An image for the networks of torchvision.

    Args:
        image: uint8 `[3, H, W]`.

    Returns:
        float32 `[3, H, W]`, scaled to 0..1, minus ImageNet's mean, divided by its standard deviation.
    """
    scaled = F.convert_image_dtype(image, torch.float32)
    normalized: Tensor = F.normalize(scaled, _MEAN, _STD)
    return normalized


def is_segmenter_name(model: str) -> bool:
    """Whether torchvision has a segmentation network of this name.

    Args:
        model: The name.
    """
    return _TASK.knows(model)


def load_torchvision_segmenter(
    model: str, weights: str, num_classes: int, seed: int = 0
) -> LoadedSegmenter:
    """Load a segmentation network of torchvision with its weights.

    Args:
        model: Its name there, such as "lraspp_mobilenet_v3_large".
        weights: "random", an entry of the model's torchvision weights such as "DEFAULT", or a checkpoint file as for
            `qdq.load_model`; a checkpoint decides the number of classes.
        num_classes: Number of classes of random weights, the background included.
        seed: Seed of the random weights. The global random state does not change.

    Raises:
        ModelError: Unknown model or weights; weights that cannot be fetched or read or do not fit the model.
    """
    entries = _TASK.list_weights(model)
    if weights == "random":
        module = build_segmenter(model, num_classes, seed)
        return LoadedSegmenter(module, f"random (seed {seed})", num_classes)
    if weights in entries:
        entry = entries[weights]
        state, source = fetch_weights(entry), entry.name
    else:
        state, source = read_checkpoint(find_checkpoint(weights, model, list(entries)))
    state = rename_keys(state, source)
    require_plain(state, source)
    state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY_HEAD)}
    num_classes = _count_classes(model, state, num_classes)
    if num_classes < 2:
        raise ModelError(
            f"{source} has one class; expected the background and at least one more.",
            "build it yourself: --model FILE.py:FUNCTION.",
        )
    module = build_segmenter(model, num_classes, seed)
    load_state(module, state, model, source)
    return LoadedSegmenter(module, source, num_classes)


def build_segmenter(model: str, num_classes: int, seed: int = 0) -> nn.Module:
    """A segmentation network of torchvision with random weights, in evaluation mode, without an auxiliary head.

    Args:
        model: Its name in torchvision.
        num_classes: Number of classes, the background included.
        seed: Seed of the weights.

    Raises:
        ModelError: torchvision has no segmentation network of this name.
    """
    return _TASK.build(model, num_classes, seed)


def _count_classes(model: str, state: StateDict, default: int) -> int:
    """Number of classes of a state_dict: that of its last layer; `default` if it has other tensors."""
    expected = build_segmenter(model, default).state_dict()
    for name in reversed(list(expected)):
        if name.endswith(".bias") and name in state:
            return int(state[name].shape[0])
    return default
