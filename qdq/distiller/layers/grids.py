"""What `qdq.systems.to_tensorrt` asks of a layer: the grids of its tensors, and what of them TensorRT has not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qdq.distiller.ranges.linear_params import LinearParams
from qdq.errors import StateError
from qdq.systems.grid import Grid

if TYPE_CHECKING:
    from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper

_DYNAMIC = "have a range of their own in each batch (dynamic)"
_SEVERAL = "come from several layers, with scales of their own: give each call a copy of the layer, and quantize again"
_TENSORRT_ACCUM_BITS = 32


def describe_params(params: LinearParams) -> Grid:
    """The grid of a tensor.

    Args:
        params: Its scale and zero point.
    """
    return params.describe(f"range-linear {params.mode.name}")


def describe_input(layer: RangeLinearQuantWrapper, index: int) -> Grid:
    """The grid of what arrives at an input; one with an obstacle in dynamic mode.

    Args:
        layer: A layer that has run.
        index: Position of the input.

    Raises:
        StateError: It has not run.
    """
    if index not in layer.sources.keys() | layer.state_inputs:
        raise StateError(
            f"{layer.label} has not run: what arrives at it is not known.",
            "run the model once on any batch.",
        )
    obstacle = _DYNAMIC if not layer.is_static else ""
    obstacle = _SEVERAL if layer.has_several_sources else obstacle
    if obstacle:
        system = f"range-linear {layer.settings.mode.activations.name}"
        return Grid(system, torch.ones(1), torch.zeros(1), 0, 0, obstacle)
    source = layer.sources.get(index)
    if source is None:
        return describe_params(layer.input_params[index])
    grid = source.describe_output()
    assert grid is not None  # noqa: S101  # a layer that gives scales is static and has one
    return grid


def mark_accumulators(grid: Grid, bits_accum: int) -> Grid:
    """The grid of a weight; with an obstacle if the sums are narrower than those of TensorRT.

    Args:
        grid: The grid.
        bits_accum: Width of the sums.
    """
    if bits_accum >= _TENSORRT_ACCUM_BITS or grid.obstacle:
        return grid
    obstacle = f"have sums that are clamped to {bits_accum} bits, and those of TensorRT have 32"
    return replace(grid, obstacle=obstacle)
