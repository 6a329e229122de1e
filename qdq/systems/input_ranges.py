"""`calibrate_inputs`: the ranges that a number system does not give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qdq.calibrate import CALIB_METHODS, Range, calibrate_model
from qdq.calibrate.weights import KEEP
from qdq.forward import require_model
from qdq.quantizer import named_quantizers
from qdq.systems.ranged import RangedQuantizer, collect_ranges, list_moving
from qdq.systems.settings import require_choice


def calibrate_inputs(
    model: nn.Module, batches: Iterable[Any], *, method: str = "mse"
) -> list[Range]:
    """Calibrate the quantizers that have no range; all others keep theirs, which are those of the number system.

    Before `to_tensorrt`, the quantizers whose range is that of each batch (min-max, acoustic) get that of all batches.
    They use it from then on, it is in their state dict, and `to_tensorrt` can convert them. After `to_tensorrt`, the
    quantizers for which the system had no range get one.

    Args:
        model: A model of a number system.
        batches: As for `calibrate_model`.
        method: As for `calibrate_model`, after `to_tensorrt`. Before, the range is always the smallest and the largest
            value.

    Returns:
        The new ranges.

    Raises:
        ArgumentError: As for `calibrate_model`; empty or non-finite values.
        ArgumentTypeError: Not a module, or one tensor instead of batches.
        CalibrationError: As for `calibrate_model`.
        DataError: As for `calibrate_model`.
        StateError: No batch reaches a quantizer, or several processes calibrate min-max ranges.
    """
    require_model(model)
    require_choice(method, CALIB_METHODS, "method", "calibrate_inputs")
    moving = list_moving(model)
    if moving:
        return _record(model, moving, batches)
    known = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.amax is not None:
            known[name] = quantizer.amax.detach().clone()
    ranges = calibrate_model(model, batches, method=method, weight_method=KEEP)
    for name, quantizer in named_quantizers(model):
        if name in known:
            quantizer.amax = known[name]
    return [entry for entry in ranges if entry.name not in known]


def _record(
    model: nn.Module, quantizers: Mapping[str, RangedQuantizer], batches: Iterable[Any]
) -> list[Range]:
    num_batches = collect_ranges(model, quantizers, batches)
    ranges = []
    for name, quantizer in quantizers.items():
        amax = max(abs(quantizer.read_number("low")), abs(quantizer.read_number("high")))
        ranges.append(Range(name, amax, "min-max", num_batches))
    return ranges
