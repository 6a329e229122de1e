"""`prepare_acoustic`: quantizes the layers of a model as `acoustic` defines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qdq.batch import require_batches
from qdq.errors import ArgumentError
from qdq.forward import call_model, evaluating, require_model
from qdq.systems.acoustic import AcousticInput, AcousticWeight, require_width
from qdq.systems.layer import convert_layer, is_layer


def prepare_acoustic(
    model: nn.Module, num_bits: int = 8, *, batches: Iterable[Any] | None = None
) -> list[str]:
    """Quantize the weights and inputs of all convolutions and linear layers, in place.

    Args:
        model: A float model.
        num_bits: 8 or 16.
        batches: Calibration batches for static ranges of the inputs; None: each batch has its own range.

    Returns:
        Dotted names of the layers.

    Raises:
        ArgumentError: Another width, or no such layer.
        ArgumentTypeError: No model; one tensor instead of batches.
        StateError: A layer that no batch reaches.
    """
    require_model(model)
    require_width(num_bits, "prepare_acoustic")
    if batches is not None:
        require_batches(batches)
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    if not layers:
        raise ArgumentError(
            "prepare_acoustic: the model has no float layer.", "pass a float model."
        )
    inputs = []
    for name, layer in layers.items():
        quantizer = AcousticInput(num_bits, is_static=batches is not None, name=name)
        convert_layer(layer, AcousticWeight(num_bits, name), quantizer)
        inputs.append(quantizer)
    if batches is not None:
        _calibrate(model, inputs, batches)
    return list(layers)


def _calibrate(model: nn.Module, inputs: list[AcousticInput], batches: Iterable[Any]) -> None:
    for quantizer in inputs:
        quantizer.is_collecting = True
    try:
        with evaluating(model):
            for batch in batches:
                call_model(model, batch)
    finally:
        for quantizer in inputs:
            quantizer.is_collecting = False
    for quantizer in inputs:
        quantizer.describe(None)  # refuses one without a range
