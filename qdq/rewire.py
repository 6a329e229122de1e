"""Quantizers where no layer has any: on the shortcut of a residual add, and one scale wherever TensorRT wants one.

The rules are those of `tensorrt-qdq-rules.md`, sections 2.5 to 2.9. A forward on one batch shows which function read
which tensor; from that follow the shortcuts (R-ADD-2) and the tensors that must agree in scale: one tensor with several
readers (R-FAN), both sides of a copy or a max pooling (R-COPY, R-MP), all parts of a concat (R-CAT-1).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdq.dataflow import Dataflow
from qdq.defaults import reason_against_convolution, reason_against_linear
from qdq.errors import ArgumentError
from qdq.forward import Operation, require_model, trace_forward
from qdq.functions import (
    ATTENTION,
    AVERAGE_POOLINGS,
    CONCATS,
    CONVOLUTIONS,
    FUNCTIONS,
    MATRIX_PRODUCTS,
    MAX_POOLINGS,
    WEIGHTED,
)
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.functions import QuantFunctionsMixin, add_function_quantizers, name_quantizer
from qdq.nn.registry import find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import QuantDescriptor, SharedQuantizer, TensorQuantizer, disable_quantization
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

SCALES = ("shared", "independent")
_PRODUCTS = MATRIX_PRODUCTS | ATTENTION  # of two activations mostly
_SHOWN = (
    WEIGHTED
    | CONCATS
    | _PRODUCTS
    | AVERAGE_POOLINGS
    | MAX_POOLINGS
    | {"add", "interpolate", "mul", "mean"}
)


@dataclass(frozen=True)
class PlannedOperation:
    """What happens to one function call, and why.

    Args:
        name: Dotted name of the module and the call: "layer1.0.add".
        function: Name of the function.
        action: "quantize" (some of its tensors get a quantizer), "share" (its tensors have one scale) or "float".
        reason: One sentence.
        operands: Positions of the tensors that are quantized.
    """

    name: str
    function: str
    action: str
    reason: str
    operands: tuple[int, ...] = ()


@dataclass(frozen=True)
class RewirePlan:
    """Every function call that a rule says something about, and who shares a range with whom.

    Args:
        operations: In the order in which they ran.
        shared: Quantizer -> the quantizers that have its range.
    """

    operations: tuple[PlannedOperation, ...]
    shared: dict[str, tuple[str, ...]]

    def of(self, action: str) -> list[PlannedOperation]:
        """The operations with one action."""
        return [operation for operation in self.operations if operation.action == action]

    def format_table(self) -> str:
        """The counts, then what was decided and why, alike operations in one line."""
        counts = Counter(operation.action for operation in self.operations)
        followers = sum(map(len, self.shared.values()))
        lines = [
            f"{counts['quantize']} function calls quantized, {counts['float']} left in float; "
            f"{followers} quantizers use the range of {len(self.shared)} others"
        ]
        groups = group_names(
            ((each.action, each.function, each.reason), each.name) for each in self.operations
        )
        lines += [
            f"  {action:8}  {len(names)} {function} ({list_names(names, 2)}): {reason}"
            for (action, function, reason), names in groups.items()
        ]
        return "\n".join(lines)


def rewire_operations(
    model: nn.Module,
    example_inputs: Any,
    *,
    scales: str = "shared",
    include: Iterable[Pattern] = (),
    exclude: Iterable[Pattern] = (),
) -> RewirePlan:
    """Put quantizers in front of function calls, and have quantizers share ranges, as TensorRT wants them; in place.

    Modules keep their names, their parameters and their identity; `restore_modules` undoes it. Quantizers are those of
    an uncalibrated model until `calibrate_model` has run.

    Args:
        model: A swapped model; one whose products are all function calls has nothing to swap.
        example_inputs: One batch (see `trace.call_model`); the model runs on it once.
        scales: "shared": one scale for all readers of a tensor, for both sides of a copy or max pooling and for all
            parts of a concat. "independent": every quantizer its own, which is more accurate and slower.
        include: Patterns (see `qdq.patterns`) of calls ("encoder.*.matmul") that are quantized against a default rule.
        exclude: Patterns of calls that stay in float, or of modules, for all that they call; those that `swap_modules`
            was given may be among them.

    Returns:
        The plan that was carried out. A pattern that matches nothing is logged as a warning.

    Raises:
        ArgumentError: An unknown policy; a model with nothing quantized and no call to quantize, or one that is rewired
            already; a regular expression that cannot be compiled.
        ArgumentTypeError: A pattern of another kind.
    """
    require_model(model)
    if scales not in SCALES:
        raise ArgumentError(
            f"scales is {scales!r}; known are {', '.join(SCALES)}.", "use 'shared'."
        )
    if any(isinstance(module, QuantFunctionsMixin) for module in model.modules()):
        raise ArgumentError(
            "the model is rewired already.", "call restore_modules, then swap and rewire again."
        )
    with disable_quantization(model):
        flow = Dataflow(trace_forward(model, example_inputs))
    modules = dict(model.named_modules())
    planned = _Decisions(
        modules, flow, Patterns(include, "include"), Patterns(exclude, "exclude")
    ).decide()
    if not any(isinstance(module, QuantInputMixin) for module in modules.values()):
        _require_calls(modules, planned)
    places = _list_places(modules, flow, planned)
    _group_places(places, flow, planned, is_shared=scales == "shared")
    shared = _attach(modules, places, flow, model.training)
    return RewirePlan(tuple(planned.values()), shared)


def _require_calls(modules: dict[str, nn.Module], planned: dict[str, PlannedOperation]) -> None:
    """Of a model without quantized layers: some call is quantized; layers that a swap would reach are named."""
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
    counterpart = find_counterpart(type(module))
    if counterpart is None or not issubclass(counterpart, QuantMixin):
        return False
    return all(
        module._parameters.get(name) is not None for name in counterpart.weights_of(module).values()
    )


class _Decisions:
    """What the rules say about every call."""

    def __init__(
        self, modules: dict[str, nn.Module], flow: Dataflow, include: Patterns, exclude: Patterns
    ) -> None:
        self._modules = modules
        self._flow = flow
        self._include = include
        self._exclude = exclude
        self._first = next((op for op in flow.operations if op.function in CONVOLUTIONS), None)
        self._writes_output = {operation.name for operation in flow.output_convolutions()}

    def decide(self) -> dict[str, PlannedOperation]:
        """By the name of the call; the first call of a module that runs several times speaks for all."""
        planned: dict[str, PlannedOperation] = {}
        for operation in self._flow.operations:
            if operation.name in planned or not self._is_shown(operation):
                continue
            action, reason, operands = self._judge(operation)
            planned[operation.name] = PlannedOperation(
                operation.name, operation.function, action, reason, operands
            )
        for (
            name,
            module,
        ) in self._modules.items():  # a pattern may mean a layer, which the swap has left alone
            self._exclude.match([name], module)
        self._include.warn_unused("function call")
        self._exclude.warn_unused("function call and no module")
        return planned

    def _is_shown(self, operation: Operation) -> bool:
        """Whether a rule has something to say: a sum or product of two computed tensors, a concat, attention ..."""
        if operation.function not in _SHOWN or isinstance(
            self._modules[operation.module], QuantInputMixin
        ):
            return False
        computed = [value for value in operation.inputs if self._flow.is_computed(value)]
        if (
            operation.function in WEIGHTED
        ):  # with a layer around it the plan of the swap has said what happens
            is_layer = find_counterpart(type(self._modules[operation.module])) is not None
            return len(computed) == 1 and not (
                is_layer and self._flow.is_stored(operation.inputs[1])
            )
        return len(computed) >= (2 if operation.function in ("add", "mul") else 1)

    def _judge(self, operation: Operation) -> tuple[str, str, tuple[int, ...]]:
        owner = self._modules[operation.module]
        if pattern := self._exclude.match([operation.name], owner):
            return "float", f"excluded by {pattern}", ()
        if pattern := self._include.match([operation.name], owner):
            return self._attachable(
                operation, f"included by {pattern}", self._operands_of(operation)
            )
        if operation.function == "add":
            return self._judge_add(operation)
        if operation.function in WEIGHTED:
            return self._judge_weighted(operation)
        if operation.function == "interpolate":
            return self._judge_resize(operation)
        if operation.function in AVERAGE_POOLINGS:
            return self._judge_pooling(operation)
        if operation.function in MATRIX_PRODUCTS:
            factors = [operation.inputs[position] for position in self._operands_of(operation)]
            if not all(map(self._flow.is_computed, factors)):
                return (
                    "float",
                    f"product with a weight by {operation.function}: call F.linear, or include it",
                    (),
                )
        return _judge_by_kind(operation)

    def _operands_of(self, operation: Operation) -> tuple[int, ...]:
        """Positions of what an included call quantizes: of a product all factors, or none (R-CONV-2)."""
        if factors := FUNCTIONS[operation.function].factors:
            return factors
        if operation.function in MATRIX_PRODUCTS:
            return tuple(range(len(operation.inputs)))
        return tuple(
            place for place, value in enumerate(operation.inputs) if self._flow.is_computed(value)
        )

    def _attachable(
        self, operation: Operation, reason: str, operands: tuple[int, ...]
    ) -> tuple[str, str, tuple[int, ...]]:
        """Quantize, unless the module's forward is out of reach."""
        if isinstance(self._modules[operation.module], torch.jit.ScriptModule):
            return "float", "out of reach: its module is scripted", ()
        return "quantize", reason, operands

    def _judge_add(self, operation: Operation) -> tuple[str, str, tuple[int, ...]]:
        """R-ADD-1, 2, 4 and 5."""
        first, second = operation.inputs[:2]
        if self._flow.shapes[first] != self._flow.shapes[second]:
            return "float", "its operands differ in shape: no residual add (R-ADD-2)", ()
        if first in self._flow.inputs or second in self._flow.inputs:
            return "float", "an operand is the input of the network (R-ADD-2)", ()
        convolutions = [self._flow.backbone_of(value) for value in (first, second)]
        backbones = [main if main and self._is_quantized(main) else None for main in convolutions]
        if any(convolutions) and not any(backbones):
            names = " and ".join(sorted({main.module for main in convolutions if main}))
            return "float", f"its convolution {names} is in float", ()
        fork = self._flow.find_fork(first, second)
        branches_off = fork and self._flow.backbone_of(fork[0]) in [
            main for main in convolutions if main
        ]
        shortcut = None if branches_off else _find_shortcut(backbones, fork)
        if shortcut is not None:
            return self._attachable(
                operation, "shortcut of a residual add, on that side only (R-ADD-1)", (shortcut,)
            )
        if any(backbones):
            return (
                "float",
                "it branches off right behind a convolution: no residual add (R-ADD-2)",
                (),
            )
        behind = [
            self._flow.backbone_of(value, through_activations=True) for value in (first, second)
        ]
        if not any(main and self._is_quantized(main) for main in behind):
            return "float", "no operand comes from an int8 convolution (R-ADD-4)", ()
        if not self._feeds_quantized(operation):
            return "float", "nothing quantized reads the sum (R-ADD-4)", ()
        reason = (
            "an activation stands before the add: both operands, with one scale (R-ADD-4, R-ADD-5)"
        )
        return self._attachable(operation, reason, (0, 1))

    def _judge_weighted(self, operation: Operation) -> tuple[str, str, tuple[int, ...]]:
        """`F.linear` or `F.conv2d` on weights, as stored or computed: both operands, or none (R-CONV-2)."""
        weight = self._flow.shapes[operation.inputs[1]]
        if operation.function == "linear":
            reason = reason_against_linear(weight)
        else:
            groups = self._flow.shapes[operation.inputs[0]][1] // weight[1]
            reason = reason_against_convolution(weight, groups, is_first=operation is self._first)
            if operation.name in self._writes_output:
                reason = "last convolution: it writes an output of the network (R-OUT)"
        if reason:
            return "float", reason, ()
        how = (
            "called as a function"
            if self._flow.is_stored(operation.inputs[1])
            else "which the forward computes"
        )
        return self._attachable(operation, f"a product with a weight, {how}", (0, 1))

    def _judge_resize(self, operation: Operation) -> tuple[str, str, tuple[int, ...]]:
        if not self._flow.is_copy(operation):
            return "float", "interpolates: its output is no copy of its input", ()
        if not self._feeds_quantized(operation):
            return "float", "nothing quantized reads it", ()
        return self._attachable(
            operation, "copies values between int8 layers: its input (R-RSZ)", (0,)
        )

    def _judge_pooling(self, operation: Operation) -> tuple[str, str, tuple[int, ...]]:
        if not self._feeds_quantized(operation):
            return "float", "nothing quantized reads it (R-AP)", ()
        return self._attachable(
            operation, "average pooling before an int8 layer: its input (R-AP)", (0,)
        )

    def _is_quantized(self, operation: Operation) -> bool:
        """Whether a product runs in int8, as a layer or as a call."""
        if isinstance(self._modules[operation.module], QuantMixin):
            return True
        is_call = operation.function in WEIGHTED and self._is_shown(operation)
        return is_call and self._judge(operation)[0] == "quantize"

    def _feeds_quantized(self, operation: Operation) -> bool:
        """Whether something quantized reads the result, as it is or through activations and copies."""
        return any(
            isinstance(self._modules[reader.module], QuantInputMixin) or self._is_quantized(reader)
            for value in operation.outputs
            for reader in self._flow.readers_behind(value)
        )


def _find_shortcut(
    backbones: list[Operation | None], fork: tuple[int, int, int] | None
) -> int | None:
    """Position of the shortcut: the operand without convolution, else the one nearer to where both part (R-ADD-2)."""
    first, second = backbones
    if first is second:
        return None
    if first is None or second is None or fork is None:
        return 0 if first is None else 1
    return 0 if fork[1] < fork[2] else 1


def _judge_by_kind(operation: Operation) -> tuple[str, str, tuple[int, ...]]:
    """Calls that get no quantizer of their own, whatever is around them."""
    if operation.function in _PRODUCTS:
        return (
            "float",
            "product of two activations: int8 Q/DQ would break the fused attention kernel (R-MHA-2)",
            (),
        )
    if operation.function in CONCATS:
        return "share", "copies: quantizers before and behind it have one scale (R-CAT-1)", ()
    if operation.function in MAX_POOLINGS:
        return "share", "commutes with Q: quantizers before and behind it have one scale (R-MP)", ()
    if operation.function == "mean":
        return "float", "global average: a tiny tensor that stays float (R-GAP)", ()
    return (
        "float",
        "a product of activations gets no Q/DQ, so that SiLU and gates stay fused (R-SILU, R-MUL)",
        (),
    )


class _ScaleGroups:
    """Union-find over values that must agree in scale."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def find(self, value: int) -> int:
        """The value that stands for the group of another."""
        while (parent := self._parents.get(value, value)) != value:
            value = parent
        return value

    def unite(self, *values: int) -> None:
        """Make one group of the groups of some values."""
        root = min(map(self.find, values))
        for value in values:
            self._parents[self.find(value)] = root


def _group_places(
    places: list[_Place], flow: Dataflow, planned: dict[str, PlannedOperation], is_shared: bool
) -> None:
    """Say which places shall have one range; both operands of a quantized add always do (R-ADD-4)."""
    if not is_shared:
        for place in places:
            place.group = (
                _join(place.owner, place.site) if place.site.startswith("add") else place.name
            )
        return
    groups = _group_values(flow, planned)
    for place in places:
        groups.unite(*place.values)
    for place in places:
        place.group = groups.find(place.values[0])


def _group_values(flow: Dataflow, planned: dict[str, PlannedOperation]) -> _ScaleGroups:
    """Tensors that must agree: copies, max poolings and concats, and both operands of a quantized add."""
    groups = _ScaleGroups()
    for operation in flow.operations:
        plan = planned.get(operation.name)
        if operation.function in MAX_POOLINGS or flow.is_copy(operation):
            groups.unite(operation.inputs[0], *operation.outputs)
        elif operation.function in CONCATS and not (plan and plan.action == "float"):
            groups.unite(*operation.inputs, *operation.outputs)
        elif operation.function == "add" and plan and len(plan.operands) > 1:
            groups.unite(*operation.inputs[:2])
    return groups


@dataclass
class _Place:
    """Where a quantizer stands: at the input of a layer, or at an operand of a call.

    Args:
        name: Dotted name of the quantizer.
        values: The tensors that it quantizes, several if its module runs several times.
        layer: The layer, None for a call.
        owner: Dotted name of the module that makes the call.
        site: The call in that module.
        operand: Position among its tensors.
        is_weight: Whether that one is a weight, with a range for each output.
        group: The same for all places that shall have one range.
    """

    name: str
    values: list[int]
    layer: QuantInputMixin | None = None
    owner: str = ""
    site: str = ""
    operand: int = 0
    is_weight: bool = False
    group: int | str = 0


def _list_places(
    modules: dict[str, nn.Module], flow: Dataflow, planned: dict[str, PlannedOperation]
) -> list[_Place]:
    """Layers first, so that the range of a group is saved with a layer."""
    places: dict[str, _Place] = {}
    for run in flow.runs:
        layer = modules[run.module]
        if isinstance(layer, QuantInputMixin) and run.inputs:
            name = _join(run.module, "_input_quantizer")
            places.setdefault(name, _Place(name, [], layer)).values.append(run.inputs[0])
    for operation in flow.operations:
        operands = planned[operation.name].operands if operation.name in planned else ()
        for operand in operands:
            attribute = name_quantizer(operation.site, operand, len(operands))
            name = _join(operation.module, attribute)
            is_weight = operation.function in WEIGHTED and operand == 1
            place = _Place(name, [], None, operation.module, operation.site, operand, is_weight)
            places.setdefault(name, place).values.append(operation.inputs[operand])
    return list(places.values())


def _attach(
    modules: dict[str, nn.Module], places: list[_Place], flow: Dataflow, is_training: bool
) -> dict[str, tuple[str, ...]]:
    """Give every place its quantizer, and all places of a group one range.

    Returns:
        Name of the quantizer that has the range -> names of those that use it.
    """
    leaders: dict[int | str, list[TensorQuantizer]] = {}
    shared: dict[str, list[str]] = {}
    sites: dict[str, dict[str, dict[int, TensorQuantizer]]] = {}
    for place in places:
        candidates = leaders.setdefault(place.group, [])
        quantizer = _choose_quantizer(place, candidates)
        if isinstance(quantizer, SharedQuantizer):
            shared.setdefault(str(quantizer.leader.name), []).append(place.name)
        elif quantizer not in candidates:
            candidates.append(quantizer)
        quantizer.name = place.name
        quantizer.train(is_training)
        if place.layer is not None:
            place.layer._input_quantizer = quantizer
        else:
            sites.setdefault(place.owner, {}).setdefault(place.site, {})[place.operand] = quantizer
    for owner, quantizers in sites.items():
        calls = [operation.site for operation in flow.operations if operation.module == owner]
        add_function_quantizers(modules[owner], quantizers, calls)
    return {leader: tuple(names) for leader, names in shared.items()}


def _choose_quantizer(place: _Place, leaders: list[TensorQuantizer]) -> TensorQuantizer:
    """One with the range of a leader of the same format; a call takes whatever format the layers around it have."""
    if place.layer is None:
        if place.is_weight:
            return TensorQuantizer(QuantDescriptor(axis=0))
        return SharedQuantizer(leaders[0]) if leaders else TensorQuantizer()
    own = place.layer.input_quantizer
    if own in leaders:
        return own
    alike = [leader for leader in leaders if (leader.format, leader.axis) == (own.format, own.axis)]
    return SharedQuantizer(alike[0]) if alike else own


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute
