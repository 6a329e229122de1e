"""Why bits of an override have no effect in training."""

from __future__ import annotations

from typing import Any

from torch import nn

from qdq.distiller.training.training_layers import OTHER_ACTIVATION, FakeQuantizationWrapper
from qdq.systems.layer import SystemLayer
from qdq.systems.settings import FLOAT_BITS


def explain_idle_bits(key: str, value: Any, layer: nn.Module) -> str:
    """Why bits of an override have no effect on a layer; "" if they have one, or ask for float.

    Args:
        key: `bits_activations`, `bits_weights` or `bits_bias`.
        value: The bits.
        layer: What became of the layer.
    """
    if not value or (value == FLOAT_BITS and key != "bits_bias"):
        return ""
    if key == "bits_activations":
        return "" if isinstance(layer, FakeQuantizationWrapper) else OTHER_ACTIVATION
    if not isinstance(layer, SystemLayer):
        return "the layer has no weight that is quantized"
    if key == "bits_bias" and layer.bias is None and layer.bias_system is None:
        return "the layer has no bias"
    return ""
