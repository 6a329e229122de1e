"""`prepare_acoustic`: quantizes the layers of a model as `acoustic` defines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qdq.batch import require_batches
from qdq.swap import switch_fast_paths
from qdq.systems.acoustic import AcousticInput, AcousticWeight, require_width
from qdq.systems.layer import convert_layer, restore_layer
from qdq.systems.ranged import collect_ranges
from qdq.systems.selection import take_layers


def prepare_acoustic(
    model: nn.Module, num_bits: int = 8, *, batches: Iterable[Any] | None = None
) -> list[str]:
    """Quantize the weights and inputs of all convolutions and linear layers, in place.

    A warning lists the layers that no system has, such as transposed convolutions.

    Args:
        model: A float model; if calibration fails, it does not change.
        num_bits: 8 or 16.
        batches: Calibration batches for static ranges of the inputs; None: each batch has its own range, until
            `calibrate_inputs` records one.

    Returns:
        Dotted names of the layers.

    Raises:
        ArgumentError: Another width, or no such layer.
        ArgumentTypeError: No model; one tensor instead of batches.
        StateError: A layer that no batch reaches.
    """
    require_width(num_bits, "prepare_acoustic")
    if batches is not None:
        require_batches(batches)
    layers = take_layers(model, "prepare_acoustic")
    inputs = {}
    converted = []
    for name, layer in layers.items():
        inputs[name] = AcousticInput(num_bits, is_static=batches is not None, name=name)
        converted.append(convert_layer(layer, AcousticWeight(num_bits, name), inputs[name]))
    try:
        if batches is not None:
            collect_ranges(model, inputs, batches)
    except BaseException:
        for system_layer in converted:
            restore_layer(system_layer)
        raise
    finally:
        switch_fast_paths(model)
    return list(layers)
