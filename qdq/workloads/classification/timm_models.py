"""Image classifiers of timm: `timm/NAME`."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from qdq.errors import DependencyError, ModelError
from qdq.weights import StateDict, first_line
from qdq.workloads.classification.models import (
    TIMM_PREFIX,
    Architecture,
    Preprocess,
    Pretrained,
    list_imagenet_categories,
)

_IMAGENET_CLASSES = 1000


def find_timm_architecture(model: str) -> Architecture:
    """A classifier of timm with its trained weights.

    Args:
        model: "timm/NAME", for example "timm/mobilenetv3_small_100"; NAME may end with the tag of its weights.

    Raises:
        DependencyError: timm is not installed.
        ModelError: timm has no such model, or it is no classifier.
    """
    timm = _import_timm()
    name = model.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        raise _unknown_model(model, name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ModelError(
            f"timm has no configuration for {model}: the preprocessing of its images is not known.",
            "build it yourself: --model FILE.py:FUNCTION.",
        )
    num_classes = config.num_classes
    if not num_classes:
        raise ModelError(
            f"{model} has no classes; expected an image classifier.",
            "choose one with weights for classes, or build it yourself: --model FILE.py:FUNCTION.",
        )

    def build(num_classes: int, image_size: int) -> nn.Module:
        # A model with a position embedding is made for one size; others take no such argument.
        size = {"img_size": image_size} if config.fixed_input_size else {}
        module: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, **size
        )
        return module

    def fetch() -> StateDict:
        return _fetch(timm, name)

    weights = f"{config.tag or 'default'} of timm"
    categories = _list_categories(num_classes)
    pretrained = Pretrained(weights, _read_preprocess(timm, config), categories, fetch)
    return Architecture(model, build, {"DEFAULT": pretrained})


def _import_timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise DependencyError(
            f"timm cannot be imported ({first_line(error)}).", "pip install 'qdq[timm]'"
        ) from error
    return timm


def _unknown_model(model: str, name: str, models: list[str]) -> ModelError:
    close = difflib.get_close_matches(name, models, n=3)
    names = [f"{TIMM_PREFIX}{similar}" for similar in close]
    fix = f"did you mean {' or '.join(names)}?" if names else "see timm.list_models()."
    return ModelError(f"timm has no model {model.removeprefix(TIMM_PREFIX)!r}.", fix)


def _list_categories(num_classes: int) -> list[str]:
    """The names of the classes: those of ImageNet, or their indices."""
    if num_classes == _IMAGENET_CLASSES:
        return list_imagenet_categories()
    return [str(index) for index in range(num_classes)]


def _read_preprocess(timm: Any, config: Any) -> Preprocess:
    """The evaluation transform that timm uses for these weights."""
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    _, height, crop_size = data["input_size"]
    if data["crop_mode"] != "center" or height != crop_size:
        raise ModelError(
            f"the images of this model of timm are {height} x {crop_size}, cropped in the mode {data['crop_mode']}; "
            "expected squares cut from the centre.",
            "build it and its batches yourself: --model FILE.py:FUNCTION.",
        )
    return Preprocess(
        resize_size=int(crop_size / data["crop_pct"]),
        crop_size=crop_size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
    )


def _fetch(timm: Any, name: str) -> StateDict:
    """The trained weights, from the cache of the hub or from the network.

    Raises:
        ModelError: They cannot be fetched.
    """
    try:
        state: StateDict = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # networks, proxies, disks and damaged files can raise anything
        raise ModelError(
            f"cannot fetch the weights of timm/{name}: {first_line(error)}.",
            "check the network, or pass --weights FILE (a checkpoint) or --weights random.",
        ) from error
    return state
