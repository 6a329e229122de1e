"""The tensors of a checkpoint beside those of the model that shall have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qdq.errors import ArgumentError, ModelError
from qdq.text import list_names, printable

_SHOWN = 3
_SCALES = ("output_scale", "w_scale", "accum_scale", "weight_scale", "bias_scale")


def require_same(present: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that differ from those of the model in names or shapes.

    Args:
        present: Name -> tensor of the model.
        saved: Name -> tensor of the checkpoint.

    Raises:
        ModelError: The message names the first of them.
    """
    flaws = []
    for name in dict.fromkeys([*present, *saved]):
        shape, saved_shape = _describe_shape(present.get(name)), _describe_shape(saved.get(name))
        if shape != saved_shape:
            flaws.append(
                f"{printable(name)} is {saved_shape} in the checkpoint, {shape} in the model"
            )
    if flaws:
        raise ModelError(
            f"the checkpoint is of another network: {list_names(flaws, _SHOWN, '; ')}.",
            "build the float model as it was before it was quantized.",
        )


def require_finite(present: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Refuse NaN and Inf in tensors that are finite in the model (masks may not be), and scales of 0 or below.

    Args:
        present: Name -> tensor of the model.
        saved: Name -> tensor of the checkpoint.

    Raises:
        ArgumentError: The message names the first of them.
    """
    flaws = []
    for name, tensor in saved.items():
        if tensor.is_floating_point() and bool(present[name].isfinite().all()):
            is_wrong = ~tensor.isfinite()
            if name.rpartition(".")[2] in _SCALES:
                is_wrong |= tensor <= 0
            if bool(is_wrong.any()):
                flaws.append(f"{printable(name)} has {float(tensor[is_wrong][0])}")
    if flaws:
        raise ArgumentError(
            f"the checkpoint has numbers that no layer has: {list_names(flaws, _SHOWN, '; ')}.",
            "write it again, from a model whose weights and ranges are finite.",
        )


def _describe_shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
