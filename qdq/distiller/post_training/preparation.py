"""The steps from a float model to a quantized one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from qdq.distiller.layers.replace_modules import put_in, undoing_swap
from qdq.distiller.layers.swap_layers import (
    Planned,
    WeightOptions,
    build_wrappers,
    require_statistics,
)
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.layers.wrapping import choose_wrapper, rounds_output
from qdq.distiller.post_training.float_report import list_float, warn_of_effects
from qdq.distiller.post_training.fusion import cut_ranges, fold_batchnorms, list_outputs
from qdq.distiller.post_training.saturation import warn_of_saturation
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.names import find_layers, plain_names
from qdq.distiller.statistics.records import ModelStatistics
from qdq.errors import ArgumentError, StateError
from qdq.forward import ForwardTrace, call_model, evaluating, trace_forward
from qdq.systems.unquantized import UnquantizedReport
from qdq.systems.wrapper import SystemWrapper


@dataclass(frozen=True)
class Preparation:
    """Result of `prepare_layers`.

    Args:
        layers: Name -> quantized layer.
        settings: Name -> settings, with `clip_half_range` where a ReLU follows.
        statistics: Those after folding and cuts; None in dynamic mode.
        readers: Name of a layer -> the layers that read its output, also through functions.
        left_float: The layers and calls that stay float.
    """

    layers: dict[str, RangeLinearQuantWrapper]
    settings: dict[str, LayerSettings]
    statistics: ModelStatistics | None
    readers: dict[str, frozenset[str]]
    left_float: UnquantizedReport


def prepare_layers(
    model: nn.Module,
    dummy_input: Any,
    settings: Mapping[str, LayerSettings],
    statistics: ModelStatistics | None,
    options: WeightOptions,
) -> Preparation:
    """Quantize a model in place.

    Args:
        model: A float model, which no wrapper for several devices is around.
        dummy_input: A batch.
        settings: How each layer is quantized.
        statistics: The statistics of the layers; None: dynamic.
        options: Those of layers with weights.

    Raises:
        ArgumentError: The model has no layers; the statistics lack some; or statistics, weights or settings give no
            range.
    """
    if statistics is not None:
        trace = trace_forward(model, dummy_input)
        require_statistics(_plan(model, settings, trace, statistics), statistics)
    statistics = fold_batchnorms(model, dummy_input, statistics)
    trace = trace_forward(model, dummy_input)
    planned = _plan(model, settings, trace, statistics)
    cuts = None
    if statistics is not None:
        rounded = set()
        for name, layer in planned.items():
            if rounds_output(layer.choice, layer.settings):
                rounded.add(name)
        cuts = cut_ranges(trace, plain_names(model), statistics, rounded)
        statistics = cuts.statistics
    with undoing_swap(model):
        wrappers = build_wrappers(planned, cuts, options)
        put_in(model, {planned[name].module: wrapper for name, wrapper in wrappers.items()})
        layers = {}
        effective = dict(settings)
        for name, wrapper in wrappers.items():
            if isinstance(wrapper, RangeLinearQuantWrapper):
                layers[name] = wrapper
                effective[name] = wrapper.settings
        _run_once(model, dummy_input, layers)
    if statistics is not None:
        warn_of_saturation(layers, statistics)
    left_float = list_float(planned, trace)
    warn_of_effects(left_float, planned, cuts)
    readers = _find_readers(trace, layers)
    return Preparation(layers, effective, statistics, readers, left_float)


def _plan(
    model: nn.Module,
    settings: Mapping[str, LayerSettings],
    trace: ForwardTrace,
    statistics: ModelStatistics | None,
) -> dict[str, Planned]:
    """What becomes of each layer.

    Raises:
        ArgumentError: There is none.
    """
    planned = {}
    for name, module in find_layers(model).items():
        if isinstance(module, nn.Identity | _DropoutNd):
            continue
        choice = choose_wrapper(name, module, settings[name], trace, statistics)
        planned[name] = Planned(module, choice, settings[name])
    if not planned:
        raise ArgumentError(
            f"the model, a {type(model).__name__}, has no layers inside.",
            "put a single layer into a network: torch.nn.Sequential(layer).",
        )
    return planned


def require_float(model: nn.Module) -> None:
    """Refuse a model that is quantized.

    Args:
        model: Any model.

    Raises:
        StateError: It is.
    """
    for name, module in model.named_modules():
        if isinstance(module, SystemWrapper):
            raise StateError(
                f"the model is quantized already: {name} is a {type(module).__name__}.",
                "quantize a float model.",
            )


def _run_once(
    model: nn.Module, dummy_input: Any, layers: Mapping[str, RangeLinearQuantWrapper]
) -> None:
    """Run the quantized model, so that each layer knows who rounds its inputs; the run is not counted."""
    for layer in layers.values():
        layer.reports_saturation = False  # the values do not matter
    with evaluating(model):
        call_model(model, dummy_input)
    for layer in layers.values():
        layer.num_forwards.zero_()
        layer.reports_saturation = True


def _find_readers(
    trace: ForwardTrace, layers: Mapping[str, RangeLinearQuantWrapper]
) -> dict[str, frozenset[str]]:
    """Name of a layer -> the layers that read its output, also through functions."""
    readers: dict[int, set[str]] = {}
    # Backwards, so that all that read a result are known when the call that gives it comes.
    for operation in reversed(trace.operations):
        through: set[str] = {operation.module}
        if operation.module not in layers:
            through = set()
            for value in operation.outputs:
                through |= readers.get(value, set())
        for value in operation.inputs:
            readers.setdefault(value, set()).update(through)
    readers_of_layers = {}
    for name, values in list_outputs(trace, layers).items():
        of_all_runs = set().union(*(readers.get(value, set()) for value in values))
        readers_of_layers[name] = frozenset(of_all_runs - {name})
    return readers_of_layers
