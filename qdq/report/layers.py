"""The record of every layer of a run: why it is int8 or float, its ranges, errors and kernels.

`describe_layers` gathers the facts of the stages, one class or function for each of them:

- `_Reasons`: why it is int8 or float, from the plan, calibration and the analysis
- `_Tensors`: what each of its quantizers does, from calibration
- `_list_sensitivities`: the figures of the analysis
- `_measure_outputs`: the error of its own output
- `_Engine`: its kernels, from the build
- `_Neighbours`: the layers that it reads and feeds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qdq.analyze import Analysis, LayerSensitivity
from qdq.batch import floats_of
from qdq.build import BuildReport
from qdq.calibrate import Range
from qdq.dataflow import Dataflow
from qdq.device import without_tf32
from qdq.forward import Contraction, ForwardTrace, Operation, call_model, evaluating, trace_forward
from qdq.functions import CONTRACTIONS, PRODUCT_OPERATORS, SINGLE_PRODUCTS
from qdq.metrics import sqnr_db
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.functions import run_again
from qdq.product_types import LOW_TYPES, word_of
from qdq.quantize import fake_quantize
from qdq.quantizer import TensorQuantizer, disable_quantization, toggling
from qdq.report.records import (
    HISTOGRAM_COLUMNS,
    RULE,
    LayerRecord,
    MethodRange,
    Sensitivity,
    TensorRecord,
)
from qdq.rewire import PlannedOperation, RewirePlan
from qdq.statistics import Statistics
from qdq.swap import PlannedModule, SwapPlan
from qdq.trt.census import LayerCensus
from qdq.units import find_all_quantizers

NO_STATISTICS = "no calibration statistics in the run folder; give calibrate_model statistics=FILE"
"""Why a figure of an activation is unknown in a run that did not keep its statistics."""

_LayerQuantizers = Mapping[str, Sequence[TensorQuantizer]]  # by the name of the layer or call


@without_tf32()
def describe_layers(
    model: nn.Module,
    batch: Any,
    *,
    plan: SwapPlan,
    rewired: RewirePlan,
    ranges: Iterable[Range],
    analysis: Analysis,
    build: BuildReport,
    statistics: Statistics | None,
    float_bytes: int = 4,
) -> list[LayerRecord]:
    """Describe every layer that could be int8, and every call for which a rule has a reason.

    The model runs a few times on the batch, without TF32; it is not changed.

    Args:
        model: The exported model.
        batch: A few samples (see `forward.call_model`).
        plan: From `swap_modules`.
        rewired: From `rewire_operations`.
        ranges: From `calibrate_model`.
        analysis: From `analyze_layers`.
        build: From `build_engine`.
        statistics: The statistics of calibration; None if they were not kept.
        float_bytes: Bytes of a weight that is not int8 in the exported file.

    Returns:
        The records in the order of execution; layers that do not run come last.
    """
    with disable_quantization(model):
        trace = trace_forward(model, batch)

    flow = Dataflow(trace)
    entries = _list_entries(model, plan, rewired, trace, flow)
    all_quantizers = find_all_quantizers(model, batch)
    owners = _find_owners(all_quantizers, entries)
    quantizers = _split_off_calls(all_quantizers, owners, entries)

    neighbours = _Neighbours(flow, entries)
    facts = _StageFacts(
        neighbours=neighbours,
        tensors=_Tensors(model, ranges, rewired, statistics),
        reasons=_Reasons(analysis, owners),
        sensitivities=_list_sensitivities(analysis),
        outputs=_measure_outputs(model, batch, quantizers),
        engine=_Engine(build, entries),
        float_bytes=float_bytes,
    )
    return [facts.describe(entries[name], quantizers.get(name, ())) for name in neighbours.order]


@dataclass(frozen=True)
class _Entry:
    """One layer or call, or a module with products out of reach, as swapping and rewiring planned it.

    Args:
        name: Dotted name.
        kind: Class of the module, or the function.
        is_call: Whether it is a function call.
        is_layer: Whether it is a module of a type that has a quantized class.
        is_quantized: Whether it has quantizers.
        reason: Why, or why not.
        weights: Number of weights.
    """

    name: str
    kind: str
    is_call: bool
    is_layer: bool
    is_quantized: bool
    reason: str
    weights: int


@dataclass(frozen=True)
class _StageFacts:
    """The facts about all layers, stage by stage."""

    neighbours: _Neighbours
    tensors: _Tensors
    reasons: _Reasons
    sensitivities: Mapping[str, Sensitivity]
    outputs: Mapping[str, float | str]
    engine: _Engine
    float_bytes: int

    def describe(self, entry: _Entry, quantizers: Sequence[TensorQuantizer]) -> LayerRecord:
        """The record of one layer.

        Args:
            entry: The layer or call.
            quantizers: Its quantizers, without those of the calls that it owns.
        """
        name = entry.name
        is_enabled = all(quantizer.is_enabled for quantizer in quantizers)
        is_int8 = entry.is_quantized and len(quantizers) > 0 and is_enabled
        reason = self.reasons.explain(entry, is_int8, self.tensors.note_of(quantizers))
        engine = self.engine.describe(entry)
        unknown = {**engine.unknown, **self._list_unknown(entry, quantizers, is_int8)}
        return LayerRecord(
            name=name,
            kind=entry.kind,
            is_call=entry.is_call,
            precision=(engine.promised or _name_format(quantizers)) if is_int8 else "float",
            reason=reason,
            rules=tuple(dict.fromkeys(RULE.findall(reason))),
            tensors=tuple(self.tensors.describe(name, quantizer) for quantizer in quantizers),
            sensitivity=self.sensitivities.get(name),
            output_sqnr_db=self._output_sqnr_db(name),
            macs=engine.macs,
            macs_share=engine.fraction,
            weights=entry.weights,
            weight_bytes=entry.weights * (1 if is_int8 else self.float_bytes),
            engine=engine.precision,
            kernels=engine.kernels,
            engine_note=engine.note,
            reads=self.neighbours.reads[name],
            feeds=self.neighbours.feeds[name],
            reads_input=name in self.neighbours.reads_input,
            writes_output=name in self.neighbours.writes_output,
            unknown=unknown,
        )

    def _output_sqnr_db(self, name: str) -> float | None:
        """The SQNR of a layer's own output, if it was measured and is finite."""
        output = self.outputs.get(name)
        if isinstance(output, float) and math.isfinite(output):
            return output
        return None

    def _list_unknown(
        self, entry: _Entry, quantizers: Sequence[TensorQuantizer], is_int8: bool
    ) -> dict[str, str]:
        """Field -> the reason why it is empty."""
        unknown = {}
        if self._output_sqnr_db(entry.name) is None:
            unknown["output_sqnr_db"] = self._why_no_output(entry.name, quantizers)
        if entry.name not in self.sensitivities:
            unknown["sensitivity"] = self.reasons.why_not_measured(entry, is_int8)
        if not quantizers:
            unknown["tensors"] = f"it was given no quantizers: {entry.reason}"
        if not self.neighbours.has_any(entry.name):
            unknown["neighbours"] = "it does not run on the example"

        return unknown

    def _why_no_output(self, name: str, quantizers: Sequence[TensorQuantizer]) -> str:
        """Why the SQNR of a layer's own output is unknown."""
        output = self.outputs.get(name)
        if isinstance(output, str):
            return output
        if output is not None:
            return "no error: the output on the example is the same"
        return "measured for layers only" if quantizers else "it has no quantizers"


# The layers and calls


def _list_entries(
    model: nn.Module, plan: SwapPlan, rewired: RewirePlan, trace: ForwardTrace, flow: Dataflow
) -> dict[str, _Entry]:
    """Everything that could be int8: modules of mapped types, missed modules, and calls in int8 or float.

    A missed module is left out if the rewiring has decided about all of its products: its calls are listed instead.

    Args:
        model: The model.
        plan: The decisions about modules.
        rewired: The decisions about calls.
        trace: One forward in float.
        flow: The same forward.

    Returns:
        Name -> entry, the modules first.
    """
    calls = [operation for operation in rewired.operations if operation.action != "share"]
    call_weights = _count_call_weights(flow)
    missed = _find_missed(model, plan, calls, trace)

    entries = {}
    for module in plan.modules:
        is_listed = module.mapped and module.action != "missed"
        if is_listed or module.name in missed:
            entries[module.name] = _make_module_entry(module)

    for call in calls:
        entries[call.name] = _make_call_entry(call, call_weights.get(call.name, 0))

    return entries


def _make_module_entry(module: PlannedModule) -> _Entry:
    """The entry of a module."""
    return _Entry(
        name=module.name,
        kind=module.type,
        is_call=False,
        is_layer=module.mapped,
        is_quantized=module.action == "quantize",
        reason=module.reason,
        weights=module.weights,
    )


def _make_call_entry(call: PlannedOperation, weights: int) -> _Entry:
    """The entry of a function call; its plan does not have the number of its weights."""
    return _Entry(
        name=call.name,
        kind=call.function,
        is_call=True,
        is_layer=False,
        is_quantized=call.action == "quantize",
        reason=call.reason,
        weights=weights,
    )


def _count_call_weights(flow: Dataflow) -> dict[str, int]:
    """Product -> number of its weights: elements of matrices that do not depend on the input of the network."""
    weights = {}
    for call in flow.operations:
        if call.function not in CONTRACTIONS:
            continue
        count = 0
        for value in call.inputs:
            if flow.is_computed(value):
                continue
            shape = flow.shapes[value]
            if len(shape) >= 2:
                count += math.prod(shape)

        weights[call.name] = count

    return weights


def _find_missed(
    model: nn.Module, plan: SwapPlan, calls: Iterable[PlannedOperation], trace: ForwardTrace
) -> set[str]:
    """The missed modules with a product, in their own forward or with their weights, that is not listed as a call.

    A missed module without any product in the trace counts too: its products are out of reach.

    Args:
        model: The model.
        plan: The decisions about modules.
        calls: The calls that are listed.
        trace: One forward in float.
    """
    listed = {(_module_around(call.name), call.function) for call in calls}
    unlisted = [call for call in trace.contractions if (call.module, call.function) not in listed]
    all_products = _Products.of(trace.contractions)
    unlisted_products = _Products.of(unlisted)
    modules = dict(model.named_modules())

    missed = set()
    for module in plan.of("missed"):
        storages = _find_storages(modules[module.name])
        is_traced = all_products.involve(module.name, storages)
        if not is_traced or unlisted_products.involve(module.name, storages):
            missed.add(module.name)

    return missed


def _find_storages(module: nn.Module) -> set[int]:
    """The addresses of the memory of a module's own parameters."""
    parameters = module.parameters(recurse=False)
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}


@dataclass(frozen=True)
class _Products:
    """Some products: the modules that call them, and the memory that they read."""

    modules: frozenset[str]
    storages: frozenset[int]

    @classmethod
    def of(cls, calls: Iterable[Contraction]) -> _Products:
        """The modules and the memory of some calls."""
        modules: set[str] = set()
        storages: set[int] = set()
        for call in calls:
            modules.add(call.module)
            storages.update(call.storages)

        return cls(frozenset(modules), frozenset(storages))

    def involve(self, module: str, storages: set[int]) -> bool:
        """Whether a module calls one of the products, or one of them reads its memory."""
        return module in self.modules or not self.storages.isdisjoint(storages)


def _module_around(name: str) -> str:
    """The module that makes a call, or the parent of a module."""
    return name.rpartition(".")[0]


# The quantizers


def _find_owners(quantizers: _LayerQuantizers, entries: Mapping[str, _Entry]) -> dict[str, str]:
    """Find the layer for which the quantizer of a call exists (see `units.find_units`).

    Args:
        quantizers: Quantizers of all layers and calls; those of a call may be among those of a layer.
        entries: The layers and calls.

    Returns:
        Call -> layer.
    """
    calls = []
    layers: dict[TensorQuantizer, str] = {}
    for name in quantizers:
        if name not in entries:
            continue
        if entries[name].is_call:
            calls.append(name)
        else:
            layers.update(dict.fromkeys(quantizers[name], name))

    owners = {}
    for call in calls:
        for quantizer in quantizers[call]:
            if quantizer in layers:
                owners[call] = layers[quantizer]

    return owners


def _split_off_calls(
    all_quantizers: _LayerQuantizers, owners: Mapping[str, str], entries: Mapping[str, _Entry]
) -> dict[str, list[TensorQuantizer]]:
    """Remove the quantizers of calls from the layers that own the calls.

    Args:
        all_quantizers: Quantizers of all layers and calls.
        owners: Call -> the layer that owns it.
        entries: The layers and calls.

    Returns:
        Layer or call -> its quantizers.
    """
    quantizers_of_calls: dict[str, set[TensorQuantizer]] = {}
    for call, layer in owners.items():
        quantizers_of_calls.setdefault(layer, set()).update(all_quantizers[call])

    quantizers = {}
    for name in all_quantizers:
        if name in entries:
            excluded = quantizers_of_calls.get(name, set())
            quantizers[name] = [
                quantizer for quantizer in all_quantizers[name] if quantizer not in excluded
            ]

    return quantizers


# The neighbours

_Source = str | None  # of a value: the layer that computes it; None is the input of the network
_Sources = dict[_Source, None]  # an ordered set


class _Neighbours:
    """Which layer reads the output of which, directly or through operations that are not layers.

    Args:
        flow: One forward.
        entries: The layers and calls.

    Attributes:
        order: The names of all layers, in the order of execution.
        reads: Layer -> the layers that it reads.
        feeds: Layer -> the layers that read it.
        reads_input: Layers that read the input of the network.
        writes_output: Layers that compute an output of the network.
    """

    def __init__(self, flow: Dataflow, entries: Mapping[str, _Entry]) -> None:
        self._entries = entries
        self._layers_around: dict[str, str | None] = {}
        sources_of_layers, self.writes_output = self._follow(flow)
        idle_layers = [name for name in entries if name not in sources_of_layers]
        self.order = [*sources_of_layers, *idle_layers]

        self.reads_input = set()
        self.reads: dict[str, tuple[str, ...]] = {}
        readers: dict[str, list[str]] = {name: [] for name in self.order}
        for layer in self.order:
            sources = sources_of_layers.get(layer, {})
            if None in sources:
                self.reads_input.add(layer)
            self.reads[layer] = tuple(source for source in sources if source is not None)
            for source in self.reads[layer]:
                readers[source].append(layer)

        self.feeds = {name: tuple(layers) for name, layers in readers.items()}

    def _follow(self, flow: Dataflow) -> tuple[dict[str, _Sources], set[_Source]]:
        """Follow the values through a forward.

        Returns:
            Layer that runs -> the sources that it reads, in the order of execution; and the sources of the
            outputs of the network.
        """
        sources_of_layers: dict[str, _Sources] = {}
        sources_of_values: dict[int, _Sources] = {value: {None: None} for value in flow.inputs}
        for operation in flow.operations:
            sources: _Sources = {}
            for value in operation.inputs:
                sources.update(sources_of_values.get(value, {}))

            layer = self._find_layer(operation)
            if layer is not None:
                sources.pop(layer, None)  # an earlier operation of the same layer
                sources_of_layers.setdefault(layer, {}).update(sources)
                sources = {layer: None}
            sources_of_values.update(dict.fromkeys(operation.outputs, sources))

        sources_of_outputs: set[_Source] = set()
        for value in flow.outputs:
            sources_of_outputs.update(sources_of_values.get(value, {}))

        return sources_of_layers, sources_of_outputs

    def has_any(self, name: str) -> bool:
        """Whether a layer reads or feeds anything."""
        if name in self.reads_input or name in self.writes_output:
            return True
        return len(self.reads[name]) + len(self.feeds[name]) > 0

    def _find_layer(self, operation: Operation) -> str | None:
        """The layer or call that is, or contains, an operation."""
        call = self._entries.get(operation.name)
        if call is not None and call.is_call:
            return call.name
        module = self._entries.get(operation.module)
        is_missed = module is not None and not module.is_layer
        if is_missed and operation.function in CONTRACTIONS:
            return operation.module
        return self._find_layer_around(operation.module)

    def _find_layer_around(self, module: str) -> str | None:
        """The innermost layer that is, or contains, a module."""
        if module in self._layers_around:
            return self._layers_around[module]
        entry = self._entries.get(module)
        layer = None
        if entry is not None and entry.is_layer:
            layer = module
        elif module:
            layer = self._find_layer_around(_module_around(module))

        self._layers_around[module] = layer
        return layer


# The reasons and the sensitivity


class _Reasons:
    """Why a layer is int8 or float.

    Args:
        analysis: The decisions of the analysis.
        owners: Call -> the layer for which it exists.
    """

    def __init__(self, analysis: Analysis, owners: Mapping[str, str]) -> None:
        self._analysis = analysis
        self._owners = owners
        self._units: dict[str, LayerSensitivity] = {}  # by the layers in them
        self._ranks: dict[str, int] = {}  # of the units
        self._steps: dict[str, int] = {}  # layer -> number of the step that left it in float
        for rank, unit in enumerate(analysis.layers, 1):
            self._ranks[unit.name] = rank
            self._units.update(dict.fromkeys(unit.layers or (unit.name,), unit))

        self._last_chosen_rank = 0
        for number, step in enumerate(analysis.steps):
            self._steps.update(dict.fromkeys(step.layers or (step.layer,), number))
            rank = self._ranks.get(step.layer, 0)
            self._last_chosen_rank = max(self._last_chosen_rank, rank)

    def explain(self, entry: _Entry, is_int8: bool, note: str) -> str:
        """One or two sentences.

        Args:
            entry: The layer.
            is_int8: Whether it runs in int8.
            note: Why calibration left it in float; "" if it did not.
        """
        if note:
            return note
        if not entry.is_quantized:
            return entry.reason
        if entry.name in self._analysis.pinned:
            return f"pinned to {self._analysis.pinned[entry.name]} by the plan"
        if entry.name in self._steps:
            return self._explain_step(self._steps[entry.name])
        owner = self._owners.get(entry.name)
        if owner:
            return self._explain_owner(entry, owner, is_int8)
        if not is_int8:
            return "its quantizers are switched off"
        unit = self._units.get(entry.name)
        if unit is None:
            return entry.reason
        return f"{entry.reason}; {self._explain_rank(unit)}"

    def why_not_measured(self, entry: _Entry, is_int8: bool) -> str:
        """Why the analysis has no figures of a layer."""
        if not entry.is_quantized:
            return "only quantized layers are measured"
        if entry.name in self._analysis.pinned:
            return "pinned layers are not measured"
        if entry.name in self._analysis.unmeasured:
            return "the budget of the analysis was used up"
        if owner := self._owners.get(entry.name):
            return f"measured with {owner}"
        return "not measured" if is_int8 else "it was off when the analysis began"

    def _explain_owner(self, entry: _Entry, owner: str, is_int8: bool) -> str:
        """Explain a call, which runs in the type of the layer for which it exists."""
        if is_int8:
            return f"{entry.reason}; it goes with {owner}"
        return f"it exists only for {owner}, which is in float"

    def _explain_step(self, number: int) -> str:
        """The step of the search that left a layer in float, with the figures before it and after it."""
        metric, steps = self._analysis.metric_name, self._analysis.steps
        start, end = self._analysis if number == 0 else steps[number - 1], steps[number]
        change = f"SQNR of the outputs {start.sqnr_db:.2f} -> {end.sqnr_db:.2f} dB"
        if metric != "sqnr":
            values = f"{_format_metric(start.metric)} -> {_format_metric(end.metric)}"
            change = f"{metric} of the outputs {values}, {change}"

        if self._analysis.biases:
            change = f"{change}, with {self._analysis.biases}"
        return f"step {number + 1} of {len(steps)} of the search left it in float: {change}"

    def _explain_rank(self, unit: LayerSensitivity) -> str:
        """Why the search left a layer in int8."""
        rank = self._ranks[unit.name]
        how = "measured" if unit.is_exact else "estimated"
        place = f"rank {rank} of {len(self._analysis.layers)} in sensitivity ({how})"
        if self._last_chosen_rank <= rank:
            return f"{place}; the search ended: {self._analysis.stopped_by}"
        return f"{place}, but passed over for less sensitive ones: {self._explain_passing(unit)}"

    def _explain_passing(self, unit: LayerSensitivity) -> str:
        """Why the search took less sensitive units; the analysis does not record which limit was in the way."""
        limits = "it did not fit the limits"
        if len(unit.layers) > 1:
            limits = f"with its {len(unit.layers)} layers {limits}"
        if unit.cost is not None:
            return f"they gain more per microsecond (this one costs {unit.cost:.4g}), or {limits}"
        if self._analysis.mode == "leave-one-out":
            return f"they gained more when measured again after a step, or {limits}"
        return limits


def _format_metric(value: float | None) -> str:
    """A metric that is not finite has no text."""
    return "" if value is None else f"{value:.4g}"


def _list_sensitivities(analysis: Analysis) -> dict[str, Sensitivity]:
    """Layer -> the figures of the analysis, for it or for its group."""
    sensitivities = {}
    for rank, unit in enumerate(analysis.layers, 1):
        sensitivity = Sensitivity(
            unit=unit.name,
            layers=unit.layers or (unit.name,),
            rank=rank,
            units=len(analysis.layers),
            gain=unit.gain,
            low=unit.gain_low,
            high=unit.gain_high,
            sqnr_db=unit.sqnr_db if math.isfinite(unit.sqnr_db) else None,
            is_exact=unit.is_exact,
            metric=unit.metric,
            cost=unit.cost,
        )
        sensitivities.update(dict.fromkeys(sensitivity.layers, sensitivity))

    return sensitivities


# The tensors


@dataclass(frozen=True)
class _TensorFigures:
    """The measured fields of a `TensorRecord`."""

    sqnr_db: float | None = None
    clipped: float | None = None
    methods: Mapping[str, MethodRange] = field(default_factory=dict)
    histogram: tuple[int, ...] = ()
    histogram_end: float | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)


class _Tensors:
    """The facts about the tensor of each quantizer.

    Args:
        model: The model.
        ranges: From `calibrate_model`.
        rewired: Which quantizers share a range.
        statistics: From calibration.
    """

    def __init__(
        self,
        model: nn.Module,
        ranges: Iterable[Range],
        rewired: RewirePlan,
        statistics: Statistics | None,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._ranges = {calibrated.name: calibrated for calibrated in ranges}
        self._groups: dict[str, tuple[str, ...]] = {}  # quantizer -> all quantizers with its range
        for leader, followers in rewired.shared.items():
            group = (leader, *followers)
            self._groups.update(dict.fromkeys(group, group))

        self._statistics = statistics
        self._summary = {} if statistics is None else statistics.summarize()["tensors"]

    def note_of(self, quantizers: Iterable[TensorQuantizer]) -> str:
        """Why calibration left the layer with these quantizers in float; "" if it did not."""
        for quantizer in quantizers:
            calibrated = self._ranges.get(quantizer.name or "")
            if calibrated is not None and calibrated.note:
                return calibrated.note

        return ""

    def describe(self, layer: str, quantizer: TensorQuantizer) -> TensorRecord:
        """The record of one quantizer of a layer."""
        name = quantizer.name or ""
        amax = quantizer.amax
        largest, smallest, count = None, None, 0
        if amax is not None:
            largest, smallest, count = float(amax.max()), float(amax.min()), amax.numel()
        figures = self._measure(layer, quantizer)
        calibrated = self._ranges.get(name)
        group = self._groups.get(name, ())
        return TensorRecord(
            quantizer=name,
            role=_role_of(name),
            is_on=quantizer.is_enabled,
            amax=largest,
            least_amax=smallest,
            ranges=count,
            method="" if calibrated is None else calibrated.method,
            sqnr_db=figures.sqnr_db,
            clipped=figures.clipped,
            methods=figures.methods,
            histogram=figures.histogram,
            histogram_end=figures.histogram_end,
            shares=tuple(member for member in group if member != name),
            unknown=figures.unknown,
        )

    def _measure(self, layer: str, quantizer: TensorQuantizer) -> _TensorFigures:
        """Measure the tensor of a quantizer, or give the reason why that is not possible.

        Args:
            layer: Name of the layer.
            quantizer: One of its quantizers.
        """
        amax = quantizer.amax
        if amax is None:
            fields = ("amax", "sqnr_db", "clipped", "methods", "histogram")
            reason = self.note_of([quantizer]) or "it was not calibrated"
            return _TensorFigures(unknown=dict.fromkeys(fields, reason))
        weight = self._find_weight(layer, quantizer)
        if weight is not None:
            return _measure_weight(weight, amax, quantizer)
        return self._measure_activation(amax, quantizer)

    def _find_weight(self, layer: str, quantizer: TensorQuantizer) -> torch.Tensor | None:
        """Find the parameter that a quantizer quantizes.

        Args:
            layer: Name of the layer.
            quantizer: One of its quantizers.

        Returns:
            The parameter; None if the quantizer quantizes an activation.
        """
        module = self._modules.get(layer)
        if not isinstance(module, QuantMixin):
            return None
        attribute = (quantizer.name or "").rpartition(".")[2]
        parameter = module.weights_of(module).get(attribute)
        if parameter is None:
            return None
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        return parameters.get(parameter)

    def _measure_activation(self, amax: torch.Tensor, quantizer: TensorQuantizer) -> _TensorFigures:
        """Estimate the figures of an activation from the histogram of calibration."""
        leader = quantizer.leader.name or ""
        if self._statistics is None or leader not in self._statistics.tensors:
            fields = ("sqnr_db", "clipped", "methods", "histogram")
            reason = "calibration collected no statistics of it"
            if self._statistics is None:
                reason = NO_STATISTICS
            return _TensorFigures(unknown=dict.fromkeys(fields, reason))
        tensor = self._statistics.tensors[leader]
        counts, end = tensor.histogram(HISTOGRAM_COLUMNS)
        sqnr, clipped, unknown = None, None, {}
        if amax.numel() > 1:
            reason = (
                "it has a range for each channel, but the histogram covers all channels together"
            )
            unknown = dict.fromkeys(("sqnr_db", "clipped"), reason)
        else:
            limit = float(amax)
            clipped = tensor.clipped_share(limit, quantizer.format.unsigned)
            sqnr = tensor.rounding_sqnr_db(limit, quantizer.format)
            unknown = _explain_infinite(sqnr)

        return _TensorFigures(
            sqnr_db=None if unknown else sqnr,
            clipped=clipped,
            methods=self._list_methods(leader),
            histogram=tuple(map(int, counts)),
            histogram_end=end,
            unknown=unknown,
        )

    def _list_methods(self, leader: str) -> dict[str, MethodRange]:
        """Calibration method -> the range that it would choose."""
        summary = self._summary[leader]
        methods = {}
        for method, amax in summary["amax"].items():
            methods[method] = MethodRange(float(amax), float(summary["clipped"][method]))

        return methods


def _measure_weight(
    weight: torch.Tensor, amax: torch.Tensor, quantizer: TensorQuantizer
) -> _TensorFigures:
    """Measure a weight itself, so its error is exact."""
    values = weight.detach().float()
    axis = quantizer.axis
    amax = amax.to(values.device)
    limit = amax
    if axis is not None:
        shape = [1] * values.dim()
        shape[axis] = -1
        limit = amax.reshape(shape)

    clipped = 0.0
    if values.numel():
        clipped = float((values.abs() > limit).float().mean())

    quantized = fake_quantize(values, amax, quantizer.format, axis)
    sqnr = sqnr_db(values.cpu().numpy(), quantized.cpu().numpy())
    unknown = {
        "methods": "the ranges of weights are computed by max or mse only",
        "histogram": "histograms are kept for activations only",
        **_explain_infinite(sqnr),
    }
    return _TensorFigures(
        sqnr_db=sqnr if math.isfinite(sqnr) else None, clipped=clipped, unknown=unknown
    )


def _explain_infinite(sqnr: float) -> dict[str, str]:
    """The reason why an SQNR is not given; empty if it is finite."""
    if math.isfinite(sqnr):
        return {}
    return {"sqnr_db": "no error: the codes are exact for every value, or all values are zero"}


def _role_of(quantizer: str) -> str:
    """The role in the name of a quantizer: "input" of `conv._input_quantizer`."""
    attribute = quantizer.rpartition(".")[2]
    role = attribute.removeprefix("_").removesuffix("_quantizer")
    return role.replace("_", " ")


# The outputs


@torch.no_grad()
def _measure_outputs(
    model: nn.Module, batch: Any, quantizers: _LayerQuantizers
) -> dict[str, float | str]:
    """Measure the layers one by one: all quantizers of the layer on, its inputs from the float model.

    Returns:
        Layer -> SQNR of its own output in dB, or why there is none.
    """
    results: dict[str, float | str] = {}
    modules = dict(model.named_modules())
    layers = [name for name in quantizers if isinstance(modules.get(name), QuantInputMixin)]
    with disable_quantization(model), evaluating(model), ExitStack() as hooks:
        for name in layers:
            if any(quantizer.amax is None for quantizer in quantizers[name]):
                results[name] = "it has no range"
                continue
            hook = _make_output_hook(name, quantizers[name], results)
            handle = modules[name].register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        call_model(model, batch)

    for name in layers:
        results.setdefault(name, "it does not run on the example")

    return results


def _make_output_hook(
    name: str, quantizers: Sequence[TensorQuantizer], results: dict[str, float | str]
) -> Callable[..., None]:
    """A hook that runs a layer a second time, quantized, and compares the outputs.

    Args:
        name: Name of the layer.
        quantizers: Its quantizers, which are on in the second run only.
        results: Gets the SQNR; the worst of them if the layer runs several times.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compare the float output with the quantized one."""
        with toggling(quantizers):
            quantized_output = run_again(module, args, kwargs)

        expected, quantized = floats_of(output), floats_of(quantized_output)
        if not expected:
            results[name] = "its output holds no floating-point tensor"
            return
        sqnrs = []
        for reference, tensor in zip(expected, quantized, strict=True):
            sqnrs.append(sqnr_db(_to_array(reference), _to_array(tensor)))

        earlier = results.get(name)
        if isinstance(earlier, float):
            sqnrs.append(earlier)

        results[name] = min(sqnrs)

    return hook


def _to_array(tensor: torch.Tensor) -> Any:
    return tensor.float().cpu().numpy()


def _name_format(quantizers: Sequence[TensorQuantizer]) -> str:
    """The word for the format of a layer whose nodes the census does not name."""
    is_float = all(quantizer.format.is_float for quantizer in quantizers)
    return LOW_TYPES["FP8"] if is_float else LOW_TYPES["Int8"]


# The engine


@dataclass(frozen=True)
class _EngineFacts:
    """The facts of the build about a layer; `promised` is the word for the type of its Q/DQ, "" if it has none."""

    promised: str
    precision: str | None
    kernels: tuple[str, ...]
    note: str
    macs: int | None
    fraction: float | None
    unknown: Mapping[str, str]


class _Engine:
    """Which ONNX nodes and kernels a layer became.

    Args:
        build: From `build_engine`.
        entries: The layers and calls.
    """

    def __init__(self, build: BuildReport, entries: Mapping[str, _Entry]) -> None:
        self._sizes = {layer.name: layer for layer in build.coverage.layers}
        self._nodes: dict[str, list[LayerCensus]] = {}  # by their module
        self._products: dict[str, list[LayerCensus]] = {}  # of single calls, by their module
        for layer in build.layers:
            self._nodes.setdefault(layer.module, []).append(layer)
            if layer.op_type in PRODUCT_OPERATORS:
                self._products.setdefault(layer.module, []).append(layer)

        self._calls: dict[str, list[str]] = {}  # products by their module, in order
        for entry in entries.values():
            if entry.is_call and entry.kind in SINGLE_PRODUCTS:
                self._calls.setdefault(_module_around(entry.name), []).append(entry.name)

    def describe(self, entry: _Entry) -> _EngineFacts:
        """Type and kernels of a layer, and MACs of the nodes that it became."""
        nodes, reason = self._find_nodes(entry)
        if not nodes:
            unknown = {"engine": reason, "macs": reason}
            return _EngineFacts("", None, (), "", None, None, unknown)

        kernels: dict[str, None] = {}
        notes: dict[str, None] = {}
        for node in nodes:
            if node.kernel:
                kernels[node.kernel] = None
            if node.reason:
                notes[node.reason] = None

        promised = [node.promised for node in nodes if node.promised in LOW_TYPES]
        built = [LOW_TYPES.get(node.built, "float") for node in nodes]
        facts = _EngineFacts(
            promised=word_of(promised[0]) if len(set(promised)) == 1 else "",
            precision=built[0] if len(set(built)) == 1 else "mixed",
            kernels=tuple(kernels),
            note="; ".join(notes),
            macs=None,
            fraction=None,
            unknown={"macs": "a shape in the ONNX file is not known"},
        )
        work = self._add_sizes(nodes)
        if work is None:
            return facts
        macs, fraction = work
        return replace(facts, macs=macs, fraction=fraction, unknown={})

    def _find_nodes(self, entry: _Entry) -> tuple[list[LayerCensus], str]:
        """The nodes of a layer or call, or none and the reason."""
        if not entry.is_call:
            nodes = self._nodes.get(entry.name, [])
            return (
                nodes,
                "the census lists nodes that multiply; this layer became none of them",
            )
        if entry.kind not in SINGLE_PRODUCTS:
            return [], "only products are found in the census by their call"
        module = _module_around(entry.name)
        nodes, calls = self._products.get(module, []), self._calls[module]
        if len(nodes) == len(calls):  # in the same order
            return [nodes[calls.index(entry.name)]], ""
        reason = f"its module made {len(calls)} calls, but has {len(nodes)} products in the file"
        return [], reason

    def _add_sizes(self, nodes: Sequence[LayerCensus]) -> tuple[int, float] | None:
        """Add MACs of some nodes and their fraction of all; None if a size is not known."""
        sizes = [self._sizes[node.node] for node in nodes if node.node in self._sizes]
        if not sizes:
            return None
        macs, fraction = 0, 0.0
        for size in sizes:
            if size.macs is None:
                return None
            macs += size.macs
            fraction += size.share or 0.0

        return macs, fraction
