"""Quantizers of training with activations from 0 on, by the names and arguments that YAML files have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.overrides import Overrides
from qdq.distiller.settings.values import read_value
from qdq.distiller.training.dorefa import ClippedLinearQuantization, DorefaWeight
from qdq.distiller.training.pact import ACT_CLIP_INIT_VAL, LearnedClippedLinearQuantization
from qdq.distiller.training.training_layers import is_float
from qdq.distiller.training.training_quantizer import ParameterSystems, TrainingQuantizer
from qdq.distiller.training.wrpn import WRPNWeight
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import FLOAT_BITS


class DorefaQuantizer(TrainingQuantizer):
    """DoReFa, see `dorefa`; the arguments are those of `TrainingQuantizer`."""

    _weight_class: Any = DorefaWeight

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        bits_activations: int | None = FLOAT_BITS,
        bits_weights: int | None = FLOAT_BITS,
        bits_bias: int | None = None,
        overrides: Overrides | None = None,
    ) -> None:
        super().__init__(model, optimizer, bits_activations, bits_weights, bits_bias, overrides)

    def _make_systems(self, name: str, layer: Any, settings: LayerSettings) -> ParameterSystems:
        bias = None
        if layer.bias is not None and not is_float(settings.bits_bias):
            bias = self._weight_class(settings.bits_bias, name)
        return ParameterSystems(self._weight_class(settings.bits_weights, name), bias)

    def _make_activation(self, name: str, settings: LayerSettings) -> SystemQuantizer:
        assert settings.bits_activations is not None  # noqa: S101  # chosen for it
        return ClippedLinearQuantization(settings.bits_activations, name=name)


class WRPNQuantizer(DorefaQuantizer):
    """WRPN, see `wrpn`; the arguments are those of `TrainingQuantizer`. Wider layers are up to the model."""

    _weight_class = WRPNWeight


class PACTQuantizer(DorefaQuantizer):
    """PACT, see `pact`; weights as in DoReFa. The other arguments are those of `TrainingQuantizer`.

    The learned ends are a group of parameters of the optimizer.

    Args:
        act_clip_init_val: Where the upper ends of activations start.
        act_clip_decay: Their weight decay; None: that of the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        bits_activations: int | None = FLOAT_BITS,
        bits_weights: int | None = FLOAT_BITS,
        bits_bias: int | None = None,
        overrides: Overrides | None = None,
        act_clip_init_val: float = ACT_CLIP_INIT_VAL,
        act_clip_decay: float | None = None,
    ) -> None:
        super().__init__(model, optimizer, bits_activations, bits_weights, bits_bias, overrides)
        place = type(self).__name__
        self.act_clip_init_val = read_value("act_clip_init_val", act_clip_init_val, place)
        self.act_clip_decay = read_value("act_clip_decay", act_clip_decay, place)

    def _make_activation(self, name: str, settings: LayerSettings) -> SystemQuantizer:
        assert settings.bits_activations is not None  # noqa: S101  # chosen for it
        return LearnedClippedLinearQuantization(
            settings.bits_activations, self.act_clip_init_val, name
        )

    def prepare_model(self, dummy_input: Any = None) -> None:
        """As `TrainingQuantizer.prepare_model`; the optimizer gets the learned ends."""
        super().prepare_model(dummy_input)
        clips = []
        for module in self.model.modules():
            if isinstance(module, LearnedClippedLinearQuantization):
                clips.append(module.clip_val)
        if not clips:
            return
        group: dict[str, Any] = {"params": clips}
        if self.act_clip_decay is not None:
            group["weight_decay"] = self.act_clip_decay
        self.optimizer.add_param_group(group)
