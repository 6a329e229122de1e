"""`duplicate_model_with_quant`: a quantizer after each layer that stands in an `nn.Sequential`."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import nn

from qdq.device import find_device
from qdq.errors import StateError
from qdq.forward import join_name, require_model
from qdq.systems.counting import LinearQuant
from qdq.systems.normal import NormalQuant
from qdq.systems.parameters import FUNCTIONS, QuantMethod
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.sequential import runs_children_in_order
from qdq.systems.settings import require_bits, require_choice, require_count, require_rate
from qdq.systems.unquantized import QUANTIZED_LAYERS, list_unquantized

logger = logging.getLogger(__name__)


def duplicate_model_with_quant(
    model: nn.Module,
    bits: int,
    overflow_rate: float = 0.0,
    counter: int = 10,
    type: QuantMethod = "linear",
) -> nn.Module:
    """Put a quantizer after each layer that stands in an `nn.Sequential`.

    These layers are Conv2d, Linear, BatchNorm1d, BatchNorm2d and AvgPool2d. The quantizer of child `k` is
    `k_<type>_quant`. Other layers and the sums and concatenations of a forward get nothing; a warning lists them, as
    `list_unquantized` does. Each Sequential becomes a copy of the same class, with the same layers; other containers
    change in place. A subclass whose own forward picks its children by name or number gets nothing either.

    Args:
        model: A float model; quantize its parameters before (`quantize_parameters`).
        bits: Width of a code.
        overflow_rate: Fraction of the elements of a batch that may saturate ("linear").
        counter: Number of forward calls that calibrate ("linear"). A module that is called twice in a forward has one
            quantizer, which counts twice.
        type: "linear" (fixed point with one scale), or "minmax", "log" or "tanh", which are computed for every batch.

    Returns:
        The model: a copy if it is a Sequential, otherwise the same object.

    Raises:
        ArgumentError: An unknown type, or a number out of range.
        ArgumentTypeError: Not a module.
        NumberTypeError: A number of the wrong type.
        StateError: The model has quantizers already.
    """
    require_model(model)
    require_choice(type, get_args(QuantMethod), "type", "duplicate_model_with_quant")
    require_bits(bits, "duplicate_model_with_quant")
    require_rate(overflow_rate, "duplicate_model_with_quant")
    require_count(counter, "counter", "duplicate_model_with_quant")
    for name, module in model.named_modules():
        if isinstance(module, SystemQuantizer):
            raise StateError(
                f"the model has quantizers already: {name} is a {module.__class__.__name__}.",
                "give the float model.",
            )

    quantized = _Duplication(bits, overflow_rate, counter, type, find_device(model)).visit(
        model, ""
    )
    unquantized = list_unquantized(quantized)
    if unquantized.entries or unquantized.note:
        for line in unquantized.format_table().splitlines():  # the log has one line a record
            logger.warning("%s", line)
    return quantized


@dataclass
class _Duplication:
    """One call: its settings, and what it has made of each module."""

    bits: int
    overflow_rate: float
    counter: int
    type: QuantMethod
    device: torch.device
    results: dict[nn.Module, nn.Module] = field(default_factory=dict)
    quantizers: dict[nn.Module, SystemQuantizer] = field(default_factory=dict)

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        """The module, or its copy, with quantizers in all Sequentials."""
        if module not in self.results:
            takes_quantizers = isinstance(module, nn.Sequential) and runs_children_in_order(module)
            result = _copy_container(module) if takes_quantizers else module
            result._modules = self._visit_children(module, name, takes_quantizers)
            self.results[module] = result
        return self.results[module]

    def _visit_children(
        self, module: nn.Module, name: str, takes_quantizers: bool
    ) -> dict[str, nn.Module | None]:
        children: dict[str, nn.Module | None] = {}
        for key, child in module._modules.items():
            if child is not None and not isinstance(child, QUANTIZED_LAYERS):
                children[key] = self.visit(child, join_name(name, key))
                continue
            children[key] = child
            if child is not None and takes_quantizers:
                inserted = f"{key}_{self.type}_quant"
                path = join_name(name, inserted)
                children[inserted] = self._quantizer_of(child, f"{key}_quant", path)
        return children

    def _quantizer_of(self, layer: nn.Module, name: str, path: str) -> SystemQuantizer:
        """The quantizer of a layer: one, wherever and however often it is used."""
        if layer not in self.quantizers:
            quantizer = self._make_quantizer(name)
            quantizer.path = path
            self.quantizers[layer] = quantizer.to(self.device).train(layer.training)
        return self.quantizers[layer]

    def _make_quantizer(self, name: str) -> LinearQuant | NormalQuant:
        if self.type == "linear":
            return LinearQuant(
                name, self.bits, overflow_rate=self.overflow_rate, counter=self.counter
            )
        return NormalQuant(name, self.bits, FUNCTIONS[self.type][0])


def _copy_container(module: nn.Module) -> nn.Module:
    """A module of the same class, attributes, hooks, parameters and buffers, whose dictionaries are its own."""
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    result._buffers = dict(module._buffers)
    return result
