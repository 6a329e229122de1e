"""What a measurement depends on, so that a journal gives none of another model, data or units."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qdq.calibrate.collect import bytes_of
from qdq.forward import trace_forward
from qdq.quantizer import named_quantizers
from qdq.units import Unit

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
)  # arguments that print the same in every process


def fingerprint_analysis(
    model: nn.Module, batches: Sequence[Any], metric: str, units: Sequence[Unit]
) -> str:
    """What the measurements of an analysis depend on, in 16 hexadecimal digits.

    Args:
        model: The model as it is, with its float layers switched off.
        batches: All of them.
        metric: Name of what ranks.
        units: What is measured.
    """
    digest = hashlib.sha256(f"{torch.__version__} {metric}".encode())
    for name, tensor in model.state_dict().items():
        _feed(digest, name, tensor)
    for name, quantizer in named_quantizers(model):
        digest.update(f"{name} {not quantizer.is_enabled} {quantizer.format}".encode())
    for operation in trace_forward(model, batches[0]).operations:
        arguments = {
            key: repr([leaf for leaf in tree_leaves(value) if isinstance(leaf, _PLAIN)])
            for key, value in operation.arguments.items()
        }
        digest.update(
            f"{operation.name} {operation.inputs} {operation.outputs} {arguments}".encode()
        )
    for leaf in tree_leaves(batches):
        _feed(digest, "batch", leaf)
    digest.update(repr([(unit.name, unit.layers, unit.calls) for unit in units]).encode())
    return digest.hexdigest()[:16]


def _feed(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode())
    elif value.numel():
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
