"""Detectors of torchvision: backbone and head, which are quantized, and the functions around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qdq.detector import split_detector
from qdq.errors import ArgumentError, DependencyError, ModelError
from qdq.weights import StateDict, read_checkpoint, require_plain
from qdq.workloads.detection.loaded_detector import LoadedDetector
from qdq.workloads.trained_weights import (
    TorchvisionTask,
    fetch_weights,
    find_checkpoint,
    load_state,
    rename_keys,
)

try:
    import torchvision
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise DependencyError(
        f"torchvision cannot be imported ({str(error).splitlines()[0]}); its detectors need it.",
        "pip install 'qdq[demo]'",
    ) from error

BACKGROUND = "__background__"
"""The first class of every detector of torchvision."""

_TASK = TorchvisionTask(
    torchvision.models,
    torchvision.models.detection,
    "a detector",
    "ssdlite320_mobilenet_v3_large",
)
_SIZE = 640  # of a detector that takes images of any size
_LEAST_SIZE = 64


def load_torchvision_detector(
    model: str,
    names: Sequence[str],
    weights: str = "random",
    size: int | None = None,
    seed: int = 0,
) -> LoadedDetector:
    """Load a detector of torchvision with its weights.

    Args:
        model: Its name there, such as "ssdlite320_mobilenet_v3_large".
        names: Classes of the data set. Random weights are for these; so is a checkpoint with as many.
        weights: "random", an entry of the model's torchvision weights such as "DEFAULT", or a checkpoint file as for
            `qdq.load_model`.
        size: Side of the images in pixels; None means that of an SSD, and 640 for other detectors.
        seed: Seed of the random weights. The global random state does not change.

    Raises:
        ModelError: Unknown model or weights; weights that cannot be fetched or read or do not fit the model.
        ArgumentError: `size` is below 64.
    """
    entries = _TASK.list_weights(model)
    categories = (BACKGROUND, *names)
    if weights == "random":
        detector = build_detector(model, len(categories), size, seed)
        return _wrap(model, detector, f"random (seed {seed})", categories)

    trained_names = tuple(entries["DEFAULT"].meta["categories"]) if entries else ()
    if weights in entries:
        state, source = fetch_weights(entries[weights]), entries[weights].name
        categories = trained_names
    else:
        state, source = read_checkpoint(find_checkpoint(weights, model, list(entries)))
        state = rename_keys(state, source)
        require_plain(state, source)
    detector = build_detector(model, len(categories), size, seed)
    count = _count_classes(detector, len(categories), state)
    if count != len(categories):
        if count != len(trained_names):
            raise ModelError(
                f"{source} has {count} classes with the background, and the data set has {len(categories)}.",
                "load weights that were trained on this data set.",
            )
        categories = trained_names
        detector = build_detector(model, count, size, seed)
    load_state(detector, state, model, source)
    return _wrap(model, detector, source, categories)


def _wrap(
    model: str, detector: nn.Module, source: str, categories: tuple[str, ...]
) -> LoadedDetector:
    split = split_detector(detector)

    def prepare(images: Tensor) -> Tensor:
        return split.preprocess(list(images))

    def detect(outputs: Mapping[str, Any], images: Tensor) -> list[dict[str, Tensor]]:
        return split.postprocess(outputs, list(images))

    transform: Any = detector.get_submodule("transform")
    return LoadedDetector(
        name=model,
        module=split.core,
        weights=source,
        categories=categories,
        size=transform.fixed_size[0],
        prepare=prepare,
        detect=detect,
    )


def build_detector(
    model: str, num_classes: int, size: int | None = None, seed: int = 0
) -> nn.Module:
    """A detector of torchvision with random weights, in evaluation mode.

    Args:
        model: Its name in torchvision.
        num_classes: Number of classes with the background.
        size: As for `load_torchvision_detector`; the detector resizes all images to it.
        seed: Likewise.

    Raises:
        ModelError: torchvision has no detector of this name.
        ArgumentError: `size` is below 64.
    """
    if size is not None and size < _LEAST_SIZE:
        raise ArgumentError(
            f"the side of the images is {size} pixels; detectors need {_LEAST_SIZE}.",
            f"pass --image-size {_LEAST_SIZE}, or a larger one.",
        )
    detector = _TASK.build(model, num_classes, seed)
    transform: Any = detector.get_submodule("transform")
    fixed_size = transform.fixed_size or (_SIZE, _SIZE)
    transform.fixed_size = fixed_size if size is None else (size, size)
    return detector


def is_detector_name(model: str) -> bool:
    """Whether torchvision has a detector of this name.

    Args:
        model: The name.
    """
    return _TASK.knows(model)


def _count_classes(detector: nn.Module, num_classes: int, state: StateDict) -> int:
    """Number of classes of a state_dict: the first size of the last layers is a multiple of it.

    Args:
        detector: A detector of the architecture.
        num_classes: Its number of classes, which also counts for tensors of another architecture.
        state: The tensors by name.
    """
    for name, tensor in detector.state_dict().items():
        trained = state.get(name, tensor)
        if trained.shape == tensor.shape or trained.shape[1:] != tensor.shape[1:]:
            continue
        count, rest = divmod(trained.shape[0] * num_classes, tensor.shape[0])
        return num_classes if rest else count
    return num_classes
