"""Quantizers for function calls, for example on the shortcut of a residual add, and one scale where TensorRT needs it.

The rules are in `tensorrt-qdq-rules.md`, sections 2.5 to 2.9. A forward on one batch shows which function reads
which tensor. It shows the shortcuts (R-ADD-2) and the tensors that must agree in scale: one tensor with several readers
(R-FAN), both sides of a copy or a max pooling (R-COPY, R-MP), all parts of a concat (R-CAT-1).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from qdq.dataflow import Dataflow
from qdq.device import find_device
from qdq.errors import ArgumentError
from qdq.float_rules import (
    ONLY_PRODUCTS,
    CallRules,
    find_weight,
    list_factors,
    reason_against_fp8_call,
)
from qdq.formats import FP8, FP8_BITS, INT8, require_formats
from qdq.forward import Operation, join_name, require_model
from qdq.functions import (
    ADDITIONS,
    ATTENTION,
    AVERAGE_POOLINGS,
    CONCATS,
    FUNCTIONS,
    MATRIX_PRODUCTS,
    MAX_POOLINGS,
    MEANS,
    MULTIPLICATIONS,
    RESIZES,
    WEIGHTED,
)
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.attend import KEY, QUERY, SOFTMAX, VALUE
from qdq.nn.functions import QuantFunctionsMixin, add_function_quantizers, name_quantizer
from qdq.nn.registry import find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import (
    QuantDescriptor,
    SharedQuantizer,
    SoftmaxQuantizer,
    TensorQuantizer,
    disable_quantization,
)
from qdq.text import list_names
from qdq.work import Work, trace_work

logger = logging.getLogger(__name__)

SCALES = ("shared", "independent")
_FP8_ATTENTION = "FP8 attention is one kernel if all of its operands are quantized (R-FP8)"
# The functions that have a rule.
_CANDIDATES = (
    WEIGHTED
    | MATRIX_PRODUCTS
    | ATTENTION
    | CONCATS
    | AVERAGE_POOLINGS
    | MAX_POOLINGS
    | MEANS
    | ADDITIONS
    | MULTIPLICATIONS
    | RESIZES
)


@dataclass(frozen=True)
class PlannedOperation:
    """The action for one function call, and the reason.

    Args:
        name: Dotted name of the module and the call: "layer1.0.add".
        function: Name of the function.
        action: "quantize" (some of its tensors get a quantizer), "share" (its tensors have one scale) or "float".
        reason: One sentence.
        operands: Positions of the tensors that are quantized.
        macs: MACs of the call.
    """

    name: str
    function: str
    action: str
    reason: str
    operands: tuple[int, ...] = ()
    macs: int = 0


@dataclass(frozen=True)
class RewirePlan:
    """Every function call that has a rule, and the quantizers that share a range.

    Args:
        operations: In the order in which they ran.
        shared: Quantizer -> the quantizers that have its range.
        macs: All known MACs of one forward.
        int8_macs: Those of quantized layers and calls.
    """

    operations: tuple[PlannedOperation, ...]
    shared: dict[str, tuple[str, ...]]
    macs: int = 0
    int8_macs: int = 0

    def of(self, action: str) -> list[PlannedOperation]:
        """The operations with one action.

        Args:
            action: "quantize", "share" or "float".
        """
        return [operation for operation in self.operations if operation.action == action]

    def format_table(self) -> str:
        """The counts, then the decisions with the reasons; similar operations are on one line."""
        counts = Counter(operation.action for operation in self.operations)
        num_followers = sum(map(len, self.shared.values()))
        lines = [
            f"{counts['quantize']} function calls quantized, {counts['float']} left in float; "
            f"{num_followers} quantizers use the range of {len(self.shared)} others"
        ]
        if self.macs:
            lines[0] += f"; {self.int8_macs / self.macs:.1%} of all MACs quantized, layers included"
        groups: dict[tuple[str, str, str], list[PlannedOperation]] = {}
        for operation in self.operations:
            key = (operation.action, operation.function, operation.reason)
            groups.setdefault(key, []).append(operation)
        for (action, function, reason), operations in groups.items():
            shown = list_names([operation.name for operation in operations], 2)
            line = f"  {action:8}  {len(operations)} {function} ({shown}): {reason}"
            macs = sum(operation.macs for operation in operations)
            if macs:
                line += f"; {macs / self.macs:.1%} of all MACs"
            lines.append(line)
        return "\n".join(lines)


def rewire_operations(
    model: nn.Module,
    example_inputs: Any,
    *,
    scales: str = "shared",
    include: Iterable[Pattern] = (),
    exclude: Iterable[Pattern] = (),
    formats: Sequence[str] = (INT8,),
) -> RewirePlan:
    """Put quantizers before function calls, and let quantizers share ranges where TensorRT needs it; in place.

    Modules keep their names, their parameters and their identity; `restore_modules` undoes it. The new quantizers have
    no ranges until `calibrate_model` has run.

    Args:
        model: A swapped model; one whose products are all function calls has nothing to swap.
        example_inputs: One batch (see `forward.call_model`); the model runs on it once.
        scales: "shared": one scale for all readers of a tensor, for both sides of a copy or max pooling and for all
            parts of a concat. "independent": one scale for each quantizer, which is more accurate and slower.
        include: Patterns (see `qdq.patterns`) of calls ("encoder.*.matmul") that are quantized against a default rule.
        exclude: Patterns of calls that stay in float, or of modules whose calls all stay in float; patterns that
            `swap_modules` was given may be among them.
        formats: As for `swap_modules`. With FP8, the products of attention are quantized to FP8: queries, keys, values
            and the output of the softmax. Without int8, sums, poolings and resizes stay in float.

    Returns:
        The plan that was carried out. A pattern that matches nothing is logged as a warning.

    Raises:
        ArgumentError: An unknown policy; a model with nothing quantized and no call to quantize, or one that is rewired
            already; a regular expression that cannot be compiled.
        ArgumentTypeError: A pattern of another kind.
    """
    require_model(model)
    require_formats(formats)
    if scales not in SCALES:
        raise ArgumentError(
            f"scales is {scales!r}; known are {', '.join(SCALES)}.", "use 'shared'."
        )
    modules = dict(model.named_modules())
    if any(isinstance(module, QuantFunctionsMixin) for module in modules.values()):
        raise ArgumentError(
            "the model is already rewired.", "call restore_modules, then swap and rewire again."
        )
    with disable_quantization(model):
        trace, work = trace_work(model, example_inputs)
    flow = Dataflow(trace)
    included = Patterns(include, "include")
    excluded = Patterns(exclude, "exclude")
    planner = _Planner(modules, flow, included, excluded, formats)
    planned = planner.plan(work)
    int8_macs = planner.count_int8_macs()
    if not any(isinstance(module, QuantInputMixin) for module in modules.values()):
        _require_calls(modules, planned)
    places = _list_places(modules, flow, planned, formats)
    _group_places(places, flow, planned, is_shared=scales == "shared")
    shared = _attach(modules, places, flow, is_training=model.training)
    return RewirePlan(tuple(planned.values()), shared, work.total, int8_macs)


def _require_calls(modules: dict[str, nn.Module], planned: dict[str, PlannedOperation]) -> None:
    """Require a quantized call in a model without quantized layers; name the layers that a swap would reach.

    Args:
        modules: The modules of the model, by dotted name.
        planned: The plan for its calls.

    Raises:
        ArgumentError: No call is quantized.
    """
    is_quantized = any(operation.action == "quantize" for operation in planned.values())
    swappable = [name for name, module in modules.items() if _has_weight_to_swap(module)]
    if is_quantized and swappable:
        logger.warning(
            "no layer is quantized, and swap_modules reaches %d: %s",
            len(swappable),
            list_names(swappable, 5),
        )
    elif swappable:
        raise ArgumentError("the model has no quantized layer.", "call swap_modules first.")
    elif not is_quantized:
        raise ArgumentError(
            "the model has no layer that swap_modules reaches, and no function call that a rule quantizes.",
            "the plan of swap_modules says why; include=[...] overrides a rule, for calls such as 'head.linear'.",
        )


def _has_weight_to_swap(module: nn.Module) -> bool:
    """Whether `swap_modules` could quantize the weight of a module: all its weights are plain parameters."""
    counterpart = find_counterpart(type(module))
    if counterpart is None or not issubclass(counterpart, QuantMixin):
        return False
    return all(
        module._parameters.get(name) is not None for name in counterpart.weights_of(module).values()
    )


class _Decision(NamedTuple):
    """Action, reason and operands, as in `PlannedOperation`."""

    action: str
    reason: str
    operands: tuple[int, ...] = ()


class _Planner:
    """Decides for each function call which of its tensors get a quantizer.

    Args:
        modules: The modules of the model, by dotted name.
        flow: One forward of it.
        included: Patterns of calls that are quantized against a default rule.
        excluded: Patterns of calls that stay in float.
        formats: As for `rewire_operations`.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        flow: Dataflow,
        included: Patterns,
        excluded: Patterns,
        formats: Sequence[str],
    ) -> None:
        self._has_int8 = INT8 in formats
        self._has_fp8 = FP8.name in formats
        self._attention = list_attention(flow)
        self._modules = modules
        self._flow = flow
        self._included = included
        self._excluded = excluded
        self._rules = CallRules(modules, flow, self._is_quantized)

    def plan(self, work: Work) -> dict[str, PlannedOperation]:
        """The plan by the name of the call; if a module runs several times, its first run counts for all.

        Args:
            work: The work of the forward, in which all runs count.
        """
        planned: dict[str, PlannedOperation] = {}
        for operation in self._flow.operations:
            if operation.name in planned or not self._is_candidate(operation):
                continue
            action, reason, operands = self._decide(operation)
            planned[operation.name] = PlannedOperation(
                operation.name,
                operation.function,
                action,
                reason,
                operands,
                macs=work.macs.get(operation.name, 0),
            )
        for name, module in self._modules.items():
            # It may name a layer that the swap has left in float.
            self._excluded.match([name], module)
        self._included.warn_unused("function call")
        self._excluded.warn_unused("function call and no module")
        return planned

    def count_int8_macs(self) -> int:
        """MACs of all products that run in int8, as layers or as calls."""
        flops = 0
        for operation in self._flow.operations:
            if operation.metered and self._is_quantized(operation):
                flops += operation.metered
        return flops // 2

    def _is_candidate(self, operation: Operation) -> bool:
        """Whether a rule exists for a call: a sum or product of two computed tensors, a concat, attention ...

        Args:
            operation: The call. One that a quantized layer makes is part of that layer.
        """
        if self._has_fp8 and operation.name in self._attention:
            return True
        owner = self._modules[operation.module]
        if operation.function not in _CANDIDATES or isinstance(owner, QuantInputMixin):
            return False
        num_computed = sum(1 for value in operation.inputs if self._flow.is_computed(value))
        if operation.function in ADDITIONS | MULTIPLICATIONS:
            return num_computed >= 2
        if operation.function in WEIGHTED:
            # The plan of the swap covers the product of a layer with its stored weight.
            is_layer = find_counterpart(type(owner)) is not None
            is_covered = is_layer and self._flow.is_stored(operation.inputs[1])
            return num_computed == 1 and not is_covered
        return num_computed >= 1

    def _decide(self, operation: Operation) -> _Decision:
        """The decision for one call: exclusions first, then inclusions, then the rules."""
        owner = self._modules[operation.module]
        if pattern := self._excluded.match([operation.name], owner):
            return _Decision("float", f"excluded by {pattern}")
        if pattern := self._included.match([operation.name], owner):
            operands = self._list_operands(operation)
            return self._quantize(operation, f"included by {pattern}", operands)
        if decision := self._decide_fp8(operation):
            return decision
        if reason := self._rules.reason_against(operation):
            return _Decision("float", reason)
        if operation.function in CONCATS:
            return _Decision(
                "share", "copies: quantizers before and after it share one scale (R-CAT-1)"
            )
        if operation.function in MAX_POOLINGS:
            return _Decision(
                "share", "commutes with Q: quantizers before and after it share one scale (R-MP)"
            )
        if operation.function in ADDITIONS:
            return self._quantize_addition(operation)
        if weight := find_weight(operation, self._flow):
            return self._quantize_weighted(operation, weight.position)
        if operation.function in RESIZES:
            reason = "copies values between int8 layers: its input (R-RSZ)"
        else:
            reason = "average pooling before an int8 layer: its input (R-AP)"
        return self._quantize(operation, reason, (0,))

    def _decide_fp8(self, operation: Operation) -> _Decision | None:
        """The decision for a call that differs from int8; None for all others."""
        if not self._has_fp8:
            return None
        if operation.name in self._attention:
            return self._quantize(operation, _FP8_ATTENTION, self._attention[operation.name])
        is_product = operation.function in WEIGHTED | MATRIX_PRODUCTS | ATTENTION
        if self._has_int8:
            return None
        if not is_product:
            return _Decision("float", ONLY_PRODUCTS)
        if reason := reason_against_fp8_call(operation, self._flow):
            return _Decision("float", reason)
        return None

    def _quantize_addition(self, operation: Operation) -> _Decision:
        """An add that no rule leaves in float (R-ADD-1, R-ADD-4 and R-ADD-5)."""
        shortcut = self._rules.find_shortcut(operation)
        if shortcut is not None:
            reason = "shortcut of a residual add, on that side only (R-ADD-1)"
            return self._quantize(operation, reason, (shortcut,))
        reason = "an activation precedes the add: both operands, with one scale (R-ADD-4, R-ADD-5)"
        return self._quantize(operation, reason, (0, 1))

    def _quantize_weighted(self, operation: Operation, position: int) -> _Decision:
        """`F.linear`, `F.conv2d` or `x @ weight` on a stored or a computed weight: both operands (R-CONV-2).

        Args:
            operation: The call.
            position: Position of the weight among its tensors, which follows that of the input.
        """
        is_stored = self._flow.is_stored(operation.inputs[position])
        origin = "called as a function" if is_stored else "which the forward computes"
        operands = (position - 1, position)
        return self._quantize(operation, f"a product with a weight, {origin}", operands)

    def _quantize(self, operation: Operation, reason: str, operands: tuple[int, ...]) -> _Decision:
        """Quantize operands, unless the forward of the module is out of reach."""
        if isinstance(self._modules[operation.module], torch.jit.ScriptModule):
            return _Decision("float", "out of reach: its module is scripted")
        return _Decision("quantize", reason, operands)

    def _list_operands(self, operation: Operation) -> tuple[int, ...]:
        """Positions of the operands that an included call quantizes.

        Args:
            operation: The call. All factors of a product are quantized (R-CONV-2), all computed tensors of other calls.
        """
        if operation.function in MATRIX_PRODUCTS or FUNCTIONS[operation.function].factors:
            return list_factors(operation)
        positions = []
        for position, value in enumerate(operation.inputs):
            if self._flow.is_computed(value):
                positions.append(position)
        return tuple(positions)

    def _is_quantized(self, operation: Operation) -> bool:
        """Whether a product runs in int8, as a layer or as a call.

        Args:
            operation: The call of the product, in the forward of the layer or of another module.
        """
        is_attention = operation.name in self._attention  # also in the forward of a layer
        if isinstance(self._modules[operation.module], QuantMixin) and not is_attention:
            return True
        if self._has_fp8 and is_attention:
            return self._decide(operation).action == "quantize"
        is_product = operation.function in WEIGHTED | MATRIX_PRODUCTS
        is_call = is_product and self._is_candidate(operation)
        return is_call and self._decide(operation).action == "quantize"


@dataclass
class _Place:
    """The place of a quantizer: the input of a layer, or an operand of a call.

    Args:
        name: Dotted name of the quantizer.
        values: The tensors that it quantizes, several if its module runs several times.
        layer: The layer, None for a call.
        owner: Dotted name of the module that makes the call.
        site: The call in that module.
        operand: Position among its tensors.
        function: Name of the function that is called.
        axis: Axis of the ranges of a weight, which has one for each output; None for other operands.
        is_fp8: Whether its quantizer is FP8.
        is_attention: Whether it quantizes an operand of attention, which shares its range with no other place.
        is_softmax: Whether that operand is the output of a softmax.
        group: Equal for all places that share one range.
    """

    name: str
    values: list[int] = field(default_factory=list)
    layer: QuantInputMixin | None = None
    owner: str = ""
    site: str = ""
    operand: int = 0
    function: str = ""
    axis: int | None = None
    is_fp8: bool = False
    is_attention: bool = False
    is_softmax: bool = False
    group: int | str = 0


def list_attention(flow: Dataflow) -> dict[str, tuple[int, ...]]:
    """The operands of attention that FP8 quantizes, by the name of the call; the softmax is one of them.

    A call of `scaled_dot_product_attention` is one; of attention that is written out, both products are.

    Args:
        flow: One forward of a model.
    """
    operands: dict[str, tuple[int, ...]] = {}
    for operation in flow.operations:
        if operation.function == "scaled_dot_product_attention":
            operands[operation.name] = (QUERY, KEY, VALUE, SOFTMAX)
    for product in flow.attention_products():
        factors = list_factors(product)
        if len(factors) == 2:
            operands[product.name] = factors
    return operands


def _list_places(
    modules: dict[str, nn.Module],
    flow: Dataflow,
    planned: dict[str, PlannedOperation],
    formats: Sequence[str],
) -> list[_Place]:
    """The places of all quantizers. Layers come first, so that the range of a group is saved with a layer.

    Args:
        modules: The modules of the model, by dotted name.
        flow: One forward of it.
        planned: The plan for its calls.
        formats: As for `rewire_operations`.
    """
    attention = list_attention(flow) if FP8.name in formats else {}
    places: dict[str, _Place] = {}
    for run in flow.runs:
        layer = modules[run.module]
        if isinstance(layer, QuantInputMixin) and run.inputs:
            name = join_name(run.module, "_input_quantizer")
            place = places.setdefault(name, _Place(name, layer=layer))
            place.values.append(run.inputs[0])
    for operation in flow.operations:
        if operation.name not in planned:
            continue
        operands = planned[operation.name].operands
        for operand in operands:
            attribute = name_quantizer(operation.site, operand, len(operands))
            name = join_name(operation.module, attribute)
            weight = find_weight(operation, flow)
            axis = weight.axis if weight is not None and weight.position == operand else None
            place = places.setdefault(name, _place_operand(name, operation, operand, axis))
            place.is_fp8 = INT8 not in formats or operation.name in attention
            place.is_attention = operation.name in attention
            if operand == SOFTMAX:
                place.is_softmax = True
                continue
            value = operation.inputs[operand]
            place.is_softmax = place.is_attention and flow.comes_from_softmax(value)
            place.values.append(value)
    return list(places.values())


def _place_operand(name: str, operation: Operation, operand: int, axis: int | None) -> _Place:
    """The place at an operand of a call; its tensor is not set yet."""
    return _Place(
        name,
        owner=operation.module,
        site=operation.site,
        operand=operand,
        function=operation.function,
        axis=axis,
    )


def _group_places(
    places: list[_Place], flow: Dataflow, planned: dict[str, PlannedOperation], *, is_shared: bool
) -> None:
    """Decide which places share one range; both operands of a quantized add always do (R-ADD-4).

    Args:
        places: The places; their `group` is set.
        flow: One forward.
        planned: The plan for its calls.
        is_shared: Whether all tensors that must agree in scale for the fastest engine share one range.
    """
    if not is_shared:
        for place in places:
            is_addend = place.function in ADDITIONS
            place.group = join_name(place.owner, place.site) if is_addend else place.name
        return
    groups = _group_values(flow, planned)
    tied = [place for place in places if not place.is_attention]
    for place in tied:
        groups.unite(*place.values)
    for place in tied:
        place.group = groups.find(place.values[0])
    for place in places:
        if place.is_attention:
            place.group = place.name


def _group_values(flow: Dataflow, planned: dict[str, PlannedOperation]) -> _ScaleGroups:
    """Tensors that must agree: copies, max poolings and concats, and both operands of a quantized add.

    Args:
        flow: One forward.
        planned: The plan for its calls. A concat that stays in float ties nothing.
    """
    groups = _ScaleGroups()
    for operation in flow.operations:
        plan = planned.get(operation.name)
        if operation.function in MAX_POOLINGS or flow.is_copy(operation):
            groups.unite(operation.inputs[0], *operation.outputs)
        elif operation.function in CONCATS:
            if plan is None or plan.action != "float":
                groups.unite(*operation.inputs, *operation.outputs)
        elif operation.function in ADDITIONS and plan is not None and len(plan.operands) > 1:
            groups.unite(*operation.inputs[:2])
    return groups


class _ScaleGroups:
    """Union-find over tensors that must agree in scale."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def find(self, value: int) -> int:
        """The tensor that represents the group of a tensor.

        Args:
            value: Number of the tensor.
        """
        while (parent := self._parents.get(value, value)) != value:
            value = parent
        return value

    def unite(self, *values: int) -> None:
        """Make one group of the groups of some tensors.

        Args:
            values: Numbers of the tensors.
        """
        root = min(map(self.find, values))
        for value in values:
            self._parents[self.find(value)] = root


def _attach(
    modules: dict[str, nn.Module], places: list[_Place], flow: Dataflow, *, is_training: bool
) -> dict[str, tuple[str, ...]]:
    """Give every place its quantizer, and all places of a group one range.

    Args:
        modules: The modules of the model, by dotted name.
        places: The places, in groups.
        flow: One forward of the model.
        is_training: Mode of the new quantizers.

    Returns:
        Name of the quantizer that has the range -> names of those that use it.
    """
    leaders: dict[int | str, list[TensorQuantizer]] = {}
    followers: dict[str, list[str]] = {}
    sites: dict[str, dict[str, dict[int, TensorQuantizer]]] = {}
    for place in places:
        candidates = leaders.setdefault(place.group, [])
        quantizer = _choose_quantizer(place, candidates)
        if isinstance(quantizer, SharedQuantizer):
            followers.setdefault(str(quantizer.leader.name), []).append(place.name)
        elif quantizer not in candidates:
            candidates.append(quantizer)
        quantizer.name = place.name
        quantizer.train(is_training)
        if place.layer is not None:
            place.layer._input_quantizer = quantizer
        else:
            quantizer.to(_find_owner_device(modules, place))
            operands = sites.setdefault(place.owner, {}).setdefault(place.site, {})
            operands[place.operand] = quantizer

    calls: dict[str, list[str]] = {owner: [] for owner in sites}
    for operation in flow.operations:
        if operation.module in calls:
            calls[operation.module].append(operation.site)
    for owner, quantizers in sites.items():
        add_function_quantizers(modules[owner], quantizers, calls[owner])
    return {leader: tuple(names) for leader, names in followers.items()}


def _find_owner_device(modules: dict[str, nn.Module], place: _Place) -> torch.device:
    """The device of the module that calls the function; of the model if that module has no parameters."""
    owner = modules[place.owner]
    has_parameters = next(owner.parameters(), None) is not None
    return find_device(owner if has_parameters else modules[""])


def _choose_quantizer(place: _Place, leaders: list[TensorQuantizer]) -> TensorQuantizer:
    """The quantizer for a place: the layer's, or one that uses the range of a leader of the group.

    Args:
        place: The place. A layer shares only with a leader of its own format; a call takes any format.
        leaders: Quantizers of the group that have a range.
    """
    if place.is_softmax:
        return SoftmaxQuantizer()
    if place.layer is None:
        if place.is_fp8 and (place.axis is not None or not leaders):
            return TensorQuantizer(QuantDescriptor(num_bits=FP8_BITS))
        if place.axis is not None:
            return TensorQuantizer(QuantDescriptor(axis=place.axis))
        return SharedQuantizer(leaders[0]) if leaders else TensorQuantizer()
    quantizer = place.layer.input_quantizer
    if quantizer in leaders:
        return quantizer
    for leader in leaders:
        if leader.format == quantizer.format and leader.axis == quantizer.axis:
            return SharedQuantizer(leader)
    return quantizer
