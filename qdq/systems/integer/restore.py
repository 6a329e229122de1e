"""`restore_float`: the way back from a frozen network to float layers, from which it is exported."""

from __future__ import annotations

import torch
from torch import nn

from qdq.errors import StateError
from qdq.systems.grid import note_grid
from qdq.systems.integer.layers import QConvBNReLU
from qdq.systems.integer.module import QModule
from qdq.systems.integer.network import IntegerNetwork
from qdq.systems.integer.weighted import QWeighted


@torch.no_grad()
def restore_float(model: nn.Module) -> list[nn.Module]:
    """Put the quantized weights of a frozen network into its float layers, and remove the integer layers; in place.

    The float forward of the model then computes with these weights. A BatchNorm that was folded is `nn.Identity`. The
    layers remember the grids of "weight" and "input" (`grid.find_grid`).

    Args:
        model: A frozen network.

    Returns:
        The float layers.

    Raises:
        StateError: A layer is not frozen, or there is none.
    """
    qlayers = [module for module in model.modules() if isinstance(module, QWeighted)]
    if not qlayers:
        raise StateError("the model has no integer layer.", "call quantize, calibrate and freeze.")
    for qlayer in qlayers:
        qlayer.require_frozen()
    folded = set()
    for qlayer in qlayers:
        grids = qlayer.grids()
        weight, bias = read_parameters(qlayer)
        qlayer.layer.weight = nn.Parameter(weight)
        qlayer.layer.bias = None if bias is None else nn.Parameter(bias)
        note_grid(qlayer.layer, "weight", grids["weight"])
        note_grid(qlayer.layer, "input", grids["input"])
        if isinstance(qlayer, QConvBNReLU):
            folded.add(qlayer.bn_module)
    _remove(model, folded)
    return [qlayer.layer for qlayer in qlayers]


def read_parameters(qlayer: QWeighted) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of a frozen layer as floats.

    Args:
        qlayer: The layer.
    """
    codes, bias = qlayer.layer.weight, qlayer.layer.bias
    weight = codes * qlayer.qw.spread(qlayer.qw.scale, codes)
    return weight, None if bias is None else (bias * qlayer.bias_scale()).float()


def _remove(model: nn.Module, folded: set[nn.BatchNorm2d]) -> None:
    """Remove the integer layers, and replace each folded BatchNorm by `nn.Identity`."""
    for parent in list(model.modules()):
        if isinstance(parent, IntegerNetwork):
            del parent.qlayers
        for name, child in list(parent._modules.items()):
            if isinstance(child, QModule):
                del parent._modules[name]
            elif child in folded:
                parent._modules[name] = nn.Identity()
