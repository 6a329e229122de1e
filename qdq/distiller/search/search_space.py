"""What LAPQ searches: the scales of all layers, or the ranges that get codes, as one vector of numbers.

Scales of channels are one number: they change by one factor. A range has one number, its largest absolute value, or
two, its ends. Ends that are 0 stay 0, such as the lower one behind a ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.post_training.adjust import list_clipping, list_params
from qdq.distiller.search.minimize import Vector
from qdq.errors import ArgumentError
from qdq.text import list_names

_SCALE = "_scale"
_WEIGHT_SCALE = "w_scale"
_SHOWN_LAYERS = 8

Layers = Mapping[str, RangeLinearQuantWrapper]
"""Name -> quantized layer."""


@dataclass(frozen=True)
class _Searched:
    """A parameter of a layer.

    Args:
        start: Its value at the start, one row for each number: float64 `[numbers, channels]`.
        shape: The shape that it has in the layer.
    """

    start: torch.Tensor
    shape: torch.Size

    @property
    def numbers(self) -> torch.Tensor:
        """The largest value of each row, with its sign."""
        largest = self.start.abs().argmax(1, keepdim=True)
        return self.start.gather(1, largest).flatten()

    def scale_to(self, numbers: torch.Tensor) -> torch.Tensor:
        """The value with other numbers.

        Args:
            numbers: One for each row; 0 where it is 0 at the start.
        """
        first = self.numbers
        factors = torch.where(first == 0, 1.0, numbers / first)
        return (self.start * factors[:, None]).float().reshape(self.shape)


class SearchSpace:
    """The parameters that are searched, in the order of the layers.

    Args:
        layers: The quantized layers, with their float weights.
        clipping: Search ranges instead of scales.

    Raises:
        ArgumentError: Nothing can be searched; or a zero point depends on its scale, and scales are searched.
    """

    def __init__(self, layers: Layers, clipping: bool) -> None:
        if clipping:
            values = list_clipping(layers)
        else:
            _require_fixed_zero_points(layers)
            values = _list_scales(layers)
        if not values:
            raise ArgumentError(
                "no layer has a scale of its own: all are float, or dynamic.",
                "give bits and statistics.",
            )
        self._searched: dict[str, _Searched] = {}
        for name, value in values.items():
            wide = value.detach().cpu().double()
            num_rows = 2 if clipping and _is_window(layers, name) else 1
            self._searched[name] = _Searched(wide.reshape(num_rows, -1), value.shape)

    @property
    def start(self) -> Vector:
        """The numbers at the start."""
        numbers = [searched.numbers for searched in self._searched.values()]
        return torch.cat(numbers).numpy()

    def values_at(self, numbers: Vector) -> dict[str, torch.Tensor]:
        """Name of a parameter -> its value.

        Args:
            numbers: Of the length and the signs of `start`.
        """
        sizes = [len(searched.start) for searched in self._searched.values()]
        parts = np.split(np.array(numbers), np.cumsum(sizes)[:-1])
        values = {}
        for (name, searched), part in zip(self._searched.items(), parts, strict=True):
            values[name] = searched.scale_to(torch.from_numpy(part))
        return values


def _list_scales(layers: Layers) -> dict[str, torch.Tensor]:
    return {name: value for name, value in list_params(layers).items() if name.endswith(_SCALE)}


def _is_window(layers: Layers, name: str) -> bool:
    """Whether a range has two ends: that of an asymmetric mode."""
    layer_name, _, attribute = name.rpartition(".")
    mode = layers[layer_name].settings.mode
    of_tensor = mode.weights if attribute == "weight_clipping" else mode.activations
    return not of_tensor.is_symmetric


def _require_fixed_zero_points(layers: Layers) -> None:
    """Refuse asymmetric ranges with two ends: their zero points change with their scales.

    Raises:
        ArgumentError: There are some.
    """
    problems = []
    for name in _list_scales(layers):
        layer_name, _, attribute = name.rpartition(".")
        settings = layers[layer_name].settings
        if attribute == _WEIGHT_SCALE:
            if not settings.mode.weights.is_symmetric:
                problems.append(f"weight of {layer_name} ({settings.mode.weights.name})")
        elif not settings.mode.activations.is_symmetric and not settings.clip_half_range:
            problems.append(f"output of {layer_name} ({settings.mode.activations.name})")
    if problems:
        raise ArgumentError(
            f"LAPQ searches scales, and the zero point depends on the scale in the "
            f"{list_names(problems, _SHOWN_LAYERS)}.",
            "set search_clipping (--lapq-search-clipping), or take symmetric modes.",
        )
