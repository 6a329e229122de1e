"""A format for each layer, int8 or FP8: what the GPU has, chosen by the error of the whole model.

The statistics of calibration are the same for both formats, so one pass serves them, and several targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from qdq.analyze.fingerprint import fingerprint_analysis
from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.batch import list_filled_batches
from qdq.calibrate.collect import Collection, WeightSite
from qdq.calibrate.weights import require_weight_method, solve_weight
from qdq.corrections import redoing_passes
from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.files import as_path
from qdq.float_rules import (
    ONLY_PRODUCTS,
    find_weight,
    reason_against_fp8,
    reason_against_fp8_call,
)
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
from qdq.forward import ForwardTrace, require_model, trace_forward
from qdq.metrics import decide_db, pair_arrays, sqnr_db
from qdq.nn import QuantMixin
from qdq.observers.solve import require_method
from qdq.outputs import Mask, OutputView, Selection
from qdq.predictor import predict
from qdq.quantizer import TensorQuantizer, disable_quantization, disable_until_exit
from qdq.rewire import list_attention
from qdq.statistics import Statistics
from qdq.text import list_names
from qdq.units import Unit, disable_idle, find_units, group_units, join_units, match_precisions

_PINNED = "pinned by the plan"


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
        int8_db: SQNR of the outputs of the whole model in dB, with int8 wherever the choice is free; None if it is
            free nowhere.
        fp8_db: The same for FP8.
        chosen_db: The same as chosen, which is at least as good as both.
    """

    sm: int
    choices: tuple[LayerFormat, ...]
    int8_db: float | None = None
    fp8_db: float | None = None
    chosen_db: float | None = None

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
        names = [list_names(choice.layers, 1) for choice in self.choices]
        width = max(map(len, names), default=0)
        lines = [f"formats for SM {self.sm}: {counts}"]
        if self.chosen_db is not None:
            figures = [_format_db(figure) for figure in (self.int8_db, self.fp8_db, self.chosen_db)]
            lines.append(
                "SQNR of the whole model: {} dB with int8, {} with FP8, {} as chosen".format(
                    *figures
                )
            )
        for name, choice in zip(names, self.choices, strict=True):
            cells = [f"  {name:{width}}", f"{choice.format:5}"]
            cells += [f"{_format_db(choice.int8_db):>7}", f"{_format_db(choice.fp8_db):>7}"]
            cells.append(choice.reason)
            lines.append("  ".join(cells))
        return "\n".join(lines)


def _format_db(decibels: float | None) -> str:
    return "-" if decibels is None else f"{decibels:.2f}"


def choose_formats(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Statistics,
    *,
    sm: int,
    method: str = "mse",
    weight_method: str = "max",
    pinned: Mapping[str, str] | None = None,
    path: Path | str | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
    weights: Mapping[str, float] | None = None,
) -> FormatChoice:
    """Give each layer int8 or FP8, so that the outputs of the whole model have a small error; in place.

    The errors of layers do not add up: some cancel, and some amplify each other. So the choice starts with the better
    of int8 and FP8 for all layers. Then it gives one layer after the other the other format, those first that gain most
    alone, and leaves it to them if the error of the whole model falls. On these samples the result is never worse than
    with one format. With n layers, the model runs at most 3 n + 3 times on the samples.

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
        pinned: Layer, or pattern of layers -> its precision, "int8", "fp8" or "float", decided already. Layers pinned
            to float are off during the choice, with the calls that serve only them, and on again after it:
            `apply_plan` and `analyze_layers` switch them off.
        path: File for the measurements, one line each; that of `analyze_layers` will do. A run that is killed and
            started again reads them, and so does a choice for another GPU on which the same layers can have both
            formats, in a copy of this model. Of the processes that torchrun starts, all must call this.
        outputs: As for `predict`.
        mask: As for `predict`.
        weights: Weight of each output where one figure decides; None: the worst decides.

    Returns:
        The format of each layer, with the SQNR of both.

    Raises:
        ArgumentError: An unknown precision or method, a method that FP8 does not have, a name that nothing quantized
            has, a format that a pinned layer cannot have, a weight for an output that does not exist, or a file that
            cannot be written; nothing is changed then.
        ArgumentTypeError: `sm` is not a whole number.
        StateError: Nothing is quantized, a quantizer has no range, or a call without a weight was rewired for FP8
            alone.
    """
    require_model(model)
    require_method(method, FP8)
    require_weight_method(weight_method)
    _require_sm(sm)
    pinned = pinned or {}
    require_precisions(pinned)
    view = OutputView(outputs, mask, weights)
    file = None if path is None else as_path(path, "path")
    samples = list_filled_batches(batches)
    with redoing_passes(model):
        with disable_quantization(model):
            trace = trace_forward(model, samples[0])
        units = find_units(model, samples[0], trace)
        decided = match_precisions(model, [unit.name for unit in units], pinned)
        groups = _list_groups(model, units, Dataflow(trace), sm)
        pins = [_find_pin(group, decided) for group in groups]
        left_out = _list_left_out(model, units, decided, trace)
        rests = [_leave_out(group, units, left_out) for group in groups]

        ranges = _Ranges(model, groups, statistics, method, weight_method)
        with Ranks() as ranks, ExitStack() as undo:
            fingerprint = ""
            if file is not None:  # it reads all weights and data, which only a file needs
                facts = _describe_measurements(rests, statistics, ranges, view)
                fingerprint = fingerprint_analysis(model, trace, samples, facts, units)
            journal = Journal(file, fingerprint, ranks)
            undo.callback(journal.close)
            trial = _Trial(model, samples, rests, ranges, view, journal)
            _return_to_int8(groups, ranges)
            search = _Search(rests, pins, trial)
            try:
                with ExitStack() as reenable:
                    _disable_units(units, left_out, reenable)
                    search.run()
            finally:
                _set_formats(groups, search.formats, ranges)
        _require_one_format(groups)
    return search.describe(sm)


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
class _Product:
    """A layer or a call with a weight.

    Args:
        operands: Those of its quantizers at input and weight that are on.
        reason: Why it cannot be FP8; "" if it can.
        axis: Of the ranges of the weight of a call in int8; None for a layer, which has its own.
    """

    operands: tuple[TensorQuantizer, ...]
    reason: str
    axis: int | None = None


@dataclass(frozen=True)
class _Group:
    """Layers and calls whose inputs have one range.

    Args:
        unit: The layers, the calls and all quantizers that are on.
        products: Those that have a weight, by dotted name.
        formats: The formats that it can have.
        reason: Why it cannot have the others; "" if it can have int8 and FP8.
        is_attention: Whether it is a product of attention.
        left_out: Layers and calls of the group that are float during the search, which `unit` and `products` do not
            have -> why.
    """

    unit: Unit
    products: Mapping[str, _Product]
    formats: tuple[str, ...]
    reason: str
    is_attention: bool
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[TensorQuantizer, ...]:
        """The quantizers of its products. The others serve int8 only, and may have the range of another group."""
        operands: list[TensorQuantizer] = []
        for product in self.products.values():
            operands += product.operands
        return tuple(operands)


def _list_groups(model: nn.Module, units: list[Unit], flow: Dataflow, sm: int) -> list[_Group]:
    """The groups of a model.

    Args:
        model: The model.
        units: Its layers and calls.
        flow: One forward of it.
        sm: As for `choose_formats`.

    Raises:
        StateError: A call that can only be int8 is FP8.
    """
    modules = dict(model.named_modules())
    attention = list_attention(flow)
    products = _list_products(units, modules, flow)
    called = _list_called_ranges(units, modules, products)
    groups = []
    for unit in group_units(model, units, "shared"):
        is_attention = unit.name in attention
        is_known = is_attention or unit.name in modules or unit.name in products
        if not is_known and unit.quantizers[0].format.is_float:
            raise StateError(
                f"the call {unit.name} is quantized to FP8 alone.",
                "swap and rewire the float model with formats=('int8', 'fp8'), and calibrate it again.",
            )
        members = {name: products[name] for name in unit.layers if name in products}
        formats, reason = _list_formats(unit, members, called, sm, is_attention=is_attention)
        groups.append(_Group(unit, members, formats, reason, is_attention))
    return groups


def _list_products(
    units: list[Unit], modules: Mapping[str, nn.Module], flow: Dataflow
) -> dict[str, _Product]:
    """The layers and calls with a weight, by dotted name."""
    calls = {operation.name: operation for operation in flow.operations}
    products = {}
    for unit in units:
        layer = modules.get(unit.name)
        if isinstance(layer, QuantMixin):
            quantizers = layer.quantizers().values()
            operands = [quantizer for quantizer in unit.quantizers if quantizer in quantizers]
            products[unit.name] = _Product(tuple(operands), reason_against_fp8(layer))
            continue
        call = calls.get(unit.name)
        weight = None if call is None else find_weight(call, flow)
        if call is not None and weight is not None and len(unit.quantizers) == 2:
            reason = reason_against_fp8_call(call, flow)
            products[unit.name] = _Product(unit.quantizers, reason, weight.axis)
    return products


def _list_called_ranges(
    units: list[Unit], modules: Mapping[str, nn.Module], products: Container[str]
) -> set[TensorQuantizer]:
    """The quantizers that hold the ranges of calls without a weight which are units of their own."""
    called: set[TensorQuantizer] = set()
    for unit in units:
        if unit.name not in modules and unit.name not in products:
            called.update(quantizer.leader for quantizer in unit.quantizers)
    return called


def _list_formats(
    unit: Unit,
    products: Mapping[str, _Product],
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
    if not products:
        return (INT8,), ONLY_PRODUCTS
    for product in products.values():
        if product.reason:
            return (INT8,), product.reason
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


def _list_left_out(
    model: nn.Module, units: list[Unit], decided: Mapping[str, str], trace: ForwardTrace
) -> dict[str, str]:
    """The layers and calls that will be float because a plan sets them or all their readers to it -> why.

    Args:
        model: The model.
        units: Its layers and calls.
        decided: Layer -> its precision in the plan.
        trace: The record of a float forward.
    """
    left_out = {name: _PINNED for name, precision in decided.items() if precision == FLOAT}
    if not left_out:
        return {}
    with ExitStack() as undo:
        _disable_units(units, left_out, undo)
        for name in disable_idle(model, trace, undo):
            left_out[name] = "nothing quantized reads its result"
    return left_out


def _disable_units(units: list[Unit], names: Container[str], undo: ExitStack) -> None:
    """Switch off some layers and calls until `undo` is closed."""
    for unit in units:
        if unit.name in names:
            disable_until_exit(unit.quantizers, undo)


def _leave_out(group: _Group, units: list[Unit], left_out: Mapping[str, str]) -> _Group:
    """The part of a group that the search quantizes; its formats are those of the whole group.

    Args:
        group: The group.
        units: All layers and calls of the model.
        left_out: Those that are left out -> why.
    """
    members = [unit for unit in units if unit.name in group.unit.layers]
    rest = join_units(group.unit.name, [unit for unit in members if unit.name not in left_out])
    products = {name: group.products[name] for name in rest.layers if name in group.products}
    reasons = {unit.name: left_out[unit.name] for unit in members if unit.name in left_out}
    return replace(group, unit=rest, products=products, left_out=reasons)


def _return_to_int8(groups: list[_Group], ranges: _Ranges) -> None:
    """Make all groups int8 but attention: some are FP8 after an earlier choice, or if the swap had FP8 first."""
    for group in groups:
        if not group.is_attention:
            for quantizer in group.unit.quantizers:
                ranges.change(quantizer, INT8)


def _set_formats(groups: list[_Group], formats: Sequence[str], ranges: _Ranges) -> None:
    """Give each group a format, and switch off the quantizers that serve other formats.

    Args:
        groups: The groups.
        formats: The format of each; attention is FP8 or float.
        ranges: Changes formats.
    """
    for group, name in zip(groups, formats, strict=True):
        if name != FLOAT:
            for quantizer in group.operands:
                ranges.change(quantizer, name)
    for group, name in zip(groups, formats, strict=True):
        for quantizer in group.unit.quantizers:
            is_product = group.is_attention or quantizer in group.operands
            # The range of a sum may be that of another group.
            is_int8 = name == INT8 and not quantizer.format.is_float
            quantizer.is_enabled = name != FLOAT and (is_product or is_int8)


class _Range(NamedTuple):
    """The format and the range that a quantizer had."""

    num_bits: NumBits
    axis: int | None
    amax: torch.Tensor | None


class _Ranges:
    """Changes the format of quantizers, and gives them ranges of the new format.

    Args:
        model: The model.
        groups: Its groups.
        statistics: Those of its activations.
        method: As for `choose_formats`.
        weight_method: Likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[_Group],
        statistics: Statistics,
        method: str,
        weight_method: str,
    ) -> None:
        collection = Collection(model)
        self._names = collection.names
        self._weights = collection.weights
        self._statistics = statistics
        self.method = method
        self.weight_method = weight_method
        self._axes: dict[TensorQuantizer, int] = {}  # of the weights of calls, in int8
        for group in groups:
            for product in group.products.values():
                if product.axis is not None:
                    _, weight_quantizer = product.operands
                    self._axes[weight_quantizer] = product.axis
        self._former: dict[tuple[TensorQuantizer, str], _Range] = {}

    def change(self, quantizer: TensorQuantizer, name: str) -> None:
        """Make a quantizer, or its leader, one of int8 or FP8, with a range; one that has the format stays.

        Args:
            quantizer: The quantizer.
            name: "int8" or "fp8".

        Raises:
            ArgumentError: The statistics do not have its tensor.
        """
        leader = quantizer.leader
        present = FP8.name if leader.format.is_float else INT8
        if leader.is_fixed or present == name:
            return
        self._former[leader, present] = _Range(leader.num_bits, leader.axis, leader.amax)
        former = self._former.get((leader, name))
        if former is None:
            self._solve(leader, name)
            return
        leader.set_format(former.num_bits, former.axis)
        if former.amax is not None:
            leader.amax = former.amax

    def _solve(self, leader: TensorQuantizer, name: str) -> None:
        """Give a quantizer a format that it has not had yet, and compute its range."""
        site = self._weights.get(self._names[leader])
        if site is not None:
            leader.set_format(*_describe_weight(site, name))
            leader.amax = solve_weight(site.label, site.weight, leader, self.weight_method)
            return
        tensor = self._statistics.tensors.get(self._names[leader])
        if tensor is None:
            raise ArgumentError(
                f"the statistics have no tensor {self._names[leader]!r}.",
                "pass the statistics that the model was calibrated from.",
            )
        if name == FP8.name:
            leader.set_format(FP8_BITS)
        else:
            leader.set_format(8, self._axes.get(leader))
        method = self.method if leader.axis is None else "max"
        leader.amax = leader.solve_range(tensor, method)


def _describe_weight(site: WeightSite, name: str) -> tuple[NumBits, int | None]:
    """Width and axis of a weight in a format, "int8" or "fp8": those that `swap_modules` gives it."""
    if name == FP8.name:
        return FP8_BITS, None
    assert isinstance(site.layer, QuantMixin)  # noqa: S101  # it has a weight
    desc = site.layer.default_quant_desc_weight
    return desc.num_bits, desc.axis


def _describe_measurements(
    groups: list[_Group], statistics: Statistics, ranges: _Ranges, view: OutputView
) -> str:
    """What the measurements depend on beside model, data and units, for a fingerprint.

    Args:
        groups: The groups, without the layers that are left out.
        statistics: Those of the ranges.
        ranges: Has their methods.
        view: The outputs that count.
    """
    members = [(group.unit.layers, group.formats) for group in groups]
    digest = hashlib.sha256(statistics.to_bytes()).hexdigest()
    return f"formats {members} {digest} {ranges.method} {ranges.weight_method} {view.describe()} {view.weights}"


def _noise_of(decibels: float) -> float:
    """The noise for a signal of 1."""
    return float(10 ** (-decibels / 10))


class _Trial:
    """Measures the outputs of the model in formats.

    Args:
        model: The model.
        samples: The batches.
        groups: Its groups.
        ranges: Changes formats.
        view: The outputs that count.
        journal: Has the measurements of a run that was killed.

    Raises:
        ArgumentError: A weight for an output that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: list[Any],
        groups: list[_Group],
        ranges: _Ranges,
        view: OutputView,
        journal: Journal,
    ) -> None:
        self._model = model
        self._groups = groups
        self._ranges = ranges
        self._journal = journal
        self._run = partial(predict, batches=samples, outputs=view.outputs, mask=view.mask)
        with disable_quantization(model):
            self._expected = self._run(model)
        self._weights = view.weigh(list(pair_arrays(self._expected, self._expected)))

    def measure_alone(self, group: _Group) -> dict[str, float]:
        """SQNR in dB with only this group quantized, by its format; it is int8 before and after."""
        key = ["alone", group.unit.name]
        decibels: dict[str, float] | None = self._journal.get(key)
        if decibels is not None:
            return decibels
        decibels = {INT8: self._measure_only(group.unit.quantizers)}
        for quantizer in group.operands:
            self._ranges.change(quantizer, FP8.name)
        decibels[FP8.name] = self._measure_only(group.operands)
        for quantizer in group.operands:
            self._ranges.change(quantizer, INT8)
        self._journal.add(key, decibels)
        return decibels

    def measure(self, formats: Sequence[str]) -> float:
        """SQNR in dB with all groups quantized.

        Args:
            formats: The format of each group.
        """
        key = ["all", *formats]
        decibels: float | None = self._journal.get(key)
        if decibels is None:
            _set_formats(self._groups, formats, self._ranges)
            decibels = self._measure()
            self._journal.add(key, decibels)
        return decibels

    def _measure_only(self, quantizers: Iterable[TensorQuantizer]) -> float:
        with disable_quantization(self._model):
            for quantizer in quantizers:
                quantizer.enable()
            return self._measure()

    def _measure(self) -> float:
        outputs = self._run(self._model)
        decibels = {}
        for name, pair in pair_arrays(self._expected, outputs).items():
            decibels[name] = sqnr_db(*pair)
        return decide_db(decibels, self._weights)


class _Search:
    """Chooses the formats of the groups that are free to have both.

    Args:
        groups: All groups, without the layers that are left out; those that can be int8 are int8.
        pins: The format that a plan sets for each group; None if it sets none.
        trial: Measures the model.

    Attributes:
        formats: The format of each group so far.
    """

    def __init__(
        self,
        groups: list[_Group],
        pins: list[str | None],
        trial: _Trial,
    ) -> None:
        self._groups = groups
        self._pins = pins
        self._trial = trial
        self._alone: dict[int, dict[str, float]] = {}
        self._uniform: dict[str, float] = {}
        self._chosen_db: float | None = None
        self.formats = [pin or group.formats[0] for group, pin in zip(groups, pins, strict=True)]
        self._free = []
        for index, (group, pin) in enumerate(zip(groups, pins, strict=True)):
            if pin is None and len(group.formats) > 1 and group.unit.layers:
                self._free.append(index)

    def run(self) -> None:
        """Measure each free group alone, all of them in one format, and then one change after the other."""
        if not self._free:
            return
        total = 3 * len(self._free) + len(FORMAT_NAMES)
        with tqdm(total=total, desc="formats", unit="run", disable=None) as progress:
            for index in self._free:
                self._alone[index] = self._trial.measure_alone(self._groups[index])
                progress.update(2)
            for name in FORMAT_NAMES:
                self._uniform[name] = self._trial.measure(self._with_formats(self._free, name))
                progress.update()
            is_fp8_better = self._uniform[FP8.name] > self._uniform[INT8]
            better, other = (FP8.name, INT8) if is_fp8_better else (INT8, FP8.name)
            self.formats = self._with_formats(self._free, better)
            chosen_db = self._uniform[better]
            for index in self._order_by_gain(better, other):
                formats = self._with_formats([index], other)
                decibels = self._trial.measure(formats)
                if decibels > chosen_db:
                    self.formats = formats
                    chosen_db = decibels
                progress.update()
            self._chosen_db = chosen_db

    def _with_formats(self, indices: Iterable[int], name: str) -> list[str]:
        """The formats so far, but another one for some groups."""
        formats = list(self.formats)
        for index in indices:
            formats[index] = name
        return formats

    def _order_by_gain(self, present: str, other: str) -> list[int]:
        """The free groups, those first whose noise alone falls most from one format to the other."""
        losses = {}
        for index, decibels in self._alone.items():
            losses[index] = _noise_of(decibels[other]) - _noise_of(decibels[present])
        return sorted(losses, key=losses.__getitem__)

    def describe(self, sm: int) -> FormatChoice:
        """The result, with the reason of each choice."""
        choices = []
        for index, group in enumerate(self._groups):
            choices += _describe_left_out(group)
            if not group.unit.layers:
                continue
            alone = self._alone.get(index, {})
            choices.append(
                LayerFormat(
                    group.unit.layers,
                    self.formats[index],
                    self._explain(index),
                    alone.get(INT8),
                    alone.get(FP8.name),
                )
            )
        return FormatChoice(
            sm,
            tuple(choices),
            self._uniform.get(INT8),
            self._uniform.get(FP8.name),
            self._chosen_db,
        )

    def _explain(self, index: int) -> str:
        """Why a group has its format."""
        group = self._groups[index]
        if len(group.formats) == 1:
            return group.reason
        if self._pins[index] is not None:
            return _PINNED
        alone = self._alone[index]
        if alone[self.formats[index]] == max(alone.values()):
            return "the smaller error"
        return "the smaller error together with the other layers"


def _describe_left_out(group: _Group) -> list[LayerFormat]:
    """One entry for each reason."""
    entries = []
    for reason in dict.fromkeys(group.left_out.values()):
        layers = [name for name, other in group.left_out.items() if other == reason]
        entries.append(LayerFormat(tuple(layers), FLOAT, reason))
    return entries


def _require_one_format(groups: list[_Group]) -> None:
    """Refuse a layer whose input and weight differ in format: TensorRT would compute it in float.

    Raises:
        StateError: With the layer.
    """
    for group in groups:
        for name, product in group.products.items():
            formats = sorted(
                {quantizer.format.name for quantizer in product.operands if quantizer.is_enabled}
            )
            if len(formats) > 1:
                raise StateError(
                    f"the operands of {name} have the formats {' and '.join(formats)}.",
                    "swap and rewire the float model with formats=('int8', 'fp8'), and calibrate it again.",
                )
