"""Networks of torchvision, with its trained weights, fetched once, or a checkpoint file of any training script."""

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
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from qdq.errors import ModelError
from qdq.seeds import seeded_rng
from qdq.text import list_names
from qdq.weights import StateDict, first_line, require_convertible

logger = logging.getLogger(__name__)

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
class TorchvisionTask:
    """The networks of torchvision for a task other than classification.

    Args:
        models: `torchvision.models`.
        module: The part of it that has these networks.
        kind: What they are, in words, such as "a detector".
        example: Name of one of them.
    """

    models: ModuleType
    module: ModuleType
    kind: str
    example: str

    def knows(self, model: str) -> bool:
        """Whether torchvision has such a network of this name."""
        return model in self.models.list_models(module=self.module)

    def list_weights(self, model: str) -> dict[str, Any]:
        """The trained weights of a network by name.

        Raises:
            ModelError: torchvision has no such network of this name.
        """
        self._require(model)
        return dict(self.models.get_model_weights(model).__members__)

    def build(self, model: str, num_classes: int, seed: int) -> nn.Module:
        """A network with random weights, in evaluation mode.

        Args:
            model: Its name in torchvision.
            num_classes: Number of classes, the background included.
            seed: Seed of the weights. The global random state does not change.

        Raises:
            ModelError: torchvision has no such network of this name.
        """
        self._require(model)
        # Tensors created in inference mode could be neither trained nor changed later.
        with torch.inference_mode(False), seeded_rng(seed):
            network: nn.Module = self.models.get_model(
                model, weights=None, weights_backbone=None, num_classes=num_classes
            )
        return network.eval()

    def _require(self, model: str) -> None:
        if self.knows(model):
            return
        names = self.models.list_models(module=self.module)
        close = difflib.get_close_matches(model.lower(), names, n=3)
        fix = f"pass a name such as {self.example}."
        if close:
            fix = f"did you mean {' or '.join(close)}?"
        raise ModelError(f"unknown model {model!r}; expected {self.kind} of torchvision.", fix)


def fetch_weights(entry: Any) -> StateDict:
    """The trained weights of a torchvision entry, from torch.hub's cache or from the network.

    Args:
        entry: A member of an enum of weights of torchvision.

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


def find_checkpoint(weights: str, model: str, entries: Collection[str]) -> Path:
    """The checkpoint file that `weights` names.

    Args:
        weights: What the user asked for.
        model: Name of the network.
        entries: Names of the trained weights that belong to it.

    Raises:
        ModelError: It names no file.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError(
            f"{path} is a folder; expected a checkpoint file.", "pass the file itself."
        )
    names = ", ".join([*entries, "random"])
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES or len(path.parts) > 1:
        raise ModelError(
            f"there is no checkpoint {path}.", f"check the path, or pass one of {names}."
        )
    raise ModelError(
        f"unknown weights {weights!r} for {model}; expected {names} or a checkpoint file.",
        "pass one of these.",
    )


def rename_keys(state: StateDict, source: str) -> StateDict:
    """A state_dict with torchvision's current names, without wrappers and auxiliary heads.

    Args:
        state: The tensors.
        source: A description of their origin.

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


def load_state(module: nn.Module, state: StateDict, model: str, source: str) -> None:
    """Copy the tensors into the module.

    Args:
        module: The network.
        state: The tensors by name.
        model: Name of the network.
        source: A description of the origin of the tensors.

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
