"""The grids of replaced weights as plain data, which is saved beside a state dict and put into a new float model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentError
from qdq.forward import require_model
from qdq.systems.grid import Grid, list_grids, note_grid

_FIX = "give what pack_grids has returned for a model of the same layers."
_TYPES: dict[str, type | tuple[type, ...]] = {
    "system": str,
    "scale": torch.Tensor,
    "zero_point": torch.Tensor,
    "lowest": int,
    "highest": int,
    "obstacle": str,
    "amax": (torch.Tensor, type(None)),
    "on_request": str,
}


def pack_grids(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The grids of all weights that were replaced by quantized values, to be saved beside the state dict.

    Args:
        model: A model after `train_ternary`, `train_incremental`, `replace_weights`, `quantize_parameters`,
            `split_bases` or `restore_float`.

    Returns:
        Dotted name of a parameter, or of a layer and "input" -> the fields of its grid: strings, numbers and tensors,
        which `torch.load(weights_only=True)` reads.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    packed = {}
    for name, module in model.named_modules():
        for tensor, grid in list_grids(module).items():
            path = f"{name}.{tensor}" if name else tensor
            packed[path] = {field.name: getattr(grid, field.name) for field in fields(Grid)}
    return packed


def unpack_grids(model: nn.Module, packed: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a float model know the grids of its weights, after `load_state_dict`; of all, or if one is wrong of none.

    Args:
        model: A float model of the same layers.
        packed: As `pack_grids` has returned it.

    Raises:
        ArgumentError: It names a layer or parameter that the model lacks, or is not such data.
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    if not isinstance(packed, Mapping):
        raise ArgumentError(f"unpack_grids: the grids are a {type(packed).__name__}.", _FIX)
    modules = dict(model.named_modules())
    grids = []
    for path, values in packed.items():
        name, _, tensor = str(path).rpartition(".")
        module = modules.get(name)
        if module is None or not (tensor == "input" or tensor in module._parameters):
            raise ArgumentError(f"unpack_grids: the model has no {path}.", _FIX)
        grid = _read_grid(path, values)
        _require_channels(path, grid, module._parameters.get(tensor))
        grids.append((module, tensor, grid))
    for module, tensor, grid in grids:
        note_grid(module, tensor, grid)


def _read_grid(path: str, values: Any) -> Grid:
    is_complete = isinstance(values, Mapping) and set(values) == set(_TYPES)
    if not is_complete or not all(isinstance(values[name], _TYPES[name]) for name in _TYPES):
        raise ArgumentError(f"unpack_grids: the entry of {path} is no grid.", _FIX)
    return Grid(**values)


def _require_channels(path: str, grid: Grid, parameter: torch.Tensor | None) -> None:
    num_channels = 1 if parameter is None or not parameter.dim() else len(parameter)
    if grid.scale.numel() not in (1, num_channels) or grid.zero_point.shape != grid.scale.shape:
        raise ArgumentError(
            f"unpack_grids: the grid of {path} has {grid.scale.numel()} scales, the tensor {num_channels} channels.",
            _FIX,
        )
