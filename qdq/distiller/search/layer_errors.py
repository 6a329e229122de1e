"""Scales that make the error of each layer's output small: where LAPQ starts with L1, L2 or L3.

The error is mean |y - yq|^p. y is the output of the float layer for a batch, and yq that of the layer with its weight
and its output rounded, for the same float input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.device import without_tf32
from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.post_training.adjust import set_param
from qdq.distiller.search.minimize import Objective, Vector, minimize
from qdq.distiller.search.search_options import MinimizeOptions
from qdq.distiller.search.search_space import Layers, SearchSpace
from qdq.forward import call_model, evaluating


@dataclass(frozen=True)
class ErrorOptions:
    """How the error of a layer is made small.

    Args:
        power: The power p.
        method: The method of scipy.
        clipping: Search ranges instead of scales.
    """

    power: int
    method: str
    clipping: bool


@dataclass
class _Call:
    """A call of a float layer: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


def minimize_layer_errors(
    float_model: nn.Module, layers: Layers, batch: Any, options: ErrorOptions, journal: Journal
) -> None:
    """Set the scales of all layers, one layer after another.

    Args:
        float_model: The float model, with BatchNorm folded and names as in the quantized one.
        layers: The quantized layers, with their float weights.
        batch: For `forward.call_model`.
        options: Which error, and how it is made small.
        journal: Where the results of layers are and go.
    """
    with torch.no_grad(), evaluating(float_model), without_tf32():
        for name, layer in tqdm(layers.items(), desc="init", unit="layer", disable=None):
            space = SearchSpace({name: layer}, options.clipping)
            key = ["init", name, options.power, options.method]
            numbers = journal.get(key)
            if numbers is None:
                numbers = _search_layer(float_model, name, layer, space, batch, options).tolist()
                journal.add(key, numbers)
            _apply(name, layer, space, numbers)


def _search_layer(
    float_model: nn.Module,
    name: str,
    layer: RangeLinearQuantWrapper,
    space: SearchSpace,
    batch: Any,
    options: ErrorOptions,
) -> Vector:
    """The best numbers of one layer."""
    module = float_model.get_submodule(name)
    call = _record_call(float_model, module, batch)
    if call is None:
        return space.start

    def measure(numbers: Vector) -> float:
        _apply(name, layer, space, numbers)
        rounded = _compute_rounded(module, layer, call)
        exact = _cut(call.output, layer)
        return float((rounded.double() - exact.double()).abs().pow(options.power).mean())

    objective = Objective(measure, space.start, Journal(None, "", Ranks()))
    minimize(objective, MinimizeOptions(method=options.method))
    return objective.best


def _record_call(float_model: nn.Module, module: nn.Module, batch: Any) -> _Call | None:
    """The first call of a layer; None if it returns no float tensor."""
    calls: list[_Call] = []

    def record(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not calls and isinstance(output, torch.Tensor) and output.is_floating_point():
            calls.append(_Call(args, kwargs, output))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        call_model(float_model, batch)
    finally:
        handle.remove()
    return calls[0] if calls else None


def _compute_rounded(
    module: nn.Module, layer: RangeLinearQuantWrapper, call: _Call
) -> torch.Tensor:
    """The output of a float layer with rounded weight and output."""
    output = call.output
    if isinstance(layer, QuantWeightWrapper) and layer.weight_params is not None:
        weight = layer.weight_params.fake_quantize(module.get_parameter("weight"))
        output = functional_call(module, {"weight": weight}, call.args, call.kwargs)
    output = _cut(output, layer)
    params = layer.output_params
    return output if params is None else params.fake_quantize(output)


def _cut(output: torch.Tensor, layer: RangeLinearQuantWrapper) -> torch.Tensor:
    """The output as the layer after it reads it: a ReLU moves into the layer before."""
    return output.relu() if layer.settings.clip_half_range else output


def _apply(name: str, layer: RangeLinearQuantWrapper, space: SearchSpace, numbers: Any) -> None:
    for parameter, value in space.values_at(numbers).items():
        set_param({name: layer}, parameter, value)
    layer.force_readjust = True
