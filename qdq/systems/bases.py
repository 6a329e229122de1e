"""Several binary bases: a weight as a sum of binary ones (ABC-Net; Lin, Zhao, Pan: NIPS 2017, arXiv 1711.11294)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from qdq.forward import require_model
from qdq.systems.arithmetic import pass_gradient, require_batch, require_values, sign_of
from qdq.systems.binary import SMALLEST_SCALE
from qdq.systems.grid import INT8_HIGHEST, Grid, note_grid
from qdq.systems.layer import SystemLayer
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_count


def fit_bases(
    values: torch.Tensor, count: int, name: str = "fit_bases"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and bases of W ~ sum alpha_i * B_i, B_i = sign(W - mean + u_i * std) (arXiv 1711.11294, section 3.1.1).

    The u_i are evenly spaced from -1 to 1, and the alpha_i minimize the squared error.

    Args:
        values: A weight W.
        count: Number of bases; one has u = 0.
        name: Name of the weight, for messages.

    Returns:
        alpha, `[count]`, and the bases, `[count, ...]`, in float32.

    Raises:
        ArgumentError: As for `arithmetic.require_values`, or no base.
        NumberTypeError: Not a float tensor, or a count that is no integer.
    """
    require_values(values, name)
    require_count(count, "the number of bases", name, least=1)
    return _fit(values, count)


def _fit(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit_bases` for arguments that have been checked."""
    weight = values.detach().double()
    shifts = [0.0] if count == 1 else torch.linspace(-1, 1, count, dtype=torch.float64).tolist()
    centered = weight - weight.mean()
    deviation = weight.std(unbiased=False)  # 0, not NaN, for one element
    bases = torch.stack([sign_of(centered + shift * deviation) for shift in shifts])
    rows = bases.flatten(1)
    # The pseudo-inverse also solves the case of equal bases.
    factors = torch.linalg.pinv(rows @ rows.T, hermitian=True) @ (rows @ weight.flatten())
    return factors.float(), bases.float()


class BinaryBases(SystemQuantizer):
    """The sum of several binary bases; the gradient passes everywhere.

    Args:
        name: For messages.
        count: Number of bases.

    Raises:
        ArgumentError: No base.
        NumberTypeError: A count that is no integer.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__(name)
        require_count(count, "the number of bases", name, least=1)
        self.count = count

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The sum."""
        require_batch(values, self.label)
        factors, bases = _fit(values, self.count)
        return pass_gradient(values, torch.tensordot(factors, bases, 1).to(values.dtype))

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The range of the sum, whose values are no multiples of one scale."""
        assert values is not None  # noqa: S101  # a weight
        factors, _ = fit_bases(values, self.count, self.label)
        amax = factors.abs().sum().reshape(1)
        scale = (amax / INT8_HIGHEST).clamp_min(SMALLEST_SCALE)
        reason = f"are a sum of {self.count} binary bases, not one grid; split_bases keeps {self.count} layers"
        return Grid(
            "binary bases",
            scale,
            torch.zeros_like(scale),
            -INT8_HIGHEST,
            INT8_HIGHEST,
            amax=amax,
            on_request=reason,
        )


class SumOfLayers(nn.Module):
    """Layers with the same input, whose outputs are added.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the outputs."""
        first, *others = self.layers
        total: torch.Tensor = first(values)
        for layer in others:
            total = total + layer(values)
        return total


def split_bases(model: nn.Module) -> None:
    """Replace each layer with several binary bases by one layer for each base, in place; the first has the bias.

    Args:
        model: A model with layers that `convert_layer` gave `BinaryBases`.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SystemLayer) and isinstance(module.weight_system, BinaryBases):
            model.set_submodule(name, _split(module, module.weight_system))


def _split(layer: Any, system: BinaryBases) -> SumOfLayers:
    factors, bases = fit_bases(layer.weight, system.count, system.label)
    layers: list[nn.Module] = []
    for factor, base in zip(factors, bases, strict=True):
        part = copy.deepcopy(layer)
        part.weight_system = None
        with torch.no_grad():
            part.weight.copy_(factor * base)
        if layers and part.bias is not None:
            part.bias = None
        scale = factor.abs().reshape(1).clamp_min(SMALLEST_SCALE)
        note_grid(part, "weight", Grid("binary", scale, torch.zeros_like(scale), -1, 1))
        layers.append(part)
    return SumOfLayers(layers)
