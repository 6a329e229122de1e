"""Tensors of a checkpoint file: found in its containers, and refused where a model cannot take them as they are."""

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
# Where training scripts put the state_dict. Averaged weights are used where there are no others.
_NESTED_UNDER = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")
_DEEPEST = 8  # containers in each other; one may also contain itself


def read_checkpoint(path: Path) -> tuple[StateDict, str]:
    """The state_dict in a file, and in words where it was found.

    Args:
        path: What `torch.save` wrote, or a `.safetensors` file.

    Raises:
        ModelError: Not a checkpoint, one that needs code to be loaded, or one without a state_dict.
    """
    content, place = _load_file(path), ""
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping) or is_state_dict(content):
            break
        nested = (
            key for key in _NESTED_UNDER if isinstance(content.get(key), Mapping) and content[key]
        )
        key = next(nested, None)
        if key is None:
            break
        content, place = content[key], f"{place}[{key}]"
    if not is_state_dict(content):
        keys = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else ""
        where = f" under {place}" if place else ""
        what = f"a {type(content).__name__}" + (f" with the keys {keys}" if keys else "") + where
        raise ModelError(
            f"{path} holds no state_dict: found {what}, expected names and tensors, alone or under one of "
            f"{', '.join(_NESTED_UNDER)}.",
            "save the weights with torch.save(model.state_dict(), FILE).",
        )
    return content, f"checkpoint {path}{place}"


def is_state_dict(content: Any) -> bool:
    """Whether something is names and tensors, and at least one."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
        )
    )


def require_plain(state: StateDict, source: str) -> None:
    """Refuse tensors without values that a layer could take: sparse, nested, meta, quantized, complex or empty ones.

    Args:
        state: The tensors.
        source: Where they come from, in words.

    Raises:
        ModelError: With the first of them and what they are.
    """
    _refuse({name: _describe_storage(tensor) for name, tensor in state.items()}, source)


def require_convertible(state: StateDict, own: StateDict, source: str) -> None:
    """Refuse tensors whose values would not be the same in the model.

    Floats may be rounded to the model's type and must stay finite, if the model's own are. Integers and flags are no
    floats, whatever their values; a counter may be stored in any type that holds it exactly.

    Args:
        state: Plain tensors.
        own: Those of the model; names that only one of both has are passed over.
        source: Where they come from, in words.

    Raises:
        ModelError: With the first of them and what they are.
    """
    flaws = {
        name: _describe_conversion(tensor, own[name]) or _describe_variance(name, tensor)
        for name, tensor in state.items()
        if name in own
    }
    _refuse(flaws, source)


def _refuse(flaws: Mapping[str, str], source: str) -> None:
    flawed = [f"{name} is {flaw}" for name, flaw in flaws.items() if flaw]
    if flawed:
        raise ModelError(
            f"{source} cannot be loaded: {list_names(flawed, _SHOWN)}.",
            "save the weights of the float model: dense, finite floating-point tensors with values, on the CPU.",
        )


def _describe_storage(tensor: Tensor) -> str:
    """Why a tensor has no values that a layer could take; "" if it has."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"no dense tensor ({_short(tensor.layout)})"
    if tensor.device.type == "meta":
        return "a meta tensor: a shape without values"
    if tensor.is_quantized:
        return f"quantized ({_short(tensor.dtype)})"
    if tensor.is_complex():
        return f"complex ({_short(tensor.dtype)})"
    if tensor.numel() == 0:
        return f"empty (shape {list(tensor.shape)})"
    return ""


def _describe_conversion(tensor: Tensor, own: Tensor) -> str:
    """Why a tensor does not keep its values in the type of another; "" if it does."""
    if own.is_floating_point() and not tensor.is_floating_point():
        return f"{_short(tensor.dtype)}, expected {_short(own.dtype)}"
    try:
        converted = tensor.to(own.dtype)
    except (NotImplementedError, RuntimeError):  # types of which torch knows the storage alone
        return f"{_short(tensor.dtype)}, which torch cannot convert to {_short(own.dtype)}"
    if own.is_floating_point():
        is_lost = bool(own.isfinite().all()) and not bool(converted.isfinite().all())
        return f"not finite in {_short(own.dtype)} (NaN or Inf)" if is_lost else ""
    is_exact = torch.equal(converted.to(tensor.dtype), tensor)
    return (
        ""
        if is_exact
        else f"{_short(tensor.dtype)} with values that {_short(own.dtype)} cannot hold"
    )


def _describe_variance(name: str, tensor: Tensor) -> str:
    """Why a tensor is no variance where BatchNorm takes its root; "" if it is, or stands elsewhere."""
    is_negative = name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any())
    return "negative: no variance is" if is_negative else ""


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _load_file(path: Path) -> Any:
    """What a checkpoint file holds, without running code.

    Raises:
        ModelError: It cannot be read so.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # The Namespace is where torchvision's own training scripts keep their arguments: plain data.
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise anything, KeyError included
        raise ModelError(
            f"{path} is not a checkpoint of tensors only: found {_why_unreadable(path, error)}.",
            "save the weights alone with torch.save(model.state_dict(), FILE).",
        ) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Why a file was refused, in a few words."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"a pickled Python object ({refused[1]}), which could run code when loaded"
    if "TorchScript" in text:
        return "a TorchScript archive"
    if isinstance(
        error, RuntimeError | OSError | SafetensorError
    ):  # the others name opcodes of the unpickler
        return f"{describe_content(path)} ({first_line(error).split('. ')[0]})"
    return describe_content(path)


def describe_content(path: Path) -> str:
    """In words what an unreadable file holds: nothing, text (with its beginning) or something binary."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(
            start
        )  # the last character may be cut in two
    except UnicodeDecodeError:
        return "unknown or damaged binary data"
    words = " ".join(text.split())
    return (
        f"text beginning {words[:32]!r}"
        if words.isprintable()
        else "unknown or damaged binary data"
    )


def first_line(error: BaseException) -> str:
    """The reason that an exception gives, on one line."""
    text = str(error).strip().removeprefix("<urlopen error ").removesuffix(">")
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
