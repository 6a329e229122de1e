"""Overrides that match layers, and whose settings have no effect on any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qdq.distiller.layers.leaves import RangeLinearFakeQuantWrapper
from qdq.distiller.layers.swap_layers import FusedActivation
from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.settings.idle_settings import warn_of_idle_settings
from qdq.distiller.settings.overrides import Overrides


def warn_of_idle(overrides: Overrides | None, origins: Mapping[str, str], model: nn.Module) -> None:
    """Log the settings of overrides that have no effect on any layer of theirs.

    Args:
        overrides: The overrides.
        origins: Name of a layer -> the override that applies to it.
        model: The quantized model, after one forward.
    """
    # What stays float is listed elsewhere, and folded layers are gone.
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, RangeLinearQuantWrapper | FusedActivation):
            layers[name] = module
    warn_of_idle_settings(overrides, origins, layers, _explain)


def _explain(key: str, value: Any, layer: nn.Module) -> str:
    """Why a setting has no effect on a layer; "" if it has one."""
    if not isinstance(layer, RangeLinearQuantWrapper):
        return "the layer before applies this ReLU; set it there"
    if key == "bits_bias" and value != layer.bits_accum:
        return f"codes of a bias have the {layer.bits_accum} bits of the sums (bits_accum)"
    if key == "bits_weights" and value and not isinstance(layer, QuantWeightWrapper):
        return f"{type(layer.wrapped_module).__name__} has no weight that is quantized"
    if key == "clip_half_range" and value is False and layer.settings.clip_half_range:
        return "a ReLU follows, so that negative values get no codes"
    return _explain_inputs(layer) if key == "input_overrides" else ""


def _explain_inputs(layer: RangeLinearQuantWrapper) -> str:
    """Why settings of inputs have no effect on a layer; "" if they have one."""
    if isinstance(layer, RangeLinearFakeQuantWrapper) and not layer.settings.quantize_inputs:
        return f"{layer.label} computes in float; quantize_inputs: true rounds its inputs"
    missing = [index for index in layer.settings.input_overrides if index not in layer.sources]
    if not missing:
        return ""
    positions = ", ".join(map(str, missing))
    return f"{layer.label} has quantized inputs {sorted(layer.sources)}, and no input {positions}"
