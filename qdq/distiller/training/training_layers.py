"""Which layers and activations of a model are quantized in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdq.distiller.post_training.preparation import require_float
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.names import WEIGHTED
from qdq.errors import StateError, UnsupportedError
from qdq.forward import trace_forward
from qdq.functions import ACTIVATIONS
from qdq.systems.layer import SystemLayer, is_layer
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import FLOAT_BITS
from qdq.systems.unquantized import Unquantized

_ACTIVATIONS = (nn.ReLU, nn.ReLU6)
OTHER_ACTIVATION = "training quantizes the outputs of ReLU and ReLU6 alone"
_FUNCTION_CALL = "a function call; torch.nn.ReLU or modularize make modules of it"
_REPLICAS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class FakeQuantizationWrapper(nn.Module):
    """An activation and the quantizer of its output.

    Args:
        wrapped_module: The activation.
        fake_q: The quantizer.
    """

    def __init__(self, wrapped_module: nn.Module, fake_q: SystemQuantizer) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.fake_q = fake_q

    def forward(self, *inputs: torch.Tensor, **keywords: torch.Tensor) -> torch.Tensor:
        """The quantized output."""
        quantized: torch.Tensor = self.fake_q(self.wrapped_module(*inputs, **keywords))
        return quantized


def is_float(bits: int | None) -> bool:
    """Whether a number of bits means that nothing is quantized.

    Args:
        bits: The number; None is float.
    """
    return bits is None or bits == FLOAT_BITS


def require_untouched(model: nn.Module) -> None:
    """Refuse a model that is quantized, or wrapped for several devices.

    Raises:
        StateError: It is quantized.
        UnsupportedError: It is wrapped.
    """
    if isinstance(model, _REPLICAS):
        raise UnsupportedError(
            f"the model is wrapped in {type(model).__name__}, whose replicas lose moving ranges.",
            "quantize model.module.",
        )
    require_float(model)
    for name, module in model.named_modules():
        if isinstance(module, SystemLayer | SystemQuantizer):
            raise StateError(
                f"the model is quantized already: {name} is a {type(module).__name__}.",
                "prepare a float model, once.",
            )


def choose_layers(
    model: nn.Module, settings: Mapping[str, LayerSettings]
) -> tuple[dict[str, nn.Module], list[Unquantized]]:
    """The layers whose weight is quantized, and the others with the reason."""
    layers: dict[str, nn.Module] = {}
    entries = []
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        kind = type(module).__name__
        if name not in settings or is_float(settings[name].bits_weights):
            entries.append(Unquantized(name, kind, "its weight has no bits"))
        elif is_layer(module):
            layers[name] = module
        else:
            entries.append(Unquantized(name, kind, f"training does not quantize a {kind}"))
    return layers, entries


def choose_activations(
    model: nn.Module, settings: Mapping[str, LayerSettings]
) -> dict[str, nn.Module]:
    """The activations whose output is quantized."""
    activations = {}
    for name, module in model.named_modules():
        if type(module) in _ACTIVATIONS and not is_float(settings[name].bits_activations):
            activations[name] = module
    return activations


def list_float_activations(
    model: nn.Module, quantized: Mapping[str, nn.Module], dummy_input: Any
) -> list[Unquantized]:
    """The activations whose output stays float, with the reasons: modules, then calls in a forward.

    Args:
        model: The float model.
        quantized: From `choose_activations`.
        dummy_input: A batch, on which calls are found; None: modules alone are listed.
    """
    entries = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if _is_activation(module) and name not in quantized:
            kind = type(module).__name__
            is_taken = type(module) in _ACTIVATIONS
            reason = "its output has no bits" if is_taken else OTHER_ACTIVATION
            entries.append(Unquantized(name, kind, reason))
    operations = [] if dummy_input is None else trace_forward(model, dummy_input).operations
    for operation in operations:
        is_call = not _is_activation(modules[operation.module])
        if is_call and operation.function in ACTIVATIONS:
            entries.append(Unquantized(operation.name, operation.function, _FUNCTION_CALL))
    return entries


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of torch, or of a class that is derived from one."""
    kinds = {kind.__module__ for kind in type(module).__mro__}
    return nn.modules.activation.__name__ in kinds and next(module.children(), None) is None


def replace_everywhere(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Put a module in the place of another one, at all its names."""
    for name, candidate in list(model.named_modules(remove_duplicate=False)):
        if candidate is module:
            model.set_submodule(name, replacement)
