"""Tensors of a checkpoint file: finding them in its containers, and refusing those that a model cannot take."""

from __future__ import annotations

import argparse
import codecs
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qdq.errors import ModelError
from qdq.text import list_names

StateDict = Mapping[str, Tensor]

_SHOWN = 3
# Where training scripts put the state_dict. Averaged weights are used if there are no others.
_NESTED_UNDER = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")
_MOST_CONTAINERS = 8  # inside one another; a container may also contain itself


def read_checkpoint(path: Path) -> tuple[StateDict, str]:
    """Find the state_dict in a checkpoint file.

    Args:
        path: A file that `torch.save` wrote, or a `.safetensors` file.

    Returns:
        The tensors by name, and a description of their place for messages.

    Raises:
        ModelError: It is not a checkpoint, needs code to be loaded, or has no state_dict.
    """
    content = load_plain(path)
    place = ""
    for _ in range(_MOST_CONTAINERS):
        key = _find_nested(content)
        if key is None:
            break
        content = content[key]
        place += f"[{key}]"
    if not is_state_dict(content):
        raise ModelError(
            f"{path} holds no state_dict: found {_describe_container(content, place)}, "
            f"expected names and tensors, alone or under one of {', '.join(_NESTED_UNDER)}.",
            "save the weights with torch.save(model.state_dict(), FILE).",
        )
    return content, f"checkpoint {path}{place}"


def _find_nested(content: Any) -> str | None:
    """The key under which a container has the state_dict; None if it has none or is one itself."""
    if not isinstance(content, Mapping) or is_state_dict(content):
        return None
    for key in _NESTED_UNDER:
        nested = content.get(key)
        if isinstance(nested, Mapping) and nested:
            return key
    return None


def is_state_dict(content: Any) -> bool:
    """Whether an object maps names to tensors, and has at least one."""
    if not isinstance(content, Mapping) or not content:
        return False
    has_names = all(isinstance(name, str) for name in content)
    return has_names and all(isinstance(value, Tensor) for value in content.values())


def _describe_container(content: Any, place: str) -> str:
    text = f"a {type(content).__name__}"
    if isinstance(content, Mapping) and content:
        first_keys = list(content)[:_SHOWN]
        text += f" with the keys {', '.join(map(str, first_keys))}"
    if place:
        text += f" under {place}"
    return text


def require_plain(state: StateDict, source: str) -> None:
    """Refuse tensors that are not dense and full of real numbers: sparse, nested, meta, quantized, complex or empty.

    Args:
        state: The tensors.
        source: A description of their origin.

    Raises:
        ModelError: Some tensors are not; the message names the first of them.
    """
    flaws = []
    for name, tensor in state.items():
        flaw = _describe_storage(tensor)
        if flaw:
            flaws.append(f"{name} is {flaw}")
    _refuse(flaws, source)


def require_convertible(state: StateDict, model_state: StateDict, source: str) -> None:
    """Refuse tensors whose values would change in the model.

    Floats may be rounded to the model's type and must stay finite if the model's are. Integers and booleans are refused
    where the model has floats; a counter may be stored in any type that holds it exactly.

    Args:
        state: Plain tensors.
        model_state: Tensors of the model; names that only one of the two has are ignored.
        source: A description of the tensors' origin.

    Raises:
        ModelError: Some values would change; the message names the first of these tensors.
    """
    flaws = []
    for name, tensor in state.items():
        if name not in model_state:
            continue
        flaw = _describe_conversion(tensor, model_state[name]) or _describe_variance(name, tensor)
        if flaw:
            flaws.append(f"{name} is {flaw}")
    _refuse(flaws, source)


def _refuse(flaws: list[str], source: str) -> None:
    if flaws:
        raise ModelError(
            f"{source} cannot be loaded: {list_names(flaws, _SHOWN)}.",
            "save the weights of the float model: dense, finite floating-point tensors with values, on the CPU.",
        )


def _describe_storage(tensor: Tensor) -> str:
    """The reason why a layer cannot take a tensor; "" if there is none."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"not a dense tensor ({_short(tensor.layout)})"
    if tensor.device.type == "meta":
        return "a meta tensor: a shape without values"
    if tensor.is_quantized:
        return f"quantized ({_short(tensor.dtype)})"
    if tensor.is_complex():
        return f"complex ({_short(tensor.dtype)})"
    if tensor.numel() == 0:
        return f"empty (shape {list(tensor.shape)})"
    return ""


def _describe_conversion(tensor: Tensor, model_tensor: Tensor) -> str:
    """The reason why the type of the model's tensor cannot hold the values; "" if there is none."""
    source_type, target_type = _short(tensor.dtype), _short(model_tensor.dtype)
    if model_tensor.is_floating_point() and not tensor.is_floating_point():
        return f"{source_type}, expected {target_type}"
    try:
        converted = tensor.to(model_tensor.dtype)
    except (NotImplementedError, RuntimeError):  # a type that torch can only store
        return f"{source_type}, which torch cannot convert to {target_type}"
    if model_tensor.is_floating_point():
        if bool(model_tensor.isfinite().all()) and not bool(converted.isfinite().all()):
            return f"not finite in {target_type} (NaN or Inf)"
        return ""
    if not torch.equal(converted.to(tensor.dtype), tensor):
        return f"{source_type} with values that {target_type} cannot hold"
    return ""


def _describe_variance(name: str, tensor: Tensor) -> str:
    """The reason why BatchNorm cannot take a tensor as variance; "" if there is none or it is not a variance."""
    is_variance = name.rpartition(".")[2] == "running_var"
    if is_variance and bool((tensor < 0).any()):
        return "negative, which a variance cannot be"
    return ""


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def load_plain(path: Path) -> Any:
    """The content of a checkpoint file, read without running code from it.

    Args:
        path: A file that `torch.save` wrote, or a `.safetensors` file.

    Raises:
        ModelError: It cannot be read in this way.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # torchvision's own training scripts keep their arguments in a Namespace, which is plain data.
            warnings.simplefilter("ignore")  # the error below says what is wrong with the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise anything, KeyError included
        raise ModelError(
            f"{path} is not a checkpoint of tensors only: found {_why_unreadable(path, error)}.",
            "save the weights alone with torch.save(model.state_dict(), FILE).",
        ) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """The reason why a file was refused, in a few words."""
    text = str(error)
    pickled_class = re.search(r"GLOBAL (\S+)", text)
    if pickled_class:
        return f"a pickled Python object ({pickled_class[1]}), which could run code when loaded"
    if "TorchScript" in text:
        return "a TorchScript archive"
    # Other errors name opcodes of the unpickler.
    if isinstance(error, RuntimeError | OSError | SafetensorError):
        return f"{describe_content(path)} ({first_line(error).split('. ')[0]})"
    return describe_content(path)


def describe_content(path: Path) -> str:
    """Describe an unreadable file: empty, text (with its beginning) or binary data."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file"
    try:
        # An incremental decoder accepts a last character that is cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return "unknown or damaged binary data"
    words = " ".join(text.split())
    if not words.isprintable():
        return "unknown or damaged binary data"
    return f"text beginning {words[:32]!r}"


def first_line(error: BaseException) -> str:
    """The reason that an exception gives, on one line; its type if it gives none."""
    text = str(error).strip().removeprefix("<urlopen error ").removesuffix(">")
    if not text:
        return type(error).__name__
    return text.splitlines()[0].rstrip(".")
