"""The scale and zero point that travel with a tensor, from the layer that has rounded it to those that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qdq.distiller.ranges.linear_params import LinearParams

if TYPE_CHECKING:
    from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper

_ATTRIBUTE = "quant_metadata"
_STATE = "is_quant_state"


@dataclass(frozen=True)
class QuantMetadata:
    """How a tensor was quantized.

    Args:
        params: Its scale, zero point, width and mode.
        source: The layer that has rounded it.
        version: Number of changes in place that the tensor had then; after another one, such as `x += y`, its values
            are no codes.
    """

    params: LinearParams
    source: RangeLinearQuantWrapper
    version: int


def attach(
    values: torch.Tensor, params: LinearParams, source: RangeLinearQuantWrapper
) -> torch.Tensor:
    """Note on a tensor how it was quantized. Any function makes a new tensor without the note.

    Args:
        values: A tensor that nothing else holds, and no inference tensor, which does not count its changes.
        params: Its scale, zero point, width and mode.
        source: The layer that has rounded it.

    Returns:
        The same tensor.
    """
    setattr(values, _ATTRIBUTE, QuantMetadata(params, source, values._version))
    return values


def read_metadata(values: torch.Tensor) -> QuantMetadata | None:
    """How a tensor was quantized; None if it does not say so, or has changed since.

    Args:
        values: Any tensor.
    """
    metadata: QuantMetadata | None = getattr(values, _ATTRIBUTE, None)
    if metadata is None or values._version != metadata.version:
        return None
    return metadata


def mark_state(values: torch.Tensor) -> torch.Tensor:
    """Note on a tensor that it starts a recurrence: the next time step gets the result of a layer in its place.

    Without a scale of its own it takes the scale of that layer, so that all time steps have one.

    Args:
        values: The initial state.

    Returns:
        The same tensor.
    """
    setattr(values, _STATE, True)
    return values


def is_state(values: torch.Tensor) -> bool:
    """Whether a tensor starts a recurrence, see `mark_state`.

    Args:
        values: Any tensor.
    """
    return getattr(values, _STATE, False)
