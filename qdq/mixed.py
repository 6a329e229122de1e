"""A format for each layer, int8 or FP8: what the GPU has, chosen by the error that each causes alone.

The statistics of calibration are the same for both formats, so one pass serves them, and several targets.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from qdq.batch import list_filled_batches
from qdq.calibrate.collect import Collection, WeightSite
from qdq.calibrate.weights import require_weight_method, solve_weight
from qdq.corrections import redoing_passes
from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.float_rules import ONLY_PRODUCTS, reason_against_fp8
from qdq.formats import (
    FLOAT,
    FORMAT_NAMES,
    FP8,
    FP8_BITS,
    FP8_LEAST_SM,
    INT8,
    NumBits,
    require_precisions,
)
from qdq.forward import require_model, trace_forward
from qdq.metrics import decide_db, pair_arrays, sqnr_db
from qdq.nn import QuantMixin
from qdq.observers.solve import require_method
from qdq.outputs import Mask, Selection
from qdq.predictor import predict
from qdq.quantizer import TensorQuantizer, disable_quantization
from qdq.rewire import list_attention
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
    earlier: Sequence[FormatChoice] = (),
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> FormatChoice:
    """Give each layer int8 or FP8, whichever causes the smaller error of the outputs alone; in place.

    Layers whose inputs have one range get one format. Attention is FP8, or float on a GPU without FP8. In a layer that
    gets FP8, the quantizers that exist for int8 only, such as those of the shortcut after it, are switched off. What is
    off stays off when the formats are chosen again, for another GPU.

    Args:
        model: A model after `swap_modules` and `rewire_operations` with formats=("int8", "fp8"), calibrated.
        batches: Samples to measure on, as for `predict`; iterated once and kept.
        statistics: Those that it was calibrated from.
        sm: Compute capability of the target, 89 for 8.9.
        method: Method of the ranges of activations, for both formats; one that FP8 has.
        weight_method: Method of the ranges of weights.
        pinned: Layer, or pattern of layers -> its precision, "int8", "fp8" or "float", decided already; "float" decides
            nothing here.
        earlier: Choices for other GPUs, in copies of this model on these batches: their errors are not measured again.
        outputs: As for `predict`.
        mask: As for `predict`.

    Returns:
        The format of each layer, with the SQNR of both.

    Raises:
        ArgumentError: An unknown precision or method, a method that FP8 does not have, a name that nothing quantized
            has, or a format that a pinned layer cannot have; nothing is changed then.
        ArgumentTypeError: `sm` is not a whole number.
        StateError: Nothing is quantized, a quantizer has no range, or a call was rewired for FP8 alone.
    """
    require_model(model)
    require_method(method, FP8)
    require_weight_method(weight_method)
    _require_sm(sm)
    pinned = pinned or {}
    require_precisions(pinned)
    samples = list_filled_batches(batches)
    with redoing_passes(model):
        with disable_quantization(model):
            trace = trace_forward(model, samples[0])
        units = find_units(model, samples[0], trace)
        decided = match_precisions(model, [unit.name for unit in units], pinned)
        groups = _list_groups(model, units, list_attention(Dataflow(trace)), sm)
        pins = [_find_pin(group, decided) for group in groups]

        measured = _list_measured(earlier)
        ranges = _Ranges(model, statistics, method, weight_method)
        _return_to_int8(groups, ranges)
        trial = _Trial(model, samples, ranges, outputs, mask)
        choices = []
        progress = tqdm(groups, desc="formats", unit="layer", disable=None)
        for group, pin in zip(progress, pins, strict=True):
            choices.append(_choose(group, pin, trial, measured))
        for group, choice in zip(groups, choices, strict=True):
            _apply(group, choice.format, ranges)
        _disable_followers(groups)
        _require_one_format(groups)
    return FormatChoice(sm, tuple(choices))


def _require_sm(sm: int) -> None:
    """Refuse what is no compute capability.

    Raises:
        ArgumentTypeError: It is not a whole number.
    """
    if isinstance(sm, bool) or not isinstance(sm, int):
        raise ArgumentTypeError(
            f"sm is {sm!r}, of type {type(sm).__name__}; expected a whole number, 89 for 8.9.",
            "pass sm=89, or sm=qdq.find_target_sm('l4').",
        )


@dataclass(frozen=True)
class _Group:
    """Layers and calls whose inputs have one range.

    Args:
        unit: The layers, the calls and all quantizers that are on.
        weighted: The layers that have a weight, by dotted name.
        operands: The quantizers at inputs and weights of these layers. The others serve int8 only, and may have the
            range of another group.
        formats: The formats that it can have.
        reason: Why it cannot have the others; "" if it can have int8 and FP8.
        is_attention: Whether it is a product of attention.
    """

    unit: Unit
    weighted: Mapping[str, QuantMixin]
    operands: tuple[TensorQuantizer, ...]
    formats: tuple[str, ...]
    reason: str
    is_attention: bool


def _list_groups(
    model: nn.Module, units: list[Unit], attention: Container[str], sm: int
) -> list[_Group]:
    """The groups of a model.

    Args:
        model: The model.
        units: Its layers and calls.
        attention: The calls that are products of attention.
        sm: As for `choose_formats`.

    Raises:
        StateError: Another call is FP8.
    """
    modules = dict(model.named_modules())
    called = _list_called_ranges(units, modules)
    groups = []
    for unit in group_units(model, units, "shared"):
        weighted: dict[str, QuantMixin] = {}
        operands: list[TensorQuantizer] = []
        for name in unit.layers:
            layer = modules.get(name)
            if isinstance(layer, QuantMixin):
                weighted[name] = layer
                operands += [
                    quantizer
                    for quantizer in layer.quantizers().values()
                    if quantizer in unit.quantizers
                ]
        is_attention = unit.name in attention
        if not is_attention and unit.name not in modules and unit.quantizers[0].format.is_float:
            raise StateError(
                f"the call {unit.name} is quantized to FP8 alone.",
                "swap and rewire the float model with formats=('int8', 'fp8'), and calibrate it again.",
            )
        formats, reason = _list_formats(unit, weighted, called, sm, is_attention=is_attention)
        groups.append(_Group(unit, weighted, tuple(operands), formats, reason, is_attention))
    return groups


def _list_called_ranges(
    units: list[Unit], modules: Mapping[str, nn.Module]
) -> set[TensorQuantizer]:
    """The quantizers that hold the ranges of calls which are units of their own."""
    called: set[TensorQuantizer] = set()
    for unit in units:
        if unit.name not in modules:
            called.update(quantizer.leader for quantizer in unit.quantizers)
    return called


def _list_formats(
    unit: Unit,
    weighted: Mapping[str, QuantMixin],
    called: Container[TensorQuantizer],
    sm: int,
    *,
    is_attention: bool,
) -> tuple[tuple[str, ...], str]:
    """The formats that a group can have, and why it cannot have the others."""
    has_fp8 = sm >= FP8_LEAST_SM
    if is_attention and has_fp8:
        return (FP8.name,), "attention is quantized in FP8 only"
    if is_attention:
        return (FLOAT,), f"SM {sm} has no FP8, and int8 attention is slow"
    if not has_fp8:
        return (INT8,), f"SM {sm} has no FP8"
    if unit.quantizers[0].leader in called:  # all inputs of the group have this range
        return (INT8,), "a function call is quantized with it"
    if not weighted:
        return (INT8,), ONLY_PRODUCTS
    for layer in weighted.values():
        if reason := reason_against_fp8(layer):
            return (INT8,), reason
    return FORMAT_NAMES, ""


def _find_pin(group: _Group, decided: Mapping[str, str]) -> str | None:
    """The format that a plan sets for a group; None if it sets none.

    Args:
        group: The group.
        decided: Layer -> its precision.

    Raises:
        ArgumentError: Layers of the group are pinned to different formats, or to one that it cannot have.
    """
    pins = {name: decided[name] for name in group.unit.layers if name in decided}
    formats = {name: precision for name, precision in pins.items() if precision != FLOAT}
    if not formats:
        return None
    first, pin = next(iter(formats.items()))
    for name, other in formats.items():
        if other != pin:
            raise ArgumentError(
                f"{first} is pinned to {pin} and {name} to {other}, but their inputs have one range.",
                "pin both to one format.",
            )
    if pin not in group.formats:
        raise ArgumentError(
            f"{first} is pinned to {pin}, which it cannot have: {group.reason}.",
            f"pin it to {' or '.join(dict.fromkeys([*group.formats, FLOAT]))}.",
        )
    return pin


def _return_to_int8(groups: list[_Group], ranges: _Ranges) -> None:
    """Make all groups int8 but attention: some are FP8 after an earlier choice, or if the swap had FP8 first."""
    for group in groups:
        if not group.is_attention:
            for quantizer in group.unit.quantizers:
                ranges.change(quantizer, INT8)


def _list_measured(choices: Iterable[FormatChoice]) -> dict[tuple[str, ...], tuple[float, float]]:
    """Layers of a group -> SQNR in dB with them in int8, and in FP8, of all groups that were measured."""
    measured = {}
    for choice in choices:
        for entry in choice.choices:
            if entry.int8_db is not None and entry.fp8_db is not None:
                measured[entry.layers] = (entry.int8_db, entry.fp8_db)
    return measured


def _choose(
    group: _Group,
    pin: str | None,
    trial: _Trial,
    measured: Mapping[tuple[str, ...], tuple[float, float]],
) -> LayerFormat:
    """The format of a group.

    Args:
        group: The group.
        pin: The format that a plan sets for it; None if it sets none.
        trial: Measures it.
        measured: From `_list_measured`.
    """
    layers = group.unit.layers
    if len(group.formats) == 1:
        return LayerFormat(layers, group.formats[0], group.reason)
    if pin is not None:
        return LayerFormat(layers, pin, "pinned by the plan")
    int8_db, fp8_db = measured.get(layers) or trial.measure(group)
    better = FP8.name if fp8_db > int8_db else INT8
    return LayerFormat(layers, better, "the smaller error", int8_db, fp8_db)


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

    def change(self, quantizer: TensorQuantizer, name: str) -> None:
        """Make a quantizer, or its leader, one of int8 or FP8, with a range; one that has the format stays.

        Args:
            quantizer: The quantizer.
            name: "int8" or "fp8".

        Raises:
            ArgumentError: The statistics do not have its tensor.
        """
        leader = quantizer.leader
        if leader.is_fixed or leader.format.is_float == (name == FP8.name):
            return
        site = self._weights.get(self._names[leader])
        if site is not None:
            leader.set_format(*_describe_weight(site, name))
            leader.amax = solve_weight(site.label, site.weight, leader, self._weight_method)
            return
        tensor = self._statistics.tensors.get(self._names[leader])
        if tensor is None:
            raise ArgumentError(
                f"the statistics have no tensor {self._names[leader]!r}.",
                "pass the statistics that the model was calibrated from.",
            )
        leader.set_format(FP8_BITS if name == FP8.name else 8)
        leader.amax = leader.solve_range(tensor, self._method)


def _describe_weight(site: WeightSite, name: str) -> tuple[NumBits, int | None]:
    """Width and axis of a weight in a format, "int8" or "fp8": those that `swap_modules` gives it."""
    if name == FP8.name:
        return FP8_BITS, None
    assert isinstance(site.layer, QuantMixin)  # noqa: S101  # it has a weight
    desc = site.layer.default_quant_desc_weight
    return desc.num_bits, desc.axis


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

    def measure(self, group: _Group) -> tuple[float, float]:
        """SQNR in dB with the group in int8, and with it in FP8; the group is in int8 afterwards."""
        leaders = list(dict.fromkeys(quantizer.leader for quantizer in group.operands))
        int8_db = self._measure_once(group.unit.quantizers)
        with _restoring_formats(leaders):
            for leader in leaders:
                self._ranges.change(leader, FP8.name)
            fp8_db = self._measure_once(group.operands)
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


def _apply(group: _Group, chosen: str, ranges: _Ranges) -> None:
    """Give a group its format; it is int8, attention is FP8."""
    if chosen == FLOAT:
        for quantizer in group.unit.quantizers:
            quantizer.disable()
    elif chosen == FP8.name and not group.is_attention:
        for quantizer in group.unit.quantizers:
            if quantizer not in group.operands:
                quantizer.disable()  # it serves int8 only
        for quantizer in group.operands:
            ranges.change(quantizer, FP8.name)


def _disable_followers(groups: list[_Group]) -> None:
    """Switch off the quantizers of sums whose range has become one of FP8 with another group."""
    for group in groups:
        if group.is_attention:
            continue
        for quantizer in group.unit.quantizers:
            if quantizer.format.is_float and quantizer not in group.operands:
                quantizer.disable()


def _require_one_format(groups: list[_Group]) -> None:
    """Refuse a layer whose input and weight differ in format: TensorRT would compute it in float.

    Raises:
        StateError: With the layer.
    """
    for group in groups:
        for name, layer in group.weighted.items():
            enabled = [
                quantizer for quantizer in layer.quantizers().values() if quantizer.is_enabled
            ]
            formats = sorted({quantizer.format.name for quantizer in enabled})
            if len(formats) > 1:
                raise StateError(
                    f"the operands of {name} have the formats {' and '.join(formats)}.",
                    "swap and rewire the float model with formats=('int8', 'fp8'), and calibrate it again.",
                )
