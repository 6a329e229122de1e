"""Sums within the codes of the accumulator; the first time that some are beyond, a line says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from qdq.distiller.ranges.modes import get_quantized_range

if TYPE_CHECKING:
    from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper

logger = logging.getLogger(__name__)


def clamp_sums(
    layer: RangeLinearQuantWrapper,
    sums: torch.Tensor,
    *,
    can_exceed: bool,
    kind: str = "sums",
) -> torch.Tensor:
    """Clamp sums, or codes of a bias, in place.

    Args:
        layer: The layer, which logs once how many there were beyond its accumulator.
        sums: Integers in float32 or float64.
        can_exceed: Whether there may be any. To count them waits for a GPU.
        kind: What they are, for the message.

    Returns:
        The same tensor.
    """
    lowest, highest = get_quantized_range(layer.bits_accum)
    if can_exceed and layer.reports_saturation:
        num_beyond = int(((sums < lowest) | (sums > highest)).sum())
        if num_beyond:
            layer.reports_saturation = False
            logger.warning(
                "%s: %d of %d %s are beyond the accumulator of %d bits and are clamped, so its outputs are wrong; "
                "take fewer bits for activations or weights (this is said once)",
                layer.label,
                num_beyond,
                sums.numel(),
                kind,
                layer.bits_accum,
            )
    return sums.clamp_(lowest, highest)
