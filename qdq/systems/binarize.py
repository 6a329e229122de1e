"""Binary networks: which layers become binary, how they are trained, and how their binary weights are kept.

A layer keeps a float weight, which training changes; every forward computes the binary one from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdq.errors import ArgumentError
from qdq.forward import call_model, evaluating, require_model
from qdq.patterns import Pattern
from qdq.swap import switch_fast_paths
from qdq.systems.arithmetic import sign_of
from qdq.systems.binary import BinaryInput, BinaryQuantizer, BinaryWeight, Sampling
from qdq.systems.grid import note_grid
from qdq.systems.layer import SystemLayer, convert_layer
from qdq.systems.selection import Selection, select_layers
from qdq.systems.settings import require_choice
from qdq.text import list_names


def binarize_model(
    model: nn.Module,
    example: Any,
    *,
    inputs: bool = False,
    zero: int = 1,
    sampling: Sampling = "",
    float_layers: Iterable[Pattern] | None = None,
) -> Selection:
    """Give the layers of a model binary weights, in place.

    Args:
        model: A float model. With `inputs`, its blocks are convolution and BatchNorm: the sign replaces ReLU.
        example: Example inputs, see `selection.select_layers`.
        inputs: Also binary inputs (BNN); the weights are then signs, without a scale (BatchNorm follows).
        zero: The sign of 0, 1 or -1.
        sampling: As for `BinaryQuantizer`.
        float_layers: Patterns of layers that stay in float; None: the first and the last one that run.

    Returns:
        The binary layers, and the others with the reasons.

    Raises:
        ArgumentError: No layer is left, or the input of a layer has one sign only.
    """
    require_choice(zero, (1, -1), "zero", "binarize_model")
    selection = select_layers(model, example, float_layers)
    if inputs:
        _require_both_signs(model, example, selection, zero)
    for name, layer in selection.layers.items():
        weight = BinaryWeight(f"{name}.weight", zero, sampling, scaled=not inputs)
        signs = BinaryInput(f"{name}.input", zero, sampling) if inputs else None
        convert_layer(layer, weight, signs)
    switch_fast_paths(model)
    return selection


def _require_both_signs(model: nn.Module, example: Any, selection: Selection, zero: int) -> None:
    """Refuse layers whose inputs have all the same sign: they would compute a constant.

    Raises:
        ArgumentError: The message names them.
    """
    constant = []
    handles = []
    for name, layer in selection.layers.items():

        def watch(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            signs = sign_of(arguments[0], zero)
            if bool((signs == signs.flatten()[0]).all()):
                constant.append(name)

        handles.append(layer.register_forward_pre_hook(watch))
    try:
        with evaluating(model):
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if constant:
        raise ArgumentError(
            f"all inputs of {list_names(constant, 3)} have the same sign, as behind a ReLU.",
            "replace the ReLU by nn.Identity or nn.Hardtanh: the sign takes its place.",
        )


def list_binary(model: nn.Module) -> list[SystemLayer]:
    """The layers with a binary weight."""
    layers = []
    for module in model.modules():
        if isinstance(module, SystemLayer) and isinstance(module.weight_system, BinaryQuantizer):
            layers.append(module)
    return layers


@contextmanager
def clipping_weights(model: nn.Module) -> Iterator[None]:
    """Keep the float weights of binary layers in [-1, 1] after each optimizer step, for a block around `finetune`.

    Beyond, they would change without an effect (Courbariaux et al., arXiv 1511.00363, section 2.4). Biases and
    BatchNorm are not clipped. In the block, quantizers with `sampling` draw signs wherever there are gradients, because
    `finetune` trains in evaluation mode.

    Args:
        model: A binary model.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    weights = {layer.weight for layer in list_binary(model)}
    quantizers = [module for module in model.modules() if isinstance(module, BinaryQuantizer)]

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in weights.intersection(group["params"]):
                    parameter.clamp_(-1, 1)

    handle = register_optimizer_step_post_hook(clip)
    for quantizer in quantizers:
        quantizer.is_tuned = True
    try:
        yield
    finally:
        handle.remove()
        for quantizer in quantizers:
            quantizer.is_tuned = False


def replace_weights(model: nn.Module) -> None:
    """Replace the float weights of binary layers by their binary values, in place; inputs stay as they are.

    Args:
        model: A binary model.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    for layer in list_binary(model):
        system = layer.weight_system
        assert system is not None  # noqa: S101
        grid = system.describe(layer.weight)
        with evaluating(system), torch.no_grad():
            layer.weight.copy_(system(layer.weight))
        note_grid(layer, "weight", grid)
        layer.weight_system = None
