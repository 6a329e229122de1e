"""UINT8 training of a model (Jacob et al., CVPR 2018, arXiv 1712.05877); `uint8_quantizers` has the formulas.

BatchNorm is folded before training. The inputs of layers are quantized: what a ReLU cuts off is outside the range of
its reader; the result of an addition, and a concat with all its parts, has the scale of the layer that reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentTypeError
from qdq.fold import fold_batchnorm
from qdq.swap import switch_fast_paths
from qdq.systems.integer.arithmetic import quantize_bias
from qdq.systems.layer import SystemLayer, convert_layer
from qdq.systems.moving_range import EMA_DECAY
from qdq.systems.selection import take_layers
from qdq.systems.uint8_quantizers import UInt8Activation, UInt8Weight


def prepare_uint8_training(
    model: nn.Module,
    example_inputs: Any,
    *,
    symmetric: bool = False,
    decay: float = EMA_DECAY,
    delay: int = 0,
) -> list[str]:
    """Fold BatchNorm, and quantize the weights and inputs of all convolutions and linear layers; in place.

    Train it in training mode, or with `qdq.finetune` within `moving_ranges`. A warning lists the layers that no system
    has, such as transposed convolutions.

    Args:
        model: A trained float model.
        example_inputs: One batch, for `fold_batchnorm`.
        symmetric: Zero point 0 and signed codes, so that the result fits TensorRT as it is.
        decay: Of the averages of `UInt8Activation`.
        delay: Number of steps before inputs are quantized.

    Returns:
        Dotted names of the layers.

    Raises:
        ArgumentError: A decay outside [0, 1), a negative delay, or no layer.
        ArgumentTypeError: No model.
        NumberTypeError: Numbers of the wrong type.
    """
    UInt8Activation("prepare_uint8_training", decay=decay, delay=delay)  # refuses bad ones
    layers = take_layers(model, "prepare_uint8_training")
    fold_batchnorm(model, example_inputs)
    for name, layer in layers.items():
        weight_system = UInt8Weight(name, symmetric=symmetric)
        input_system = UInt8Activation(name, symmetric=symmetric, decay=decay, delay=delay)
        convert_layer(layer, weight_system, input_system).train(layer.training)
    switch_fast_paths(model)
    return list(layers)


def bias_codes(layer: SystemLayer) -> torch.Tensor | None:
    """The bias of a trained layer in int32, with the scale of the input times that of the weight; None without a bias.

    Args:
        layer: A layer of a model from `prepare_uint8_training`.

    Raises:
        ArgumentTypeError: Another layer.
        StateError: It is not trained.
    """
    if not isinstance(layer, SystemLayer):
        raise ArgumentTypeError(
            f"bias_codes: the layer is of type {type(layer).__name__}.",
            "give a layer of a model from prepare_uint8_training.",
        )
    bias: Any = layer.bias
    if bias is None or layer.input_system is None or layer.weight_system is None:
        return None
    scale = (
        layer.input_system.describe(None).scale * layer.weight_system.describe(layer.weight).scale
    )
    return quantize_bias(bias, scale, layer.label)
