"""Devices: where a model runs, batches on their way there, and float32 without TF32.

The rule for batches: every stage moves them to the device of the model.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from qdq.batch import map_tensors, tensors_of
from qdq.errors import ArgumentError

logger = logging.getLogger(__name__)

_DEVICE_NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]{0,5}))?", re.ASCII)
_CONV_PRECISION: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_RNN_PRECISION: Any = torch.backends.cudnn.rnn
_MATMUL_PRECISION: Any = torch.backends.cuda.matmul
_CPU_MATMUL_PRECISION: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def choose_device(name: str | None = None) -> torch.device:
    """The device to run on.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one. Under torchrun, "cuda" and None mean the GPU of
            the local rank, or the only one that this process sees.

    Raises:
        ArgumentError: Another name, a GPU that is not there, or a local rank that is no number.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if num_gpus else "cpu"
    match = _DEVICE_NAME.fullmatch(name)
    if match is None:
        raise ArgumentError(
            f"device is {name!r}; expected cpu, cuda or cuda:N.", "name one of those."
        )
    if name == "cpu":
        return torch.device("cpu")
    index = _read_local_rank(num_gpus) if match[1] is None else int(match[1])
    if index >= num_gpus:
        raise ArgumentError(
            f"device is cuda:{index}; torch finds GPUs: {num_gpus}.",
            "choose another one, or device cpu; nvidia-smi lists the GPUs, and torch needs a build for CUDA.",
        )
    return torch.device("cuda", index)


def _read_local_rank(num_gpus: int) -> int:
    """The number of the GPU of this process, 0 without torchrun.

    Raises:
        ArgumentError: The environment has no number there.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdecimal():
        raise ArgumentError(
            f"the environment variable LOCAL_RANK is {text!r}; expected a number.",
            "start the script with torchrun, or unset LOCAL_RANK.",
        )
    # Some launchers show each process its own GPU alone.
    return 0 if num_gpus == 1 else int(text)


def describe_device(device: torch.device) -> str:
    """The device in words; of a GPU its name, and that qdq switches TF32 off (`without_tf32`).

    Args:
        device: Any device.
    """
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}), TF32 off while qdq measures"


def find_sm(device: torch.device) -> int | None:
    """Compute capability of a GPU, 89 for 8.9; None for any other device.

    Args:
        device: Any device.
    """
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def find_device(model: nn.Module) -> torch.device:
    """The device of the first parameter of a model, or else of its first buffer; the CPU if it has neither.

    A tensor on "meta" counts only if all are there: some hooks load the values of a layer when it runs.

    Args:
        model: Any module.
    """
    device = None
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        device = tensor.device
        if device.type != "meta":
            break
    return device or torch.device("cpu")


def move_batch(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; the batch itself if they are there.

    Args:
        batch: As for `batch.list_leaves`.
        device: The device.
    """
    if all(tensor.device == device for tensor in tensors_of(batch)):
        return batch

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=device.type != "cpu")

    return map_tensors(move, batch)


def copy_to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the CPU; each device is waited for once, however many tensors there are.

    Args:
        tensors: Tensors of any types, shapes and devices. Those on the CPU are returned as they are.
    """
    copies = list(tensors)
    indices: defaultdict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            indices[tensor.device].append(index)
    for group in indices.values():
        if len(group) == 1:  # without a second copy of it on the device
            copies[group[0]] = tensors[group[0]].detach().cpu()
            continue
        parts = [tensors[index].detach().reshape(-1).view(torch.uint8) for index in group]
        packed = torch.cat(parts).cpu()
        on_host = torch.split(packed, [part.numel() for part in parts])
        for index, part in zip(group, on_host, strict=True):
            tensor = tensors[index]
            aligned = part.clone()
            copies[index] = aligned.view(tensor.dtype).reshape(tensor.shape)
    return copies


@contextmanager
def on_host(model: nn.Module) -> Iterator[None]:
    """Give a model copies of its tensors on the CPU in the block; the tensors themselves stay as they are.

    All modules, hooks and wrappers of the model stay in place, which a copy of the model would not promise.

    Args:
        model: Any module. Attributes that are tensors or devices count, also in lists and dictionaries. Meta tensors
            are left out.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not _is_elsewhere(value):
            return value
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if id(value) not in copies:
            copies[id(value)] = _copy_tensor_to_host(value)
        return copies[id(value)]

    with ExitStack() as exits:
        for module in model.modules():
            attributes = vars(module)
            for name, value in list(attributes.items()):
                if any(map(_is_elsewhere, tree_leaves(value))):
                    exits.callback(attributes.__setitem__, name, value)
                    attributes[name] = tree_map(copy, value)
        yield


def _is_elsewhere(value: Any) -> bool:
    """Whether a value is a tensor or a device that is not the CPU and that holds data."""
    if isinstance(value, torch.device):
        return value.type not in ("cpu", "meta")
    return isinstance(value, torch.Tensor) and _is_elsewhere(value.device)


def _copy_tensor_to_host(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().cpu()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def read_numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The values of tensors of one element, in one transfer from their device.

    Args:
        tensors: Any number of tensors, of one device or of several.
    """
    if not tensors:
        return []
    device = tensors[0].device
    numbers = [tensor.detach().reshape(()).to(device, torch.float64) for tensor in tensors]
    return list(torch.stack(numbers).tolist())


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in float32 in the block, also on a GPU.

    By default, cuDNN rounds the inputs of a float32 convolution to TF32, which has 10 bits of mantissa. This error is
    as large as one of int8, so what measures one of int8, or whether two models are equal, runs without TF32. On the
    CPU, `torch.set_float32_matmul_precision` may allow bfloat16, which goes likewise.
    torch keeps the setting twice, in an older and a newer form. This sets both, and restores them.
    """
    older_conv = _read_older(lambda: torch.backends.cudnn.allow_tf32)
    older_matmul = _read_older(torch.get_float32_matmul_precision)
    settings = _CONV_PRECISION, _RNN_PRECISION, _MATMUL_PRECISION, _CPU_MATMUL_PRECISION
    newer = [setting.fp32_precision for setting in settings]
    if "tf32" in newer:
        _tell_once()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for setting in settings:
        setting.fp32_precision = "ieee"  # not what torch.backends.fp32_precision says for all
    try:
        yield
    finally:
        if older_conv is not None:
            torch.backends.cudnn.allow_tf32 = older_conv
        if older_matmul is not None:
            torch.set_float32_matmul_precision(older_matmul)
        for setting, precision in zip(settings, newer, strict=True):
            setting.fp32_precision = precision


def _read_older(read: Any) -> Any:
    """A setting in its older form; None if the newer form says something else, where torch raises."""
    try:
        return read()
    except RuntimeError:
        return None


@functools.cache
def _tell_once() -> None:
    logger.info("TF32 is off while qdq measures and calibrates; elsewhere it stays as it is.")
