"""Layers of the systems that quantize in the forward: one quantizer for the weight, one for the input.

The float layer keeps its identity and its parameters: only its class changes. So the state dict holds the float weight,
which training changes; the quantized one is computed in every forward.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from qdq.systems.grid import Grid


class SystemQuantizer(nn.Module):
    """Quantizes one tensor by the rule of a system; its state, if it has any, is in buffers."""

    is_foreign_quantizer = True
    """Tells `export_onnx` that this is no quantizer of its own."""

    @abstractmethod
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values, in shape, type and device of the values, with a gradient."""

    @abstractmethod
    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the quantized values.

        Args:
            values: The float weight; None for an input, whose grid is in the state of the quantizer.

        Raises:
            StateError: Not calibrated.
        """


class SystemLayer(nn.Module):
    """A convolution or linear layer whose weight, and whose input if it has a quantizer, are quantized.

    Attributes:
        weight_system: Quantizer of the weight; None: the weight stays float.
        input_system: Quantizer of the input; None: the input stays float.
    """

    weight: torch.Tensor
    weight_system: SystemQuantizer | None
    input_system: SystemQuantizer | None

    def forward(self, values: torch.Tensor, *args: Any) -> Any:
        """As the float layer."""
        if self.input_system is not None:
            values = self.input_system(values)
        if self.weight_system is None:
            return super().forward(values, *args)
        # An attribute of the instance comes before the parameter, which is neither moved nor renamed.
        vars(self)["weight"] = self.weight_system(self.weight)
        try:
            return super().forward(values, *args)
        finally:
            del vars(self)["weight"]


class SystemConv1d(SystemLayer, nn.Conv1d):
    """`nn.Conv1d` in a number system."""


class SystemConv2d(SystemLayer, nn.Conv2d):
    """`nn.Conv2d` in a number system."""


class SystemLinear(SystemLayer, nn.Linear):
    """`nn.Linear` in a number system."""


_CLASSES: dict[type[nn.Module], type[SystemLayer]] = {
    nn.Conv1d: SystemConv1d,
    nn.Conv2d: SystemConv2d,
    nn.Linear: SystemLinear,
}


def is_layer(module: nn.Module) -> bool:
    """Whether a module can become a `SystemLayer`: exactly a class of torch, no subclass with another forward."""
    return type(module) in _CLASSES


def convert_layer(
    layer: nn.Module,
    weight_system: SystemQuantizer | None,
    input_system: SystemQuantizer | None = None,
) -> SystemLayer:
    """Give a float layer its quantizers, in place.

    Args:
        layer: A layer for which `is_layer` is true, or one that was converted before; its quantizers are replaced.
        weight_system: Quantizer of the weight.
        input_system: Quantizer of the input.

    Returns:
        The same object.
    """
    if not isinstance(layer, SystemLayer):
        layer.__class__ = _CLASSES[type(layer)]
    converted: Any = layer
    device = converted.weight.device
    converted.weight_system = None if weight_system is None else weight_system.to(device)
    converted.input_system = None if input_system is None else input_system.to(device)
    return converted  # type: ignore[no-any-return]


def restore_layer(layer: SystemLayer) -> None:
    """Undo `convert_layer`: the class of torch again and no quantizers; the weight keeps its current values.

    Args:
        layer: A converted layer.
    """
    del layer.weight_system
    del layer.input_system
    float_classes = {converted: original for original, converted in _CLASSES.items()}
    layer.__class__ = float_classes[type(layer)]  # type: ignore[assignment]
