"""Fingerprint of an analysis, so that a journal is not used for another model, other data or other units."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qdq.batch import list_leaves
from qdq.calibrate.collect import bytes_of
from qdq.forward import ForwardTrace, Operation
from qdq.quantizer import named_quantizers
from qdq.units import Unit

_PRINTABLE = (bool, int, float, complex, str, torch.dtype)  # print the same in every process


def fingerprint_analysis(
    model: nn.Module,
    trace: ForwardTrace,
    batches: Sequence[Any],
    metric: str,
    units: Sequence[Unit],
) -> str:
    """A hash of everything that the measurements of an analysis depend on, 16 hexadecimal digits.

    Args:
        model: The model in the state of the analysis, with its float layers switched off.
        trace: The record of a float forward.
        batches: All batches.
        metric: Name of the metric that ranks.
        units: The units that are measured.
    """
    digest = hashlib.sha256(f"{torch.__version__} {metric}".encode())
    for name, tensor in model.state_dict().items():
        _feed(digest, name, tensor)
    for name, quantizer in named_quantizers(model):
        digest.update(f"{name} {quantizer.extra_repr()}".encode())

    for operation in trace.operations:
        digest.update(_describe(operation).encode())
    for leaf in list_leaves(list(batches)):
        _feed(digest, "batch", leaf)
    members = [(unit.name, unit.layers, unit.calls) for unit in units]
    digest.update(repr(members).encode())
    return digest.hexdigest()[:16]


def _describe(operation: Operation) -> str:
    """Name, tensors and arguments of a function call, as text."""
    arguments = {}
    for key, value in operation.arguments.items():
        constants = [leaf for leaf in tree_leaves(value) if isinstance(leaf, _PRINTABLE)]
        arguments[key] = repr(constants)
    return f"{operation.name} {operation.inputs} {operation.outputs} {arguments}"


def _feed(digest: Any, name: str, value: Any) -> None:
    """Add a named value to a digest: the bytes of a tensor, or the text of anything else."""
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode())
    elif value.numel():
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
