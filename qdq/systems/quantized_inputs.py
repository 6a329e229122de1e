"""Quantizers at inputs of modules that have no weight, such as the shortcut of a sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qdq.device import find_device
from qdq.quantizer import TensorQuantizer
from qdq.systems.transfer import make_quantizer
from qdq.systems.unwrap import Unwrapped


class QuantizedInputs(nn.Module):
    """A module of several inputs, some of which are quantized.

    Args:
        module: The module.
        quantizers: Position of an input -> its quantizer.
    """

    def __init__(self, module: nn.Module, quantizers: Mapping[int, TensorQuantizer]) -> None:
        super().__init__()
        self.module = module
        self.positions = tuple(quantizers)
        self.quantizers = nn.ModuleList(quantizers.values())

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The output for the quantized inputs."""
        quantized = list(inputs)
        for position, quantizer in zip(self.positions, self.quantizers, strict=True):
            quantized[position] = quantizer(quantized[position])
        output: torch.Tensor = self.module(*quantized)
        return output


def quantize_inputs(model: nn.Module, unwrapped: Unwrapped) -> None:
    """Quantize the inputs of modules without a weight, in place.

    Args:
        model: A model whose verdicts allow it.
        unwrapped: Which inputs.
    """
    device = find_device(model)
    names = list(model.named_modules(remove_duplicate=False))
    for name, grids in unwrapped.inputs.items():
        module = model.get_submodule(name)
        quantizers = {index: make_quantizer(grid, None) for index, grid in grids.items()}
        replacement = QuantizedInputs(module, quantizers).to(device)
        for alias, other in names:
            if other is module:
                model.set_submodule(alias, replacement)
