"""A format for each layer, int8 or FP8: what the GPU has, chosen by the error that each causes alone.

The statistics of calibration are the same for both formats, so one pass serves them, and several targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from qdq.batch import list_filled_batches
from qdq.calibrate.collect import Collection
from qdq.calibrate.weights import solve_weight
from qdq.corrections import redoing_passes
from qdq.errors import ArgumentError, StateError
from qdq.float_rules import ONLY_PRODUCTS, reason_against_fp8
from qdq.formats import FP8, FP8_BITS, FP8_LEAST_SM, INT8
from qdq.forward import require_model
from qdq.metrics import decide_db, pair_arrays, sqnr_db
from qdq.nn import QuantMixin
from qdq.outputs import Mask, Selection
from qdq.predictor import predict
from qdq.quantizer import TensorQuantizer, disable_quantization
from qdq.statistics import Statistics
from qdq.units import Unit, find_units, group_units, match_precisions


@dataclass(frozen=True)
class LayerFormat:
    """The format of layers whose inputs have one range.

    Args:
        layers: The layers and calls, by dotted name.
        format: "int8", "fp8" or "float".
        reason: Why, in one sentence.
        int8_db: SQNR of the outputs with these layers alone in int8, in dB; None if it was not measured.
        fp8_db: The same for FP8.
    """

    layers: tuple[str, ...]
    format: str
    reason: str
    int8_db: float | None = None
    fp8_db: float | None = None


@dataclass(frozen=True)
class FormatChoice:
    """Result of `choose_formats`.

    Args:
        sm: Compute capability of the target, 89 for 8.9.
        choices: One for each group of layers, in the order of the model.
    """

    sm: int
    choices: tuple[LayerFormat, ...]

    @property
    def formats(self) -> dict[str, str]:
        """Layer or call -> "int8", "fp8" or "float"."""
        formats = {}
        for choice in self.choices:
            formats.update(dict.fromkeys(choice.layers, choice.format))
        return formats

    def format_table(self) -> str:
        """The counts, then one line for each group of layers."""
        formats = list(self.formats.values())
        counts = ", ".join(f"{formats.count(name)} {name}" for name in dict.fromkeys(formats))
        width = max((len(choice.layers[0]) for choice in self.choices), default=0)
        lines = [f"formats for SM {self.sm}: {counts}"]
        for choice in self.choices:
            more = f" and {len(choice.layers) - 1} more" if len(choice.layers) > 1 else ""
            cells = [f"  {choice.layers[0]:{width}}", f"{choice.format:5}"]
            cells += [_format_db(choice.int8_db), _format_db(choice.fp8_db), choice.reason + more]
            lines.append("  ".join(cells))
        return "\n".join(lines)


def _format_db(decibels: float | None) -> str:
    return "      -" if decibels is None else f"{decibels:7.2f}"


def choose_formats(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Statistics,
    *,
    sm: int,
    method: str = "mse",
    weight_method: str = "max",
    pinned: Mapping[str, str] | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> FormatChoice:
    """Give each layer int8 or FP8, whichever causes the smaller error of the outputs alone; in place.

    Layers whose inputs have one range get one format. Attention is FP8, or float on a GPU without FP8. In a layer that
    gets FP8, the quantizers that exist for int8 only, such as those of the shortcut after it, are switched off.

    Args:
        model: A model after `swap_modules` and `rewire_operations` with formats=("int8", "fp8"), calibrated.
        batches: Samples to measure on, as for `predict`; iterated once and kept.
        statistics: Those that it was calibrated from.
        sm: Compute capability of the target, 89 for 8.9.
        method: Method of the ranges of activations, for both formats; one that FP8 has.
        weight_method: Method of the ranges of weights.
        pinned: Layer, or pattern of layers -> its precision, decided already; "float" decides nothing here.
        outputs: As for `predict`.
        mask: As for `predict`.

    Returns:
        The format of each layer, with the SQNR of both.

    Raises:
        ArgumentError: A method that FP8 does not have, or a name that nothing quantized has.
        StateError: Nothing is quantized, or a quantizer has no range.
    """
    require_model(model)
    samples = list_filled_batches(batches)
    with redoing_passes(model):
        units = find_units(model, samples[0])
        decided = match_precisions(model, [unit.name for unit in units], pinned or {})
        ranges = _Ranges(model, statistics, method, weight_method)
        trial = _Trial(model, samples, ranges, outputs, mask)
        choices = []
        groups = group_units(model, units, "shared")
        called = _list_called_ranges(model, units)
        for group in tqdm(groups, desc="formats", unit="layer", disable=None):
            choices.append(_choose(model, group, trial, sm, decided, called))
        for group, choice in zip(groups, choices, strict=True):
            _apply(model, group, choice.format, ranges)
        _disable_followers(model, groups)
        _require_one_format(model, groups)
    return FormatChoice(sm, tuple(choices))


def _choose(
    model: nn.Module,
    group: Unit,
    trial: _Trial,
    sm: int,
    decided: Mapping[str, str],
    called: set[TensorQuantizer],
) -> LayerFormat:
    """The format of a group of layers; `called` are the ranges of function calls."""
    has_fp8 = sm >= FP8_LEAST_SM
    pins = {decided[name] for name in group.layers if name in decided} - {"float"}
    if _is_fp8(group):
        if has_fp8:
            return LayerFormat(group.layers, FP8.name, "attention is quantized in FP8 only")
        return LayerFormat(group.layers, "float", f"SM {sm} has no FP8, and int8 attention is slow")
    if not has_fp8:
        return LayerFormat(group.layers, INT8, f"SM {sm} has no FP8")
    if pins:
        return LayerFormat(group.layers, min(pins), "pinned by the plan")
    reason = _reason_against_fp8(model, group, called)
    if reason:
        return LayerFormat(group.layers, INT8, reason)
    int8_db, fp8_db = trial.measure(group)
    if fp8_db > int8_db:
        return LayerFormat(group.layers, FP8.name, "the smaller error", int8_db, fp8_db)
    return LayerFormat(group.layers, INT8, "the smaller error", int8_db, fp8_db)


def _is_fp8(group: Unit) -> bool:
    return all(quantizer.format.is_float for quantizer in group.quantizers)


def _list_called_ranges(model: nn.Module, units: list[Unit]) -> set[TensorQuantizer]:
    """The quantizers that hold the ranges of function calls which are quantized for themselves."""
    modules = dict(model.named_modules())
    called: set[TensorQuantizer] = set()
    for unit in units:
        if unit.name not in modules:
            called.update(quantizer.leader for quantizer in unit.quantizers)
    return called


def _reason_against_fp8(model: nn.Module, group: Unit, called: set[TensorQuantizer]) -> str:
    """Why a group stays in int8 without being measured; "" if both formats are possible."""
    if group.quantizers[0].leader in called:  # all inputs of a group have this range
        return "a function call is quantized with it"
    weighted = _list_weighted(model, group)
    if not weighted:
        return ONLY_PRODUCTS
    reasons = [reason_against_fp8(layer) for layer in weighted.values()]
    return next(filter(None, reasons), "")


def _list_weighted(model: nn.Module, group: Unit) -> dict[str, QuantMixin]:
    """The layers of a group that have a weight, by dotted name."""
    modules = dict(model.named_modules())
    weighted = {}
    for name in group.layers:
        layer = modules.get(name)
        if isinstance(layer, QuantMixin):
            weighted[name] = layer
    return weighted


def _list_operands(model: nn.Module, group: Unit) -> list[TensorQuantizer]:
    """The quantizers of a group that are on at inputs and weights of layers with a weight."""
    operands = []
    for layer in _list_weighted(model, group).values():
        for quantizer in layer.quantizers().values():
            if quantizer in group.quantizers:
                operands.append(quantizer)
    return operands


class _Ranges:
    """Changes the format of quantizers, and gives them ranges of the new format.

    Args:
        model: The model.
        statistics: Those of its activations.
        method: As for `choose_formats`.
        weight_method: Likewise.
    """

    def __init__(
        self, model: nn.Module, statistics: Statistics, method: str, weight_method: str
    ) -> None:
        collection = Collection(model)
        self._names = collection.names
        self._weights = collection.weights
        self._statistics = statistics
        self._method = method
        self._weight_method = weight_method

    def change(self, quantizer: TensorQuantizer) -> None:
        """Make a quantizer of int8, or its leader, one of FP8, with a range."""
        leader = quantizer.leader
        if leader.is_fixed or leader.format.is_float:
            return
        name = self._names[leader]
        if name in self._weights:
            site = self._weights[name]
            leader.set_format(FP8_BITS)
            leader.amax = solve_weight(site.label, site.weight, leader, self._weight_method)
            return
        if name not in self._statistics.tensors:
            raise ArgumentError(
                f"the statistics have no tensor {name!r}.",
                "pass the statistics that the model was calibrated from.",
            )
        leader.set_format(FP8_BITS)
        leader.amax = leader.solve_range(self._statistics.tensors[name], self._method)


class _Trial:
    """Measures the outputs with one group of layers quantized.

    Args:
        model: The model.
        samples: The batches.
        ranges: Changes formats.
        outputs: As for `predict`.
        mask: As for `predict`.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: list[Any],
        ranges: _Ranges,
        outputs: Selection | None,
        mask: Mask | None,
    ) -> None:
        self._model = model
        self._samples = samples
        self._ranges = ranges
        self._view: dict[str, Any] = {"outputs": outputs, "mask": mask}
        with disable_quantization(model):
            self._expected = predict(model, samples, **self._view)

    def measure(self, group: Unit) -> tuple[float, float]:
        """SQNR in dB with the group in int8, and with it in FP8; the group is in int8 afterwards."""
        operands = _list_operands(self._model, group)
        leaders = list(dict.fromkeys(quantizer.leader for quantizer in operands))
        int8_db = self._measure_once(group.quantizers)
        with _restoring_formats(leaders):
            for leader in leaders:
                self._ranges.change(leader)
            fp8_db = self._measure_once(operands)
        return int8_db, fp8_db

    def _measure_once(self, quantizers: Iterable[TensorQuantizer]) -> float:
        with disable_quantization(self._model):
            for quantizer in quantizers:
                quantizer.enable()
            outputs = predict(self._model, self._samples, **self._view)
        decibels = {}
        for name, pair in pair_arrays(self._expected, outputs).items():
            decibels[name] = sqnr_db(*pair)
        return decide_db(decibels)


@contextmanager
def _restoring_formats(leaders: list[TensorQuantizer]) -> Iterator[None]:
    """Restore formats and ranges on exit."""
    former = [(leader, leader.num_bits, leader.axis, leader.amax) for leader in leaders]
    try:
        yield
    finally:
        for leader, num_bits, axis, amax in former:
            leader.set_format(num_bits, axis)
            if amax is not None:
                leader.amax = amax


def _apply(model: nn.Module, group: Unit, chosen: str, ranges: _Ranges) -> None:
    """Give a group its format."""
    if chosen == "float":
        for quantizer in group.quantizers:
            quantizer.disable()
    elif chosen == FP8.name and not _is_fp8(group):
        operands = _list_operands(model, group)
        for quantizer in group.quantizers:
            if quantizer not in operands:
                quantizer.disable()  # it serves int8 only; its range may be that of another group
        for quantizer in operands:
            ranges.change(quantizer)


def _disable_followers(model: nn.Module, groups: list[Unit]) -> None:
    """Switch off the quantizers of layers in int8 on shortcuts whose range has become one of FP8."""
    for group in groups:
        if _is_fp8(group):
            continue
        operands = _list_operands(model, group)
        for quantizer in group.quantizers:
            if quantizer.format.is_float and quantizer not in operands:
                quantizer.disable()


def _require_one_format(model: nn.Module, groups: list[Unit]) -> None:
    """Refuse a layer whose input and weight differ in format: TensorRT would compute it in float.

    Raises:
        StateError: With the layer.
    """
    for group in groups:
        for name, layer in _list_weighted(model, group).items():
            enabled = [
                quantizer for quantizer in layer.quantizers().values() if quantizer.is_enabled
            ]
            formats = sorted({quantizer.format.name for quantizer in enabled})
            if len(formats) > 1:
                raise StateError(
                    f"the operands of {name} have the formats {' and '.join(formats)}.",
                    "swap and rewire the float model with formats=('int8', 'fp8'), and calibrate it again.",
                )
