"""`restore_float`: the way back from a frozen network to float layers, which `to_tensorrt` needs."""

from __future__ import annotations

import torch
from torch import nn

from qdq.errors import StateError
from qdq.systems.grid import Grid
from qdq.systems.integer_layers import QConvBNReLU
from qdq.systems.integer_weighted import QWeighted


@torch.no_grad()
def restore_float(model: nn.Module) -> dict[nn.Module, dict[str, Grid]]:
    """Put the quantized weights of a frozen network into its float layers, in place.

    The float forward of the model then computes with them, and its integer layers are of no more use. A BatchNorm that
    was folded becomes neutral.

    Args:
        model: A frozen network.

    Returns:
        Float layer -> grids of its "input", "weight" and "output".

    Raises:
        StateError: A layer is not frozen.
    """
    qlayers = [module for module in model.modules() if isinstance(module, QWeighted)]
    for qlayer in qlayers:
        if not qlayer.is_frozen:
            raise StateError(f"{qlayer.label}: it is not frozen.", "calibrate and freeze it.")
    grids: dict[nn.Module, dict[str, Grid]] = {}
    for qlayer in qlayers:
        layer = qlayer.layer
        grids[layer] = qlayer.grids()
        weight, bias = qlayer.read_parameters()
        qlayer.is_frozen = False
        qlayer.M = qlayer.M.new_empty(0)
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        if isinstance(qlayer, QConvBNReLU):
            _neutralize(qlayer.bn_module)
    return grids


def _neutralize(batchnorm: nn.BatchNorm2d) -> None:
    """Make a BatchNorm return its input."""
    batchnorm.reset_running_stats()
    assert batchnorm.running_var is not None  # noqa: S101
    batchnorm.running_var.sub_(batchnorm.eps)
    if batchnorm.affine:
        batchnorm.weight.fill_(1)
        batchnorm.bias.fill_(0)
