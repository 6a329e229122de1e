"""Layers whose sums do not fit into the accumulator, by the statistics of their outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from qdq.distiller.layers.param_layer import RangeLinearQuantParamLayerWrapper
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.ranges.modes import get_quantized_range
from qdq.distiller.statistics.records import ModelStatistics
from qdq.text import list_names

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 5


def warn_of_saturation(
    layers: Mapping[str, RangeLinearQuantWrapper], statistics: ModelStatistics
) -> None:
    """Log the layers whose sums, or biases, are clamped to the accumulator.

    Args:
        layers: The quantized layers by name, after one forward.
        statistics: Those that they were made with.
    """
    saturated: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, RangeLinearQuantParamLayerWrapper):
            continue
        if layer.output_params is None or layer.weight_params is None:
            continue
        record = statistics[name].output
        largest = _find_largest(layer, max(abs(record.min), abs(record.max)))
        if largest > get_quantized_range(layer.bits_accum)[1]:
            label = f"{name} ({largest:.3g})"
            saturated.setdefault(layer.bits_accum, []).append(label)
    for bits, labels in saturated.items():
        logger.warning(
            "sums beyond the accumulator of %d bits are clamped, and the outputs are wrong: %s; "
            "take fewer bits for activations or weights",
            bits,
            list_names(labels, _SHOWN_NAMES),
        )


def _find_largest(layer: RangeLinearQuantParamLayerWrapper, most: float) -> float:
    """The largest absolute sum of a layer, or code of its bias.

    Args:
        layer: The layer.
        most: The largest absolute output.
    """
    by_output = most * float(layer.accum_scale.max())
    # A channel of small weights has a large scale, and none of the largest outputs.
    largest = min(by_output, layer.find_bound())
    bias = layer.read_bias()
    if bias is None:
        return largest
    codes: torch.Tensor = bias.double() * layer.accum_scale.flatten()
    return max(largest, float(codes.abs().max()))
