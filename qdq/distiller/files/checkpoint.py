"""`quantized_checkpoint.pth.tar`: a quantized model as tensors and plain data, from which it is built again.

`torch.load(weights_only=True)` reads it: no class is stored, and none is imported by a name in it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.distiller.files.checkpoint_tensors import require_finite, require_same
from qdq.distiller.files.plain import to_plain
from qdq.distiller.files.quantizer_classes import build_quantizer, takes_optimizer
from qdq.errors import DataError
from qdq.files import as_path, guard_files, write_atomic
from qdq.text import printable
from qdq.weights import is_state_dict, load_plain

FILE = "quantized_checkpoint.pth.tar"
_FIX = f"give a {FILE} that compress_classifier has written."


@dataclass(frozen=True)
class QuantizerMetadata:
    """What builds the quantized model from the float one.

    Args:
        type: Name of the quantizer's class.
        params: Its arguments, apart from the model and the optimizer.
        dummy_input: The batch that `prepare_model` needs; None if it needs none.
    """

    type: str
    params: Mapping[str, Any]
    dummy_input: Any = None


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The content of a checkpoint.

    Args:
        state_dict: Name -> tensor of the quantized model.
        metadata: How it was quantized.
        arch: Name of the network; None if it has none.
        dataset: Name of the data; None if it has none.
        epoch: Number of epochs that it was trained for.
        extras: More figures, such as `quantized_top1`, in per cent.
    """

    state_dict: Mapping[str, torch.Tensor]
    metadata: QuantizerMetadata
    arch: str | None = None
    dataset: str | None = None
    epoch: int = 0
    extras: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path | str, checkpoint: QuantizedCheckpoint) -> Path:
    """Write a checkpoint, atomically.

    Args:
        path: The file.
        checkpoint: Its content; tensors on any device.

    Raises:
        ArgumentError: It cannot be written.
        ArgumentTypeError: It holds values that are no plain data.
    """
    path = as_path(path, "path")
    guard_files(outputs=[path])
    metadata = checkpoint.metadata
    content = {
        "epoch": checkpoint.epoch,
        "state_dict": dict(checkpoint.state_dict),
        "arch": checkpoint.arch,
        "is_parallel": False,
        "dataset": checkpoint.dataset,
        "quantizer_metadata": {
            "type": metadata.type,
            "params": metadata.params,
            "dummy_input": metadata.dummy_input,
        },
        "extras": checkpoint.extras,
    }
    buffer = io.BytesIO()
    torch.save(to_plain(content, "checkpoint"), buffer)
    return write_atomic(path, buffer.getvalue())


def read_checkpoint(path: Path | str) -> QuantizedCheckpoint:
    """Read a checkpoint, with all tensors on the CPU.

    Args:
        path: A file that `save_checkpoint` has written.

    Raises:
        DataError: It is another kind of file.
        ModelError: It cannot be read without running code from it.
    """
    path = as_path(path, "path")
    content = load_plain(path)
    if not isinstance(content, Mapping) or not is_state_dict(content.get("state_dict")):
        raise DataError(f"{printable(path)} has no state_dict.", _FIX)
    metadata = content.get("quantizer_metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("params"), Mapping):
        raise DataError(
            f"{printable(path)} is not of a quantized model: it has no quantizer_metadata.", _FIX
        )
    return QuantizedCheckpoint(
        state_dict=content["state_dict"],
        metadata=QuantizerMetadata(
            type=str(metadata.get("type")),
            params=metadata["params"],
            dummy_input=metadata.get("dummy_input"),
        ),
        arch=content.get("arch"),
        dataset=content.get("dataset"),
        epoch=content.get("epoch", 0),
        extras=content.get("extras") or {},
    )


def rebuild_model(model: nn.Module, checkpoint: QuantizedCheckpoint) -> nn.Module:
    """Quantize a float model as the one in a checkpoint was, and give it the tensors of that one.

    Args:
        model: The float model, changed in place: the same network, with any weights.
        checkpoint: From `read_checkpoint`.

    Returns:
        The quantized model.

    Raises:
        ArgumentError: The checkpoint names an unknown class, or arguments with invalid values; or it has tensors with
            NaN or Inf, or scales that are not above 0.
        ArgumentTypeError: Unknown arguments.
        ModelError: The checkpoint is of another network.
        StateError: The model is quantized already.
    """
    metadata = checkpoint.metadata
    place = "the checkpoint"
    objects: dict[str, Any] = {}
    if takes_optimizer(metadata.type, place):
        objects["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.0)  # it takes no step
    quantizer = build_quantizer(metadata.type, model, metadata.params, place, **objects)
    quantizer.prepare_model(metadata.dummy_input)
    quantized: nn.Module = quantizer.model
    require_same(quantized.state_dict(), checkpoint.state_dict)
    require_finite(quantized.state_dict(), checkpoint.state_dict)
    quantized.load_state_dict(dict(checkpoint.state_dict))
    return quantized
