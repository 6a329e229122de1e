"""Layers of the systems that quantize in the forward: one quantizer for the weight, one for the input.

The float layer keeps its identity and its parameters: only its class changes. So the state dict holds the float weight,
which training changes; the quantized one is computed in every forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentTypeError, StateError, UnsupportedError
from qdq.systems.quantizer import SystemQuantizer, refuse_replica

_COMPUTED = "its weight is computed, which a quantized layer cannot replace"
_REMOVE = "remove the parametrization, for instance with torch.nn.utils.parametrize.remove_parametrizations."


class SystemLayer(nn.Module):
    """A convolution or linear layer whose weight, and whose input and bias if they have a quantizer, are quantized.

    Attributes:
        weight_system: Quantizer of the weight; None: the weight stays float.
        input_system: Quantizer of the input; None: the input stays float.
        bias_system: Quantizer of the bias; None: the bias stays float.
    """

    weight: torch.Tensor
    bias: Any  # a parameter, or None
    weight_system: SystemQuantizer | None
    input_system: SystemQuantizer | None
    bias_system: SystemQuantizer | None

    def forward(self, values: torch.Tensor, *args: Any) -> Any:
        """As the float layer.

        Raises:
            StateError: In a replica of `nn.DataParallel`; the weight is computed by a parametrization.
        """
        refuse_replica(self, self.label, "quantizes")
        if self.input_system is not None:
            values = self.input_system(values)
        quantized = self._quantize_parameters()
        # An attribute of the instance comes before the parameter, which is neither moved nor renamed.
        vars(self).update(quantized)
        try:
            return super().forward(values, *args)
        finally:
            for name in quantized:
                del vars(self)[name]

    def _quantize_parameters(self) -> dict[str, torch.Tensor]:
        quantized = {}
        if self.weight_system is not None:
            if "weight" not in self._parameters:
                raise StateError(f"{self.label}: {_COMPUTED}.", _REMOVE)
            quantized["weight"] = self.weight_system(self.weight)
        if self.bias_system is not None and self.bias is not None:
            quantized["bias"] = self.bias_system(self.bias)
        return quantized

    @property
    def label(self) -> str:
        """The layer, for messages."""
        quantizer = self.weight_system or self.input_system
        return type(self).__name__ if quantizer is None else quantizer.label


class SystemConv1d(SystemLayer, nn.Conv1d):
    """`nn.Conv1d` in a number system."""


class SystemConv2d(SystemLayer, nn.Conv2d):
    """`nn.Conv2d` in a number system."""


class SystemConv3d(SystemLayer, nn.Conv3d):
    """`nn.Conv3d` in a number system."""


class SystemLinear(SystemLayer, nn.Linear):
    """`nn.Linear` in a number system."""


_CLASSES: dict[type[nn.Module], type[SystemLayer]] = {
    nn.Conv1d: SystemConv1d,
    nn.Conv2d: SystemConv2d,
    nn.Conv3d: SystemConv3d,
    nn.Linear: SystemLinear,
}


def reason_against(layer: nn.Module) -> str:
    """Why a layer cannot become a `SystemLayer`; "" if it can, or is one.

    Args:
        layer: Any module. A subclass of a layer of torch may have another forward.
    """
    if not isinstance(layer, SystemLayer) and type(layer) not in _CLASSES:
        return f"no system has a {type(layer).__name__}"
    return "" if "weight" in layer._parameters else _COMPUTED


def is_layer(module: nn.Module) -> bool:
    """Whether a module can become a `SystemLayer`, and is none yet."""
    return not isinstance(module, SystemLayer) and not reason_against(module)


def convert_layer(
    layer: nn.Module,
    weight_system: SystemQuantizer | None,
    input_system: SystemQuantizer | None = None,
    bias_system: SystemQuantizer | None = None,
) -> SystemLayer:
    """Give a float layer its quantizers, in place.

    Args:
        layer: A layer for which `is_layer` is true, or one that was converted before; its quantizers are replaced.
        weight_system: Quantizer of the weight.
        input_system: Quantizer of the input.
        bias_system: Quantizer of the bias.

    Returns:
        The same object.

    Raises:
        ArgumentTypeError: A quantizer that is none.
        UnsupportedError: Another layer.
    """
    for system in (weight_system, input_system):
        if not isinstance(system, SystemQuantizer | None):
            raise ArgumentTypeError(
                f"convert_layer: a quantizer is of type {type(system).__name__}.",
                "give a quantizer of qdq.systems, such as BinaryWeight.",
            )
    reason = reason_against(layer)
    if reason:
        raise UnsupportedError(
            f"convert_layer: {reason}.",
            "give a Conv1d, Conv2d or Linear with a weight of its own.",
        )
    if not isinstance(layer, SystemLayer):
        layer.__class__ = _CLASSES[type(layer)]
        vars(layer)["_hook"] = layer.register_forward_pre_hook(_stay_as_called)
    converted: Any = layer
    systems = {"weight": weight_system, "input": input_system, "bias": bias_system}
    for tensor, system in systems.items():
        placed = None if system is None else system.to(converted.weight.device)
        setattr(converted, f"{tensor}_system", placed)
    return converted  # type: ignore[no-any-return]


def _stay_as_called(*_: Any) -> None:
    """A hook without effect: `nn.TransformerEncoderLayer` calls layers with a hook, and reads the weights of others."""


def restore_layer(layer: SystemLayer) -> None:
    """Undo `convert_layer`: the class of torch again and no quantizers; the weight keeps its current values.

    Args:
        layer: A converted layer.
    """
    vars(layer).pop("_hook").remove()
    del layer.weight_system
    del layer.input_system
    del layer.bias_system
    float_classes = {converted: original for original, converted in _CLASSES.items()}
    layer.__class__ = float_classes[type(layer)]  # type: ignore[assignment]
