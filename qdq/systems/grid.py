"""`Grid`: the values that a quantized tensor takes, by which `to_tensorrt` judges every system alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Verdict = Literal["exact", "convert", "refuse"]

INT8_LOWEST, INT8_HIGHEST = -128, 127
_MOST_TENSORRT_BITS = 8
_MOVING = "its range is recomputed for every batch"


@dataclass(frozen=True)
class Grid:
    """The values scale * (code - zero_point), for codes from `lowest` to `highest`.

    Args:
        system: Name of the number system, for messages: "fixed point", "min-max affine".
        scale: Float32, one element, or one for each output channel of a weight.
        zero_point: Likewise, in float32; all 0 for a symmetric system.
        lowest: The smallest code that can occur.
        highest: The largest code that can occur.
        obstacle: The property, with its value, for which no int8 Q/DQ can have these values, even converted: "values
            are powers of e", "16 bits". "" if there is none.
        amax: The range if it is converted: the largest absolute value, in the shape of `scale`; None: computed from
            scale, zero point and codes.
        on_request: A reason to ask before exporting, though the values fit, such as no gain; "" if there is none.
    """

    system: str
    scale: torch.Tensor
    zero_point: torch.Tensor
    lowest: int
    highest: int
    obstacle: str = ""
    amax: torch.Tensor | None = None
    on_request: str = ""


def describe_moving(system: str, bits: int, obstacle: str = _MOVING) -> Grid:
    """The grid of activations whose range is computed for each batch, which no constant scale has.

    Args:
        system: Name of the number system.
        bits: Width of a code.
        obstacle: As for `Grid`.
    """
    half = 2 ** (bits - 1)
    return Grid(system, torch.ones(1), torch.zeros(1), -half, half - 1, obstacle)


def name_width(bits: int) -> str:
    """The obstacle of codes that are wider than int8; "" if they are not."""
    return f"{bits} bits" if bits > _MOST_TENSORRT_BITS else ""


def note_grid(module: nn.Module, parameter: str, grid: Grid) -> None:
    """Remember the grid of a parameter whose values were replaced by quantized ones.

    It is an attribute, not a buffer: a state dict has the names and tensors that other tools expect. `grid_state` saves
    it beside that.

    Args:
        module: The layer.
        parameter: Name of its parameter.
        grid: The grid of its values.
    """
    vars(module).setdefault("_system_grids", {})[parameter] = grid


def find_grid(module: nn.Module, parameter: str) -> Grid | None:
    """The grid that `note_grid` has remembered; None if there is none.

    Args:
        module: The layer.
        parameter: Name of its parameter.
    """
    return list_grids(module).get(parameter)


def list_grids(module: nn.Module) -> dict[str, Grid]:
    """The grids that `note_grid` has remembered for a layer, by parameter.

    Args:
        module: The layer.
    """
    grids: dict[str, Grid] = vars(module).get("_system_grids", {})
    return grids


def forget_grids(module: nn.Module) -> None:
    """Undo `note_grid` for all parameters of a layer.

    Args:
        module: The layer.
    """
    vars(module).pop("_system_grids", None)
