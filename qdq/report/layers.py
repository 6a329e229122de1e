"""Every layer of a run, with what each stage knows of it: why it is int8 or float, its ranges, errors and kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qdq.analyze import Analysis, LayerSensitivity
from qdq.build import BuildReport
from qdq.calibrate import Range
from qdq.dataflow import Dataflow
from qdq.forward import (
    Contraction,
    ForwardTrace,
    Operation,
    call_model,
    evaluating,
    floats_of,
    trace_forward,
)
from qdq.functions import CONTRACTIONS, SINGLE_PRODUCTS
from qdq.metrics import sqnr_db
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.functions import run_again
from qdq.quantize import fake_quantize
from qdq.quantizer import SharedQuantizer, TensorQuantizer, disable_quantization, toggling
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


@dataclass(frozen=True)
class _Entry:
    """A layer, a call, or a module that multiplies out of reach, before anything is known of it but what is planned."""

    name: str
    kind: str
    is_call: bool
    is_layer: bool
    is_quantized: bool
    reason: str
    weights: int


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
    """One record for every layer that could be int8, and for every call that a rule says something about.

    The model runs a few times on the batch. Nothing about it changes.

    Args:
        model: The model as it was exported.
        batch: A few samples (see `trace.call_model`).
        plan: From `swap_modules`.
        rewired: From `rewire_operations`.
        ranges: From `calibrate_model`.
        analysis: From `analyze_layers`.
        build: From `build_engine`.
        statistics: What calibration collected; None if it was not kept.
        float_bytes: Bytes of a weight that is not int8 in the exported file.

    Returns:
        The records in the order in which the layers run; those that do not run come last.
    """
    with disable_quantization(model):
        trace = trace_forward(model, batch)
    flow = Dataflow(trace)
    entries = _list_entries(model, plan, rewired, trace, flow)
    found = find_all_quantizers(model, batch)
    owners = _find_owners(found, entries)
    own = _without_calls(found, owners, entries)
    neighbours = _Neighbours(flow, entries)
    knowledge = _Knowledge(
        neighbours=neighbours,
        tensors=_Tensors(model, ranges, rewired, statistics),
        reasons=_Reasons(analysis, owners),
        sensitivities=_list_sensitivities(analysis),
        outputs=_measure_outputs(model, batch, own),
        engine=_Engine(build, entries),
        float_bytes=float_bytes,
    )
    return [knowledge.describe(entries[name], own.get(name, [])) for name in neighbours.order]


@dataclass(frozen=True)
class _Knowledge:
    """What is known of all layers, stage by stage."""

    neighbours: _Neighbours
    tensors: _Tensors
    reasons: _Reasons
    sensitivities: Mapping[str, Sensitivity]
    outputs: Mapping[str, float | str]
    engine: _Engine
    float_bytes: int

    def describe(self, entry: _Entry, quantizers: list[TensorQuantizer]) -> LayerRecord:
        """All of it for one layer."""
        is_int8 = (
            entry.is_quantized
            and bool(quantizers)
            and all(quantizer.is_enabled for quantizer in quantizers)
        )
        reason = self.reasons.explain(entry, is_int8, self.tensors.note_of(quantizers))
        output = self.outputs.get(entry.name)
        built = self.engine.describe(entry)
        return LayerRecord(
            name=entry.name,
            kind=entry.kind,
            is_call=entry.is_call,
            precision="int8" if is_int8 else "float",
            reason=reason,
            rules=tuple(dict.fromkeys(RULE.findall(reason))),
            tensors=tuple(self.tensors.describe(entry.name, quantizer) for quantizer in quantizers),
            sensitivity=self.sensitivities.get(entry.name),
            output_sqnr_db=output if isinstance(output, float) and math.isfinite(output) else None,
            macs=built.macs,
            macs_share=built.share,
            weights=entry.weights,
            weight_bytes=entry.weights * (1 if is_int8 else self.float_bytes),
            engine=built.precision,
            kernels=built.kernels,
            engine_note=built.note,
            reads=self.neighbours.reads[entry.name],
            feeds=self.neighbours.feeds[entry.name],
            reads_input=entry.name in self.neighbours.reads_input,
            writes_output=entry.name in self.neighbours.writes_output,
            unknown={**built.unknown, **self._list_unknown(entry, quantizers, is_int8)},
        )

    def _list_unknown(
        self, entry: _Entry, quantizers: list[TensorQuantizer], is_int8: bool
    ) -> dict[str, str]:
        """Field -> why it holds nothing."""
        unknown = {}
        output = self.outputs.get(
            entry.name, "measured for layers only" if quantizers else "it has no quantizers"
        )
        if isinstance(output, str):
            unknown["output_sqnr_db"] = output
        elif not math.isfinite(output):
            unknown["output_sqnr_db"] = "no error: the output on the example is the same"
        if entry.name not in self.sensitivities:
            unknown["sensitivity"] = self.reasons.why_not_measured(entry, is_int8)
        if not quantizers:
            unknown["tensors"] = f"it was given no quantizers: {entry.reason}"
        if not self.neighbours.has_any(entry.name):
            unknown["neighbours"] = "it does not run on the example"
        return unknown


def _list_entries(
    model: nn.Module, plan: SwapPlan, rewired: RewirePlan, trace: ForwardTrace, flow: Dataflow
) -> dict[str, _Entry]:
    """What could be int8: modules of mapped types, missed ones, and calls that are quantized or left in float.

    A missed module all of whose products the rewiring has decided about stands there with its calls.
    """
    calls = [operation for operation in rewired.operations if operation.action != "share"]
    weights = _weigh_calls(flow)
    missed = _find_missed(model, plan, calls, trace)
    modules = [
        module
        for module in plan.modules
        if module.name in missed or (module.mapped and module.action != "missed")
    ]
    entries = [_entry_of_module(module) for module in modules]
    entries += [_entry_of_call(call, weights.get(call.name, 0)) for call in calls]
    return {entry.name: entry for entry in entries}


def _weigh_calls(flow: Dataflow) -> dict[str, int]:
    """Product -> number of weights that it was given: matrices that do not depend on the input of the network."""
    return {
        call.name: sum(
            math.prod(shape)
            for value in call.inputs
            if not flow.is_computed(value) and len(shape := flow.shapes[value]) >= 2
        )
        for call in flow.operations
        if call.function in CONTRACTIONS
    }


@dataclass(frozen=True)
class _Products:
    """Some products: the modules that call them, and the memory that they read."""

    modules: frozenset[str]
    storages: frozenset[int]

    @classmethod
    def of(cls, calls: Iterable[Contraction]) -> _Products:
        known = list(calls)
        return cls(
            frozenset(call.module for call in known),
            frozenset().union(*(call.storages for call in known)),
        )

    def involve(self, module: str, storages: set[int]) -> bool:
        """Whether a module calls one of them, or one reads its memory."""
        return module in self.modules or not self.storages.isdisjoint(storages)


def _find_missed(
    model: nn.Module, plan: SwapPlan, calls: Iterable[PlannedOperation], trace: ForwardTrace
) -> frozenset[str]:
    """The missed modules with a product, in their own forward or with their weights, that no call stands for."""
    decided = {(_owner_of(call), call.function) for call in calls}
    modules = dict(model.named_modules())
    undecided = [call for call in trace.contractions if (call.module, call.function) not in decided]
    every, rest = _Products.of(trace.contractions), _Products.of(undecided)

    def is_missed(name: str) -> bool:
        own = {
            weight.untyped_storage().data_ptr()
            for weight in modules[name].parameters(recurse=False)
        }
        return not every.involve(name, own) or rest.involve(name, own)

    return frozenset(module.name for module in plan.of("missed") if is_missed(module.name))


def _entry_of_module(module: PlannedModule) -> _Entry:
    is_quantized = module.action == "quantize"
    return _Entry(
        module.name, module.type, False, module.mapped, is_quantized, module.reason, module.weights
    )


def _entry_of_call(call: PlannedOperation, weights: int) -> _Entry:
    return _Entry(
        call.name, call.function, True, False, call.action == "quantize", call.reason, weights
    )


def _owner_of(call: PlannedOperation) -> str:
    return call.name.rpartition(".")[0]


def _find_owners(
    found: Mapping[str, list[TensorQuantizer]], entries: Mapping[str, _Entry]
) -> dict[str, str]:
    """Call -> the layer that its quantizer is there for (see `units.find_units`)."""
    known = [name for name in found if name in entries]
    layer_of = {
        quantizer: name for name in known if not entries[name].is_call for quantizer in found[name]
    }
    return {
        name: layer_of[quantizer]
        for name in known
        if entries[name].is_call
        for quantizer in found[name]
        if quantizer in layer_of
    }


def _without_calls(
    found: Mapping[str, list[TensorQuantizer]],
    owners: Mapping[str, str],
    entries: Mapping[str, _Entry],
) -> dict[str, list[TensorQuantizer]]:
    """Layer or call -> its own quantizers."""
    of_calls: dict[str, set[TensorQuantizer]] = {}
    for call, layer in owners.items():
        of_calls.setdefault(layer, set()).update(found[call])
    return {
        name: [quantizer for quantizer in found[name] if quantizer not in of_calls.get(name, ())]
        for name in found
        if name in entries
    }


class _Neighbours:
    """Who reads whose output, through whatever is no layer.

    Args:
        flow: One forward.
        entries: The layers.

    Attributes:
        order: The names of all layers, in the order in which they run.
        reads: Layer -> the layers that it reads.
        feeds: Layer -> the layers that read it.
        reads_input: Layers that read the input of the network.
        writes_output: Layers from which an output comes.
    """

    def __init__(self, flow: Dataflow, entries: Mapping[str, _Entry]) -> None:
        self._entries = entries
        self._owners: dict[str, str | None] = {}
        reads: dict[str, dict[str | None, None]] = {
            name: {} for name in entries
        }  # None: the input of the network
        sources: dict[int, dict[str | None, None]] = {value: {None: None} for value in flow.inputs}
        order: dict[str, None] = {}
        for operation in flow.operations:
            before = {
                source: None for value in operation.inputs for source in sources.get(value, {})
            }
            layer = self._layer_of(operation)
            if layer is not None:
                order[layer] = None
                reads[layer].update({source: None for source in before if source != layer})
                before = {layer: None}
            sources.update(dict.fromkeys(operation.outputs, before))
        self.order = [*order, *(name for name in entries if name not in order)]
        self.reads_input = {name for name, others in reads.items() if None in others}
        self.reads = {
            name: tuple(each for each in others if each is not None)
            for name, others in reads.items()
        }
        self.writes_output = {source for value in flow.outputs for source in sources.get(value, {})}
        feeds: dict[str, list[str]] = {name: [] for name in entries}
        for reader in self.order:
            for name in self.reads[reader]:
                feeds[name].append(reader)
        self.feeds = {name: tuple(readers) for name, readers in feeds.items()}

    def has_any(self, name: str) -> bool:
        """Whether a layer reads or feeds anything."""
        is_end = name in self.reads_input or name in self.writes_output
        return is_end or bool(self.reads[name] or self.feeds[name])

    def _layer_of(self, operation: Operation) -> str | None:
        entry = self._entries.get(operation.name)
        if entry is not None and entry.is_call:
            return entry.name
        entry = self._entries.get(operation.module)
        if entry is not None and not entry.is_layer and operation.function in CONTRACTIONS:
            return entry.name
        return self._layer_around(operation.module)

    def _layer_around(self, module: str) -> str | None:
        """The innermost layer that a module is, or is a part of."""
        if module not in self._owners:
            entry = self._entries.get(module)
            if entry is not None and entry.is_layer:
                self._owners[module] = module
            else:
                self._owners[module] = (
                    self._layer_around(module.rpartition(".")[0]) if module else None
                )
        return self._owners[module]


class _Reasons:
    """Why a layer is int8 or float.

    Args:
        analysis: What the analysis decided.
        owners: Call -> the layer that it is there for.
    """

    def __init__(self, analysis: Analysis, owners: Mapping[str, str]) -> None:
        self._analysis = analysis
        self._owners = owners
        self._units = {
            name: unit for unit in analysis.layers for name in unit.layers or (unit.name,)
        }
        self._steps = {
            name: number for number, step in enumerate(analysis.steps) for name in _layers_of(step)
        }
        self._ranks = {unit.name: rank for rank, unit in enumerate(analysis.layers, 1)}
        self._last_chosen = max(
            (self._ranks.get(step.layer, 0) for step in analysis.steps), default=0
        )

    def explain(self, entry: _Entry, is_int8: bool, note: str) -> str:
        """One sentence, or two.

        Args:
            entry: The layer.
            is_int8: What it runs in.
            note: Why calibration left it in float; "" if it did not.
        """
        if not entry.is_quantized or note:
            return note or entry.reason
        if entry.name in self._analysis.pinned:
            return f"pinned to {self._analysis.pinned[entry.name]} by the plan"
        if entry.name in self._steps:
            return self._explain_step(self._steps[entry.name])
        owner = self._owners.get(entry.name)
        if not is_int8:
            return (
                f"it is there only for {owner}, which is in float"
                if owner
                else "its quantizers are switched off"
            )
        if owner:
            return f"{entry.reason}; it goes with {owner}"
        unit = self._units.get(entry.name)
        return entry.reason + (f"; {self._explain_rank(unit)}" if unit else "")

    def why_not_measured(self, entry: _Entry, is_int8: bool) -> str:
        """Why the analysis says nothing of a layer."""
        if not entry.is_quantized:
            return "only what is quantized is measured"
        if entry.name in self._analysis.pinned:
            return "pinned layers are not measured"
        if entry.name in self._analysis.unmeasured:
            return "the budget of the analysis was used up"
        if owner := self._owners.get(entry.name):
            return f"measured with {owner}"
        return "not measured" if is_int8 else "it was off when the analysis began"

    def _explain_step(self, number: int) -> str:
        steps, name = self._analysis.steps, self._analysis.metric_name
        states = (steps[number - 1] if number else self._analysis, steps[number])
        sqnr = " -> ".join(f"{state.sqnr_db:.2f}" for state in states)
        metric = " -> ".join(
            "" if state.metric is None else f"{state.metric:.4g}" for state in states
        )
        what = "" if name == "sqnr" else f"{name} of the outputs {metric}, "
        return f"step {number + 1} of {len(steps)} of the search left it in float: {what}SQNR of the outputs {sqnr} dB"

    def _explain_rank(self, unit: LayerSensitivity) -> str:
        units = self._analysis.layers
        rank, how = self._ranks[unit.name], "measured" if unit.is_exact else "estimated"
        where = f"rank {rank} of {len(units)} in sensitivity ({how})"
        if self._last_chosen <= rank:
            return f"{where}; the search ended: {self._analysis.stopped_by}"
        return f"{where}, but passed over for less sensitive ones: {self._explain_passing(unit)}"

    def _explain_passing(self, unit: LayerSensitivity) -> str:
        """Why the search took less sensitive units; an analysis does not keep which limit stood in the way."""
        layers = f"with its {len(unit.layers)} layers " if len(unit.layers) > 1 else ""
        size = f"{layers}it did not fit the limits"
        if unit.cost is not None:
            return f"they gain more for a microsecond (it costs {unit.cost:.4g}), or {size}"
        if self._analysis.mode == "leave-one-out":
            return f"measured anew after a step they gained more, or {size}"
        return size


def _layers_of(step: Any) -> tuple[str, ...]:
    return step.layers or (step.layer,)


def _list_sensitivities(analysis: Analysis) -> dict[str, Sensitivity]:
    """Layer -> what was measured, of it or of its group."""
    result = {}
    for rank, unit in enumerate(analysis.layers, 1):
        layers = unit.layers or (unit.name,)
        sqnr = unit.sqnr_db if math.isfinite(unit.sqnr_db) else None
        record = Sensitivity(
            unit.name,
            layers,
            rank,
            len(analysis.layers),
            unit.gain,
            unit.gain_low,
            unit.gain_high,
            sqnr,
            unit.is_exact,
            unit.metric,
            unit.cost,
        )
        result.update(dict.fromkeys(layers, record))
    return result


class _Tensors:
    """What is known of the tensor behind each quantizer.

    Args:
        model: The model.
        ranges: From `calibrate_model`.
        rewired: Who shares a range with whom.
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
        self._ranges = {each.name: each for each in ranges}
        self._groups = {
            name: (leader, *followers)
            for leader, followers in rewired.shared.items()
            for name in (leader, *followers)
        }
        self._statistics = statistics
        self._summary = {} if statistics is None else statistics.summarize()["tensors"]

    def note_of(self, quantizers: Iterable[TensorQuantizer]) -> str:
        """Why calibration left the layer with these in float; "" if it did not."""
        found = (self._ranges.get(quantizer.name or "") for quantizer in quantizers)
        return next((each.note for each in found if each and each.note), "")

    def describe(self, layer: str, quantizer: TensorQuantizer) -> TensorRecord:
        """One quantizer of a layer."""
        name = quantizer.name or ""
        found = self._ranges.get(name)
        amax = quantizer.amax
        record = TensorRecord(
            quantizer=name,
            role=_role_of(name),
            is_on=quantizer.is_enabled,
            amax=None if amax is None else float(amax.max()),
            least_amax=None if amax is None else float(amax.min()),
            ranges=0 if amax is None else amax.numel(),
            method=found.method if found else "",
            sqnr_db=None,
            clipped=None,
            methods={},
            histogram=(),
            histogram_end=None,
            shares=tuple(other for other in self._groups.get(name, ()) if other != name),
        )
        if amax is None:
            note = found.note if found and found.note else "it was not calibrated"
            return replace(
                record,
                unknown=dict.fromkeys(("amax", "sqnr_db", "clipped", "methods", "histogram"), note),
            )
        weight = self._weight_of(layer, name)
        if weight is not None:
            return _with_weight(record, weight, quantizer)
        return self._with_statistics(record, quantizer)

    def _weight_of(self, layer: str, name: str) -> torch.Tensor | None:
        module = self._modules.get(layer)
        if not isinstance(module, QuantMixin):
            return None
        parameter = module.weights_of(module).get(name.rpartition(".")[2])
        return None if parameter is None else module._parameters[parameter]

    def _with_statistics(self, record: TensorRecord, quantizer: TensorQuantizer) -> TensorRecord:
        leader = (
            quantizer.leader.name if isinstance(quantizer, SharedQuantizer) else record.quantizer
        )
        if self._statistics is None or leader not in self._statistics.tensors:
            why = (
                NO_STATISTICS if self._statistics is None else "calibration collected nothing of it"
            )
            return replace(
                record, unknown=dict.fromkeys(("sqnr_db", "clipped", "methods", "histogram"), why)
            )
        tensor, amax = self._statistics.tensors[leader], record.amax or 0.0
        counts, end = tensor.histogram(HISTOGRAM_COLUMNS)
        summary = self._summary[leader]
        methods = {
            method: MethodRange(float(value), float(summary["clipped"][method]))
            for method, value in summary["amax"].items()
        }
        record = replace(
            record, methods=methods, histogram=tuple(map(int, counts)), histogram_end=end
        )
        if record.ranges > 1:
            why = "it has a range for each channel, and the histogram is of all of them"
            return replace(record, unknown=dict.fromkeys(("sqnr_db", "clipped"), why))
        clipped = tensor.clipped_share(amax, quantizer.format.unsigned)
        sqnr = tensor.rounding_sqnr_db(amax, quantizer.format)
        return _with_sqnr(replace(record, clipped=clipped), sqnr)


def _with_weight(
    record: TensorRecord, weight: torch.Tensor, quantizer: TensorQuantizer
) -> TensorRecord:
    """A weight is known itself: its error is exact."""
    amax = quantizer.amax
    assert amax is not None  # noqa: S101  # the caller has looked
    values = weight.detach().float()
    axis = quantizer._axis
    found = fake_quantize(values, amax, quantizer.format, axis)
    limit = (
        amax
        if axis is None
        else amax.reshape([-1 if dim == axis % values.dim() else 1 for dim in range(values.dim())])
    )
    clipped = (
        float((values.abs() > limit.to(values.device)).float().mean()) if values.numel() else 0.0
    )
    unknown = {
        "methods": "weights are solved by their own methods, max and mse",
        "histogram": "of weights the ranges of the channels count",
    }
    sqnr = sqnr_db(values.cpu().numpy(), found.cpu().numpy())
    return _with_sqnr(replace(record, clipped=clipped, unknown=unknown), sqnr)


def _with_sqnr(record: TensorRecord, sqnr: float) -> TensorRecord:
    if math.isfinite(sqnr):
        return replace(record, sqnr_db=sqnr)
    return replace(
        record,
        unknown={**record.unknown, "sqnr_db": "no error: every value is a code, or all are zero"},
    )


def _role_of(quantizer: str) -> str:
    """What a quantizer is for: "input" of `conv._input_quantizer`."""
    return (
        quantizer.rpartition(".")[2].removeprefix("_").removesuffix("_quantizer").replace("_", " ")
    )


@torch.no_grad()
def _measure_outputs(
    model: nn.Module, batch: Any, quantizers: Mapping[str, list[TensorQuantizer]]
) -> dict[str, float | str]:
    """Layer -> SQNR of its own output in dB, all its quantizers on, its inputs those of the float model."""
    result: dict[str, float | str] = {}
    modules = dict(model.named_modules())
    with disable_quantization(model), evaluating(model), ExitStack() as hooks:
        for name, own in quantizers.items():
            module = modules.get(name)
            if isinstance(module, QuantInputMixin):
                if any(quantizer.amax is None for quantizer in own):
                    result[name] = "it has no range"
                    continue
                hook = module.register_forward_hook(
                    _compare_outputs(name, own, result), with_kwargs=True
                )
                hooks.callback(hook.remove)
        call_model(model, batch)
    for name in quantizers:
        if isinstance(modules.get(name), QuantInputMixin):
            result.setdefault(name, "it does not run on the example")
    return result


def _compare_outputs(
    name: str, own: list[TensorQuantizer], result: dict[str, float | str]
) -> Callable[..., None]:
    """A hook that runs the layer once more, quantized; of several calls the worst counts."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with toggling(own):
            found = run_again(module, args, kwargs)
        expected, quantized = floats_of(output), floats_of(found)
        if not expected:
            result[name] = "its output holds no floating-point tensor"
            return
        pairs = zip(expected, quantized, strict=True)
        sqnr = min(
            sqnr_db(one.float().cpu().numpy(), other.float().cpu().numpy()) for one, other in pairs
        )
        before = result.get(name, math.inf)
        result[name] = min(before, sqnr) if isinstance(before, float) else sqnr

    return hook


@dataclass(frozen=True)
class _Built:
    """What the census says of a layer."""

    precision: str | None
    kernels: tuple[str, ...]
    note: str
    macs: int | None
    share: float | None
    unknown: Mapping[str, str]


class _Engine:
    """Which ONNX nodes and kernels a layer became.

    Args:
        build: From `build_engine`.
        entries: The layers.
    """

    def __init__(self, build: BuildReport, entries: Mapping[str, _Entry]) -> None:
        self._census: dict[str, list[LayerCensus]] = {}
        for layer in build.layers:
            self._census.setdefault(layer.module, []).append(layer)
        self._sizes = {layer.name: layer for layer in build.coverage.layers}
        products = (
            entry for entry in entries.values() if entry.is_call and entry.kind in SINGLE_PRODUCTS
        )
        self._calls: dict[
            str, dict[str, int]
        ] = {}  # module -> its calls, and which of them each is
        for entry in products:
            calls = self._calls.setdefault(entry.name.rpartition(".")[0], {})
            calls[entry.name] = len(calls)

    def describe(self, entry: _Entry) -> _Built:
        """Type and kernels of a layer; MACs of the nodes that it became."""
        nodes, why = self._nodes_of(entry)
        if not nodes:
            return _Built(None, (), "", None, None, {"engine": why, "macs": why})
        kinds = Counter("int8" if node.int8 else "float" for node in nodes)
        sizes = [self._sizes[node.node] for node in nodes if node.node in self._sizes]
        is_sized = bool(sizes) and all(size.macs is not None for size in sizes)
        return _Built(
            precision=next(iter(kinds)) if len(kinds) == 1 else "mixed",
            kernels=tuple(dict.fromkeys(node.kernel for node in nodes if node.kernel)),
            note="; ".join(dict.fromkeys(node.reason for node in nodes if node.reason)),
            macs=sum(size.macs or 0 for size in sizes) if is_sized else None,
            share=sum(size.share or 0.0 for size in sizes) if is_sized else None,
            unknown={} if is_sized else {"macs": "a shape in the ONNX file is not known"},
        )

    def _nodes_of(self, entry: _Entry) -> tuple[list[LayerCensus], str]:
        if not entry.is_call:
            nodes = self._census.get(entry.name, [])
            return nodes, "the census lists convolutions and matrix products, and this became none"
        if entry.kind not in SINGLE_PRODUCTS:
            return [], "the census lists convolutions and matrix products only"
        owner = entry.name.rpartition(".")[0]
        nodes, calls = self._census.get(owner, []), self._calls[owner]
        if len(nodes) != len(calls):
            return (
                [],
                f"its module became {len(nodes)} products in the file and made {len(calls)} calls",
            )
        return [nodes[calls[entry.name]]], ""
