"""`QuantAwareTrainRangeLinearQuantizer`: range-linear quantization in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdq.device import find_device
from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.overrides import Overrides
from qdq.distiller.settings.values import describe_value, is_whole, read_value
from qdq.distiller.training.ema import FakeLinearQuantization, RangeLinearParameter
from qdq.distiller.training.folded_pairs import find_folded_pairs, simulate_folding
from qdq.distiller.training.training_layers import is_float, require_untouched
from qdq.distiller.training.training_quantizer import ParameterSystems, TrainingQuantizer
from qdq.errors import ArgumentError
from qdq.systems.layer import SystemLayer
from qdq.systems.moving_range import EMA_DECAY
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import FLOAT_BITS
from qdq.systems.sources import find_input_layers


class QuantAwareTrainRangeLinearQuantizer(TrainingQuantizer):
    """Range-linear quantization with moving ranges of activations, see `ema`.

    The other arguments are those of `TrainingQuantizer`.

    Args:
        mode: A mode or its name, or one for activations and one for weights.
        ema_decay: Decay of the moving ranges.
        per_channel_wts: Whether each output channel of a weight has its own scale.
        quantize_inputs: Whether the input of the network is quantized, in the layers that read it.
        num_bits_inputs: Bits of the input of the network; None: `bits_activations`.
        freeze_bn_delay: Fold BatchNorm in training, and freeze its statistics after this number of batches (see
            `folding`); None: BatchNorm stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        bits_activations: int | None = FLOAT_BITS,
        bits_weights: int | None = FLOAT_BITS,
        bits_bias: int | None = FLOAT_BITS,
        overrides: Overrides | None = None,
        mode: LinearQuantMode | ModePair | Mapping[str, Any] | str = LinearQuantMode.SYMMETRIC,
        ema_decay: float = EMA_DECAY,
        per_channel_wts: bool = False,
        quantize_inputs: bool = True,
        num_bits_inputs: int | None = None,
        freeze_bn_delay: int | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations,
            bits_weights,
            bits_bias,
            overrides,
            mode=mode,
            per_channel_wts=per_channel_wts,
        )
        if num_bits_inputs is None:
            num_bits_inputs = self.defaults.bits_activations
        self.num_bits_inputs = read_value("bits_activations", num_bits_inputs, "num_bits_inputs")
        place = type(self).__name__
        self.ema_decay = read_value("ema_decay", ema_decay, place)
        is_wanted = read_value("quantize_inputs", quantize_inputs, place)
        self.quantize_inputs = is_wanted and not is_float(self.num_bits_inputs)
        self.freeze_bn_delay = _read_delay(freeze_bn_delay)
        self._pairs: dict[str, str] = {}

    def prepare_model(self, dummy_input: Any = None) -> None:
        """As `TrainingQuantizer.prepare_model`, also for inputs and BatchNorm.

        Raises:
            ArgumentError: Also, no layer reads the input, or there is no dummy input to find BatchNorm by.
            UnsupportedError: torch.fx cannot find the layers that read the input.
        """
        require_untouched(self.model)
        readers = _find_input_readers(self.model) if self.quantize_inputs else []
        if self.freeze_bn_delay is not None:
            self._pairs = _find_pairs(self.model, dummy_input)
        super().prepare_model(dummy_input)
        self._quantize_input(readers)
        if self.freeze_bn_delay is not None:
            pairs = {name: bn for name, bn in self._pairs.items() if self._get_layer(name)}
            simulate_folding(self.model, pairs, self.freeze_bn_delay)

    def _get_layer(self, name: str) -> SystemLayer | None:
        """A layer with a quantized weight."""
        module = self.model.get_submodule(name)
        return module if isinstance(module, SystemLayer) else None

    def _quantize_input(self, readers: list[str]) -> None:
        """Quantize the input of the network in the quantized layers that read it, which share its range."""
        mode = self.defaults.mode.activations
        inputs: SystemQuantizer | None = None
        for name in readers:
            layer = self._get_layer(name)
            if layer is None:
                continue
            if inputs is None:
                inputs = FakeLinearQuantization(self.num_bits_inputs, mode, self.ema_decay, name)
                inputs.to(find_device(self.model)).train(layer.training)
            layer.input_system = inputs

    def _make_systems(self, name: str, layer: Any, settings: LayerSettings) -> ParameterSystems:
        mode = settings.mode.weights
        assert settings.bits_weights is not None  # noqa: S101  # chosen for it
        shape = ()
        if settings.per_channel_wts:
            shape = (layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))
        weight = RangeLinearParameter("weight", settings.bits_weights, mode, shape, name)
        bias = None
        has_bias = layer.bias is not None or name in self._pairs
        if has_bias and settings.bits_bias is not None:
            bias = RangeLinearParameter("bias", settings.bits_bias, mode, (), name)
        return ParameterSystems(weight, bias)

    def _make_activation(self, name: str, settings: LayerSettings) -> SystemQuantizer:
        assert settings.bits_activations is not None  # noqa: S101  # chosen for it
        mode = settings.mode.activations
        return FakeLinearQuantization(settings.bits_activations, mode, self.ema_decay, name)


def _find_input_readers(model: nn.Module) -> list[str]:
    """The layers that read the input of a network.

    Raises:
        ArgumentError: There is none.
    """
    layers, others = find_input_layers(model)
    if not layers:
        readers = ", ".join(others) or "nothing"
        raise ArgumentError(
            f"quantize_inputs is set, and the input of the network is read by {readers}, which is no layer.",
            "set quantize_inputs: False.",
        )
    return layers


def _find_pairs(model: nn.Module, dummy_input: Any) -> dict[str, str]:
    """Layer -> the BatchNorm that alone reads its output.

    Raises:
        ArgumentError: There is no dummy input.
    """
    if dummy_input is None:
        raise ArgumentError(
            "freeze_bn_delay is set, and prepare_model has no dummy_input to find BatchNorm by.",
            "pass a batch.",
        )
    return find_folded_pairs(model, dummy_input)


def _read_delay(value: Any) -> int | None:
    """A number of batches, or None.

    Raises:
        ArgumentError: It is neither.
    """
    if value is None or (is_whole(value) and value >= 0):
        return value  # type: ignore[no-any-return]
    raise ArgumentError(
        f"freeze_bn_delay is {describe_value(value)}; expected a whole number of batches, or null.",
        "leave it out, or give 200000.",
    )
