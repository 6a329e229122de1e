"""What arrives at a quantized layer: a tensor with its scale and zero point, or one that gets them here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qdq.distiller.layers.integers import Integers, round_to_integers
from qdq.distiller.layers.metadata import is_state, read_metadata
from qdq.distiller.ranges.clipping import RangeStatistics
from qdq.distiller.ranges.linear_params import LinearParams
from qdq.distiller.ranges.solve import solve_clipped, solve_tensor
from qdq.distiller.settings.input_settings import InputSettings
from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.systems.arithmetic import require_batch, spoil_infinite

if TYPE_CHECKING:
    from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper


def receive_input(layer: RangeLinearQuantWrapper, index: int, values: Any) -> Integers:
    """An input of a layer as integers.

    Args:
        layer: The layer, which notes who has rounded the input.
        index: Position of the input.
        values: The input.

    Raises:
        ArgumentError: Empty, or NaN or Inf in it.
        ArgumentTypeError: Not a float tensor.
        StateError: It has a scale and settings, too, or neither.
    """
    params, has_codes = find_input_params(layer, index, values)
    if not has_codes:
        values = spoil_infinite(values)
    scaled = values.float() * params.scale
    integers = scaled.round_() if has_codes else round_to_integers(scaled, params)
    sign_bits = 1 if params.mode.is_symmetric else 0
    return Integers(integers, params.scale, 2 ** (params.num_bits - sign_bits))


def solve_record(
    record: RangeStatistics, settings: InputSettings, place: str, half_range: bool = False
) -> LinearParams:
    """Scale and zero point by a record of statistics.

    Args:
        record: The record.
        settings: How the tensor is quantized.
        place: The layer and its tensor, for messages.
        half_range: As for `solve_clipped`.

    Raises:
        ArgumentError: The record, or the settings, give no range.
    """
    return _solve(solve_clipped, record, settings, place, half_range)


def solve_values(
    values: torch.Tensor, settings: InputSettings, place: str, half_range: bool = False
) -> LinearParams:
    """Scale and zero point by the values of a batch.

    Args:
        values: The batch.
        settings: As for `solve_record`.
        place: Likewise.
        half_range: Likewise.

    Raises:
        ArgumentError: The values, or the settings, give no range.
    """
    return _solve(solve_tensor, values, settings, place, half_range)


def _solve(
    solver: Callable[..., LinearParams],
    tensor: torch.Tensor | RangeStatistics,
    settings: InputSettings,
    place: str,
    half_range: bool,
) -> LinearParams:
    """What a solver gives for a tensor or its statistics; its errors name the place."""
    try:
        return solver(
            tensor,
            require_bits(settings, place),
            settings.mode,
            settings.clip_acts,
            settings.clip_n_stds,
            half_range,
        )
    except ArgumentError as error:
        raise ArgumentError(f"{place}: {error.message}", error.fix) from None


def require_bits(settings: InputSettings, place: str) -> int:
    """The width of a code.

    Args:
        settings: How a tensor is quantized.
        place: The layer and its tensor, for messages.

    Raises:
        ArgumentError: It is float.
    """
    if settings.bits_activations is None:
        raise ArgumentError(
            f"{place}: bits_activations is null, and a layer on integers cannot read floats.",
            "give bits, or set fake: true for the layer.",
        )
    return settings.bits_activations


class Arrival(NamedTuple):
    """Scale and zero point of an input, and whether its values are on its codes already."""

    params: LinearParams
    has_codes: bool


def find_input_params(layer: RangeLinearQuantWrapper, index: int, values: Any) -> Arrival:
    """Scale and zero point of an input, and note in the layer who has rounded it.

    Args:
        layer: The layer.
        index: Position of the input.
        values: The input.

    Raises:
        ArgumentError: Empty, or NaN or Inf in it.
        ArgumentTypeError: Not a float tensor.
        StateError: It has a scale and settings, too, or neither.
    """
    place = f"{layer.label}, input {index}"
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise ArgumentTypeError(
            f"{place} is of type {kind}; only float tensors are quantized.",
            "give float tensors, or leave the layer in float: bits_activations: null.",
        )
    if isinstance(values, nn.Parameter):
        layer.constant_inputs.add(index)
    metadata = read_metadata(values)
    settings = layer.settings.input_overrides.get(index)
    if metadata is not None:
        if settings is not None:
            raise StateError(
                f"{place} has a scale from {metadata.source.label}, and input_overrides has settings for it.",
                "remove the settings, or change those of the layer before.",
            )
        layer.note_source(index, metadata.source)
        return Arrival(metadata.params, has_codes=True)
    if layer.is_static and is_state(values):
        require_batch(values, place)
        return Arrival(_find_state(layer, index, place), has_codes=False)
    if settings is None and not layer.settings.inputs_quant_auto_fallback:
        raise StateError(
            f"{place} comes without a scale, and neither input_overrides nor inputs_quant_auto_fallback give one.",
            "add input_overrides for it, or set inputs_quant_auto_fallback: true.",
        )
    layer.note_source(index, None)
    if layer.is_static:
        require_batch(values, place)
        return Arrival(_find_static(layer, index, place), has_codes=False)
    params = solve_values(values, settings or layer.output_settings, place)
    return Arrival(params, has_codes=False)


def _find_state(layer: RangeLinearQuantWrapper, index: int, place: str) -> LinearParams:
    """Scale and zero point of the later states; by the statistics as long as none has come."""
    layer.state_inputs.add(index)
    source: Any = layer.sources.get(index)
    params: LinearParams | None = None if source is None else source.output_params
    return params or _find_static(layer, index, place)


def _find_static(layer: RangeLinearQuantWrapper, index: int, place: str) -> LinearParams:
    """Scale and zero point by the statistics.

    Raises:
        ArgumentError: It shall be float.
        StateError: There are no statistics of it.
    """
    if index in layer.input_params:
        return layer.input_params[index]
    require_bits(layer.settings.input_overrides.get(index, layer.output_settings), place)
    raise StateError(
        f"{place} comes without a scale, and the statistics of the layer have inputs "
        f"{sorted(layer.input_params)} alone.",
        "collect statistics of this model again.",
    )
