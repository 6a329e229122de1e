"""Ranges from data: `Calibration`, a with-block around any forwards, and `calibrate_model`, the usual loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.errors import ArgumentError, CalibrationError
from qdq.nn import QuantMixin
from qdq.observers.max import reduce_amax
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.swap import quantized_layers
from qdq.trace import call_model, evaluating, require_batches

logger = logging.getLogger(__name__)

CALIB_METHODS = ("max", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class Range:
    """What calibration decided for one quantizer.

    Args:
        name: Dotted name of the quantizer.
        amax: The range; one number, or one for each channel. None if there is none.
        method: How it was solved.
        batches: How many batches it saw; 0 for weights, which are read directly.
        note: Empty, or why the layer was left in float.
    """

    name: str
    amax: float | list[float] | None
    method: str
    batches: int
    note: str = ""


class Calibration:
    """Collects ranges while the block runs and stores them when it ends.

    Inside the block the model is in evaluation mode, without gradients, and computes in float; every enabled input
    quantizer collects. At the end `amax` is solved, weights get the maximum of each channel, and all states are
    as before. If the block raises, no range is touched.

    A layer whose quantizer saw no batch, or zeros only, has no usable range. It is left in float: its quantizers are
    disabled, and `ranges` and a warning say so.

    Args:
        model: A swapped model.
        method: "max", "percentile", "entropy" or "mse", for inputs.
        percentile: 0 to 100, for "percentile".

    Raises:
        ArgumentError: Unknown method, percentile out of range, or nothing to calibrate.
        CalibrationError: NaN or Inf in the data or in a weight, with the layer and the batch; no data at all.
    """

    def __init__(self, model: nn.Module, method: str = "mse", percentile: float = 99.99) -> None:
        if method not in CALIB_METHODS:
            raise ArgumentError(
                f"unknown calibration method {method!r}; known are {', '.join(CALIB_METHODS)}.",
                "choose one of them with --calib-method (or method=).",
            )
        if not 0 < percentile <= 100:
            raise ArgumentError(
                f"percentile is {percentile}; it must be above 0 and at most 100.", "99.99 is the usual choice."
            )
        self._model = model
        self._method = method
        self._solver_arguments: dict[str, Any] = {"method": method}
        if method == "percentile":
            self._solver_arguments["percentile"] = percentile
        weights = {
            id(getattr(layer, attribute)): (name, layer, parameter)
            for name, layer in quantized_layers(model).items()
            if isinstance(layer, QuantMixin)
            for attribute, parameter in layer.weights_of(layer).items()
        }
        enabled = {name: quantizer for name, quantizer in named_quantizers(model) if not quantizer._disabled}
        if not enabled:
            raise ArgumentError(
                "the model has no enabled quantizer.", "call swap_modules first (or enable_quantization)."
            )
        self._weights = {name: weights[id(q)] for name, q in enabled.items() if id(q) in weights}
        # Everything else collects: the inputs of layers, and quantizers that stand in a forward by hand.
        self._collecting = {name: quantizer for name, quantizer in enabled.items() if name not in self._weights}
        if maxima := [name for name, q in self._collecting.items() if self._method_of(q) != method]:
            logger.info(
                "%d quantizers have a range for each index of an axis and take its maximum, not %s: %s",
                len(maxima), method, ", ".join(maxima),
            )  # fmt: skip
        self.ranges: list[Range] = []

    def __enter__(self) -> Calibration:
        with ExitStack() as exits:
            exits.enter_context(evaluating(self._model))
            for _, quantizer in named_quantizers(self._model):
                exits.callback(_restore, quantizer, quantizer._if_quant, quantizer._if_calib)
                quantizer._if_quant = quantizer._if_calib = False
            for quantizer in self._collecting.values():
                quantizer.set_calib_method("max" if self._method_of(quantizer) == "max" else "histogram")
                quantizer.enable_calib()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._exits.close()
        if error_type is None:
            self._solve()

    def _solve(self) -> None:
        if self._collecting and not any(map(_batches_of, self._collecting.values())):
            raise CalibrationError(
                "no batch reached any quantizer.", "give at least one batch, and one that the model runs on."
            )
        quantizers = dict(named_quantizers(self._model))
        weights = {name: _weight_amax(*place, quantizers[name].axis) for name, place in self._weights.items()}
        left = self._without_range()
        for name, quantizer in self._collecting.items():
            if name not in left:
                method = self._method_of(quantizer)
                quantizer.load_calib_amax(**({} if method == "max" else self._solver_arguments))
                self._record(name, quantizer, method, _batches_of(quantizer))
        for name, amax in weights.items():
            if name not in left:
                quantizers[name].amax = amax.cpu().numpy()
                self._record(name, quantizers[name], "max", 0)
        for name, note in left.items():
            quantizers[name].disable()
            self.ranges.append(Range(name, None, self._method, 0, f"left in float: {note}"))
        if left:
            names = "; ".join(f"{name} ({note})" for name, note in left.items() if name in self._collecting)
            logger.warning("some quantizers have no usable range, what they belong to is left in float: %s", names)

    def _without_range(self) -> dict[str, str]:
        """Quantizers that stay off and why: those that saw nothing, with all others of their layer (R-CONV-2)."""
        left = {name: note for name, q in self._collecting.items() if (note := _reason_without_range(q))}
        notes = {id(self._collecting[name]): note for name, note in left.items()}
        names = {id(q): name for name, q in named_quantizers(self._model)}
        for layer in quantized_layers(self._model).values():
            own = [id(quantizer) for quantizer in layer.quantizers().values()]
            if note := next((notes[identity] for identity in own if identity in notes), ""):
                enabled = (names[identity] for identity in own)
                left |= {name: left.get(name, note) for name in enabled if name in self._weights | self._collecting}
        return left

    def _method_of(self, quantizer: TensorQuantizer) -> str:
        """Histograms are per tensor; a quantizer with an axis that is no layer's `_weight_quantizer` takes maxima."""
        return self._method if quantizer.axis is None else "max"

    def _record(self, name: str, quantizer: TensorQuantizer, method: str, batches: int) -> None:
        assert quantizer.amax is not None  # noqa: S101
        values = quantizer.amax.flatten().tolist()
        self.ranges.append(Range(name, values[0] if quantizer.axis is None else values, method, batches))


def calibrate_model(
    model: nn.Module, batches: Iterable[Any], *, method: str = "mse", percentile: float = 99.99
) -> list[Range]:
    """Run the batches through the model and give every enabled quantizer its range.

    Args:
        model: A swapped model, on its device.
        batches: What the model is called with (see `trace.call_model`): tensors `[B, ...]`, `(inputs, labels)` or
            dictionaries. A hundred images or so are enough.
        method: "max", "percentile", "entropy" or "mse", for inputs; weights always take the maximum a channel.
        percentile: 0 to 100, for "percentile".

    Returns:
        One `Range` for each quantizer; `note` names those left in float.

    Raises:
        ArgumentError: As for `Calibration`.
        CalibrationError: As for `Calibration`.
    """
    require_batches(batches)
    with Calibration(model, method, percentile) as calibration:
        for number, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=None)):
            try:
                call_model(model, batch)
            except CalibrationError as error:
                raise CalibrationError(f"batch {number}: {error.message}", error.fix) from None
    return calibration.ranges


def _restore(quantizer: TensorQuantizer, if_quant: bool, if_calib: bool) -> None:
    quantizer._if_quant, quantizer._if_calib = if_quant, if_calib


def _batches_of(quantizer: TensorQuantizer) -> int:
    return 0 if quantizer._calibrator is None else quantizer._calibrator.num_batches


def _reason_without_range(quantizer: TensorQuantizer) -> str:
    if _batches_of(quantizer) == 0:
        return "it saw no batch: the layer did not run, or another module reads its weight directly"
    assert quantizer._calibrator is not None  # noqa: S101
    return "it saw zeros only" if quantizer._calibrator.saw_zeros_only() else ""


def _weight_amax(name: str, layer: QuantMixin, parameter: str, axis: int | None) -> torch.Tensor:
    weight = layer._parameters[parameter]
    assert weight is not None  # noqa: S101
    amax = reduce_amax(weight, axis)
    if not bool(torch.isfinite(amax).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise CalibrationError(
            f"{name or 'the model'}.{parameter} holds {bad} NaN or Inf of {weight.numel()} values.",
            "load other weights: this model was broken before quantization.",
        )
    return amax
