"""`TrainingQuantizer`: what all quantizers of training do with a model.

Each convolution and linear layer keeps its float weight, which the optimizer changes, and quantizes it in every
forward. A ReLU is followed by a quantizer of its output.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from qdq.device import find_device
from qdq.distiller.command.log import PREPARING
from qdq.distiller.settings.idle_settings import warn_of_idle_settings
from qdq.distiller.settings.layer_settings import LayerSettings, update_settings
from qdq.distiller.settings.overrides import Overrides, Resolution, resolve
from qdq.distiller.training.idle_bits import explain_idle_bits
from qdq.distiller.training.training_layers import (
    FakeQuantizationWrapper,
    choose_activations,
    choose_layers,
    list_float_activations,
    replace_everywhere,
    require_untouched,
)
from qdq.errors import ArgumentError
from qdq.forward import require_model
from qdq.systems.layer import convert_layer
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import FLOAT_BITS
from qdq.systems.unquantized import UnquantizedReport

logger = logging.getLogger(__name__)

LAYER_KEYS = ("bits_activations", "bits_weights", "bits_bias")
"""The keys that an override may have in training."""


class ParameterSystems(NamedTuple):
    """The quantizers of a layer; None: float."""

    weight: SystemQuantizer
    bias: SystemQuantizer | None


class TrainingQuantizer(ABC):
    """Quantizes a model that is then trained, in place.

    Args:
        model: A float model, trained or not.
        optimizer: Of its parameters.
        bits_activations: Bits of the outputs of ReLUs; None, 0 or 32: float.
        bits_weights: Bits of weights, likewise.
        bits_bias: Bits of the biases of layers with a quantized weight; None or 0: float.
        overrides: Settings of single layers: name or pattern -> settings, the first that matches.
        options: More settings of layers, which a subclass has.

    Attributes:
        model: The model.
        optimizer: Of the parameters of the model.
        resolution: The settings of all layers, and the overrides that apply to none; None before `prepare_model`.
        left_float: The layers and activations that stay float, with the reasons, after `prepare_model`.

    Raises:
        ArgumentError: No optimizer, or an invalid value.
        ArgumentTypeError: A value of another type.
        StateError: The model is quantized already.
        UnsupportedError: The model is wrapped for several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        bits_activations: int | None,
        bits_weights: int | None,
        bits_bias: int | None,
        overrides: Overrides | None,
        **options: Any,
    ) -> None:
        require_model(model)
        if optimizer is None:
            raise ArgumentError(
                f"{type(self).__name__} has no optimizer, which trains the float weights.",
                "pass the optimizer of the model.",
            )
        require_untouched(model)
        values = {
            "bits_activations": bits_activations,
            "bits_weights": bits_weights,
            "bits_bias": bits_bias,
            **options,
        }
        self.model = model
        self.optimizer = optimizer
        self.overrides = overrides
        place = type(self).__name__
        self.defaults = update_settings(LayerSettings(), values, place, values.keys())
        self.resolution: Resolution | None = None
        self.left_float = UnquantizedReport((), "")

    def prepare_model(self, dummy_input: Any = None) -> None:
        """Quantize the model in place.

        Args:
            dummy_input: A batch, as the model is called with, for schemes that fold BatchNorm. Without it, calls of
                functions that stay float are not listed.

        Raises:
            ArgumentError: Nothing would be quantized, or an override has an invalid value.
            ArgumentTypeError: An unknown key in an override.
            StateError: It was called before.
        """
        require_untouched(self.model)
        logger.info(PREPARING, type(self).__name__)
        resolution = resolve(self.model, self.defaults, self.overrides, LAYER_KEYS)
        settings = resolution.settings
        layers, entries = choose_layers(self.model, settings)
        activations = choose_activations(self.model, settings)
        if not layers and not activations:
            raise ArgumentError(
                f"{type(self).__name__} quantizes nothing: no layer or ReLU has fewer than {FLOAT_BITS} bits.",
                "set bits_weights and bits_activations.",
            )
        entries += list_float_activations(self.model, activations, dummy_input)
        for name, layer in layers.items():
            systems = self._make_systems(name, layer, settings[name])
            convert_layer(layer, systems.weight, None, systems.bias).train(layer.training)
        for name, activation in activations.items():
            fake_q = self._make_activation(name, settings[name]).to(find_device(self.model))
            wrapper = FakeQuantizationWrapper(activation, fake_q).train(activation.training)
            replace_everywhere(self.model, activation, wrapper)
        modules = dict(self.model.named_modules())
        warn_of_idle_settings(self.overrides, resolution.origins, modules, explain_idle_bits)
        self.resolution = resolution
        self.left_float = UnquantizedReport(tuple(entries), "")
        if entries:
            for line in self.left_float.format_table().splitlines():  # a record is one line
                logger.warning("%s", line)

    @abstractmethod
    def _make_systems(self, name: str, layer: Any, settings: LayerSettings) -> ParameterSystems:
        """The quantizers of the parameters of a layer."""

    @abstractmethod
    def _make_activation(self, name: str, settings: LayerSettings) -> SystemQuantizer:
        """The quantizer of the output of a ReLU."""
