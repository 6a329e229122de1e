"""`calibrate_inputs`: the ranges that a number system does not give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qdq.calibrate import Range, calibrate_model
from qdq.calibrate.weights import KEEP
from qdq.quantizer import named_quantizers


def calibrate_inputs(
    model: nn.Module, batches: Iterable[Any], *, method: str = "mse"
) -> list[Range]:
    """Calibrate the quantizers that have no range; all others keep theirs, which are those of the number system.

    Args:
        model: A model after `to_tensorrt`.
        batches: As for `calibrate_model`.
        method: As for `calibrate_model`.

    Returns:
        The new ranges.

    Raises:
        ArgumentError: As for `calibrate_model`.
        CalibrationError: As for `calibrate_model`.
        DataError: As for `calibrate_model`.
    """
    known = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.amax is not None:
            known[name] = quantizer.amax.detach().clone()
    ranges = calibrate_model(model, batches, method=method, weight_method=KEEP)
    for name, quantizer in named_quantizers(model):
        if name in known:
            quantizer.amax = known[name]
    return [entry for entry in ranges if entry.name not in known]
