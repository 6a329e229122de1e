"""Units: the parts of a model that can be left in float individually.

A unit is a layer with the calls whose quantizers exist only for it, a call, or a group of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, StateError
from qdq.formats import FLOAT, FP8, INT8
from qdq.forward import ForwardTrace, Operation, join_name, trace_forward
from qdq.functions import ADDITIONS, AVERAGE_POOLINGS, RESIZES
from qdq.nn import QuantInputMixin
from qdq.nn.functions import QuantFunctionsMixin
from qdq.nn.registry import find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import TensorQuantizer, disable_quantization, disable_until_exit

GROUPS = ("block", "shared")
_SERVING = ADDITIONS | RESIZES | AVERAGE_POOLINGS
_NUMBERED = re.compile(r"(?:.*_)?\d+")


@dataclass(frozen=True)
class Unit:
    """Quantizers that are switched together.

    Args:
        name: Of the layer, call or group.
        layers: The layers in it, and calls that are not there for a layer, by dotted name.
        calls: Calls whose quantizers exist only for these layers, by dotted name.
        quantizers: The quantizers that are on.
    """

    name: str
    layers: tuple[str, ...]
    calls: tuple[str, ...]
    quantizers: tuple[TensorQuantizer, ...]


def find_units(model: nn.Module, batch: Any, trace: ForwardTrace | None = None) -> list[Unit]:
    """The units of everything that is quantized in a model, one for each layer.

    The quantizer on the shortcut of a residual add lets the convolution before the add run in int8 with it (R-ADD-1),
    so it belongs to that convolution. Other calls with quantizers are units of their own.

    Args:
        model: A calibrated model; quantizers that are off are left out.
        batch: One batch; the model runs on it once if it was rewired.
        trace: The record of a float forward on this batch, if there is one: then the model does not run again.

    Raises:
        StateError: No layer is quantized, or one has no amax.
    """
    listing = _Quantizers(model)
    active = _list_active(listing)
    if not active:
        raise StateError(
            "no layer of the model is quantized.", "call swap_modules and calibrate_model first."
        )
    owners = _find_owners(model, batch, listing, active, trace)
    calls_of: dict[str, list[str]] = {}
    for call, layer in owners.items():
        calls_of.setdefault(layer, []).append(call)
    units = []
    for name, quantizers in active.items():
        if name in owners:
            continue
        calls = calls_of.get(name, [])
        unit_quantizers = list(quantizers)
        for call in calls:
            unit_quantizers += active[call]
        units.append(Unit(name, (name,), tuple(calls), tuple(unit_quantizers)))
    return units


def find_all_quantizers(model: nn.Module, batch: Any) -> dict[str, list[TensorQuantizer]]:
    """Layer or call -> the quantizers that go with it, on or off; not those that FP8 has switched off for good.

    Args:
        model: A swapped model.
        batch: As for `find_units`.
    """
    listing = _Quantizers(model)
    quantizers_of = {name: list(quantizers) for name, quantizers in listing.by_name.items()}
    owners = _find_owners(model, batch, listing, listing.by_name)
    for call, layer in owners.items():
        shortcut = listing.by_name[call]
        has_fp8 = any(
            quantizer.format.is_float for quantizer in [*listing.by_name[layer], *shortcut]
        )
        if not has_fp8:  # sums are never FP8, and serve layers in int8 only
            quantizers_of[layer] += shortcut
    return quantizers_of


def require_formats_of(
    decided: Mapping[str, str], quantizers: Mapping[str, Sequence[TensorQuantizer]]
) -> None:
    """Refuse a plan that sets a layer to another format than it has.

    Args:
        decided: Layer -> its precision in the plan.
        quantizers: Layer -> its quantizers.

    Raises:
        ArgumentError: With the first such layer.
    """
    for name, precision in decided.items():
        present = FP8.name if quantizers[name][0].format.is_float else INT8
        if precision not in (present, FLOAT):
            raise ArgumentError(
                f"{name} is pinned to {precision}, but it is quantized to {present}.",
                f"pin it to {present} or float, or let choose_formats(pinned=...) change its format first.",
            )


def disable_idle(model: nn.Module, trace: ForwardTrace, undo: ExitStack) -> list[str]:
    """Switch off the quantizers of adds, resizes and average poolings whose readers have all been switched to float.

    They were there for these readers (R-ADD-4, R-RSZ, R-AP), and would only round.

    Args:
        model: A model in which some layers were switched to float.
        trace: The record of a float forward.
        undo: Switches the quantizers on again when it is closed.

    Returns:
        The calls and layers that were switched off, by dotted name.
    """
    listing = _Quantizers(model)
    flow = Dataflow(trace)
    disabled: list[str] = []
    for operation in reversed(flow.operations):  # a reader is decided before what it reads
        name = operation.name if operation.name in listing.by_name else operation.module
        quantizers = listing.by_name.get(name, [])
        is_shortcut = operation.function in ADDITIONS and name in listing.shortcuts
        if operation.function not in _SERVING or is_shortcut or not _is_on(quantizers):
            continue
        readers = _list_readers(flow, operation, listing)
        if readers and not any(map(_is_on, readers)):
            disable_until_exit(quantizers, undo)
            disabled.append(name)
    return disabled


def _is_on(quantizers: Sequence[TensorQuantizer]) -> bool:
    return any(quantizer.is_enabled for quantizer in quantizers)


def _list_readers(
    flow: Dataflow, operation: Operation, listing: _Quantizers
) -> list[list[TensorQuantizer]]:
    """The quantizers, on or off, of each layer and call that reads the result of a call."""
    readers = []
    for reader in flow.readers_behind(operation.outputs):
        for name in (reader.name, reader.module):
            if name in listing.by_name:
                readers.append(listing.by_name[name])
    return readers


class _Quantizers:
    """The quantizers of a model, on or off.

    Args:
        model: The model.

    Attributes:
        by_name: Dotted name of a layer or call -> its quantizers; layers first.
        shortcuts: Call with a quantizer on one operand only -> position of that operand.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, list[TensorQuantizer]] = {}
        self.shortcuts: dict[str, int] = {}
        calls: dict[str, list[TensorQuantizer]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantInputMixin):
                self.by_name[name] = list(module.quantizers().values())
            if isinstance(module, QuantFunctionsMixin):
                for site, operands in module.function_quantizers.items():
                    call = join_name(name, site)
                    calls[call] = [getattr(module, attribute) for attribute in operands.values()]
                    if len(operands) == 1:
                        self.shortcuts[call] = next(iter(operands))
        for call, quantizers in calls.items():
            self.by_name.setdefault(call, quantizers)


def _list_active(listing: _Quantizers) -> dict[str, list[TensorQuantizer]]:
    """The quantizers that are on, as in `_Quantizers.by_name`.

    Raises:
        StateError: One has no amax.
    """
    active: dict[str, list[TensorQuantizer]] = {}
    for name, quantizers in listing.by_name.items():
        enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
        for quantizer in enabled:
            if quantizer.amax is None:
                raise StateError(
                    f"{quantizer.name or name} has no amax.", "call calibrate_model first."
                )
        if enabled:
            active[name] = enabled
    return active


def _find_owners(
    model: nn.Module,
    batch: Any,
    listing: _Quantizers,
    active: Mapping[str, list[TensorQuantizer]],
    trace: ForwardTrace | None = None,
) -> dict[str, str]:
    """The convolution that each quantizer on the shortcut of a residual add belongs to.

    Args:
        model: The model, which runs once if it has such adds.
        batch: One batch.
        listing: Its quantizers.
        active: The quantizers that are on, by name of the layer or call.
        trace: The record of a float forward on this batch, if there is one: then the model does not run again.

    Returns:
        Call of the add -> layer of the convolution, by dotted names.
    """
    shortcuts = {name: operand for name, operand in listing.shortcuts.items() if name in active}
    if not shortcuts:
        return {}
    if trace is None:
        with disable_quantization(model):
            trace = trace_forward(model, batch)
    flow = Dataflow(trace)
    owners: dict[str, str] = {}
    for operation in flow.operations:
        if operation.function not in ADDITIONS or operation.name not in shortcuts:
            continue
        main_branch = operation.inputs[1 - shortcuts[operation.name]]
        convolution = flow.backbone_of(main_branch)
        if convolution is not None and convolution.module in active:
            owners[operation.name] = convolution.module
    return owners


def group_units(
    model: nn.Module, units: list[Unit], groups: str | Sequence[Pattern] | None
) -> list[Unit]:
    """Join units into larger ones.

    Args:
        model: The model.
        units: The units that are joined.
        groups: None: no groups. "block": layers of one block, which is the part of their names up to the first number.
            "shared": layers whose inputs have one range. Patterns (see `qdq.patterns`): each makes a group of the
            units that it matches; all others stay by themselves.

    Raises:
        ArgumentError: Unknown groups, or a pattern that matches nothing.
    """
    if groups is None:
        return units
    if groups == "block":
        return _merge(units, [name_block(unit.name) for unit in units])
    if groups == "shared":
        return _merge(units, _shared_keys(units))
    if isinstance(groups, str):
        raise ArgumentError(
            f"groups is {groups!r}; known are {', '.join(GROUPS)}.", "or give patterns, in a list."
        )
    return _merge(units, _pattern_keys(model, units, groups))


def name_block(name: str) -> str:
    """The block of a layer: the part of its name up to the first number, or the full name if it has no number.

    Args:
        name: Dotted name of the layer.
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if _NUMBERED.fullmatch(part):
            return ".".join(parts[: position + 1])
    return name


def _shared_keys(units: list[Unit]) -> list[str]:
    """For each unit, the name of the first unit with the same range at its input."""
    first_names: dict[int, str] = {}
    keys = []
    for unit in units:
        leader = unit.quantizers[0].leader
        keys.append(first_names.setdefault(id(leader), unit.name))
    return keys


def _pattern_keys(model: nn.Module, units: list[Unit], patterns: Sequence[Pattern]) -> list[str]:
    """For each unit, the name of its group: the first pattern that matches it, or its own name.

    Args:
        model: The model.
        units: The units.
        patterns: One for each group.

    Raises:
        ArgumentError: A pattern that makes no group.
    """
    modules = dict(model.named_modules())
    keys: dict[str, str] = {}
    for pattern in patterns:
        compiled = Patterns([pattern], "groups")
        num_matches = 0
        members = []
        for unit in units:
            if compiled.match([unit.name], modules.get(unit.name, model)):
                num_matches += 1
                if unit.name not in keys:
                    members.append(unit.name)
        if not members:
            _refuse_group(pattern, num_matches)
        for name in members:
            keys[name] = f"group {pattern}"
    return [keys.get(unit.name, unit.name) for unit in units]


def _refuse_group(pattern: Pattern, num_matches: int) -> None:
    """Refuse a pattern that makes no group.

    Args:
        pattern: The pattern.
        num_matches: How many units it matches, all of which are in a group already.

    Raises:
        ArgumentError: Always.
    """
    if num_matches:
        raise ArgumentError(
            f"the pattern {pattern!r} of groups matches only layers of the groups before it.",
            "remove it, or put it before them.",
        )
    raise ArgumentError(
        f"the pattern {pattern!r} of groups matches no quantized layer.", "correct it."
    )


def _merge(units: list[Unit], keys: list[str]) -> list[Unit]:
    """One unit for each key, of all units with that key.

    Args:
        units: The units.
        keys: For each unit the name of the unit that it becomes part of.
    """
    members: dict[str, list[Unit]] = {}
    for unit, key in zip(units, keys, strict=True):
        members.setdefault(key, []).append(unit)
    return [join_units(key, group) for key, group in members.items()]


def join_units(name: str, units: list[Unit]) -> Unit:
    """Join units into one, which is empty without any."""
    layers: list[str] = []
    calls: list[str] = []
    quantizers: list[TensorQuantizer] = []
    for unit in units:
        layers += unit.layers
        calls += unit.calls
        quantizers += unit.quantizers
    return Unit(name, tuple(layers), tuple(calls), tuple(quantizers))


def match_precisions(
    model: nn.Module, names: Sequence[str], precisions: Mapping[str, str]
) -> dict[str, str]:
    """The precision that a plan sets for each layer that it names; a name takes precedence over patterns.

    Args:
        model: A swapped model.
        names: Its layers and calls that a plan may name.
        precisions: Name or pattern (see `qdq.patterns`) -> "int8", "fp8" or "float".

    Returns:
        Layer -> "int8", "fp8" or "float". A layer that was never swapped, or whose quantizers are off, is in
        float already: a plan may say so.

    Raises:
        ArgumentError: A name that matches nothing, or patterns that contradict each other.
    """
    modules = dict(model.named_modules())
    switched = _Quantizers(model).by_name  # on or off
    layers = frozenset(names)
    precision_of: dict[str, str] = {}
    source_of: dict[str, str] = {}  # layer -> the name or pattern that set its precision
    patterns: dict[str, str] = {}
    for pattern, precision in precisions.items():
        if pattern in layers:
            precision_of[pattern] = precision
            source_of[pattern] = pattern
        else:
            patterns[pattern] = precision

    for pattern, precision in patterns.items():
        matches = _match_layers(model, modules, names, pattern)
        is_in_float = precision == "float" and (
            pattern in switched or _is_float_layer(modules.get(pattern))
        )
        if not matches and not is_in_float:
            raise ArgumentError(
                f"the plan sets {pattern!r} to {precision}, but nothing quantized here has this name.",
                "correct or remove the name: it is misspelt, of another model, excluded, or switched off.",
            )
        for name in matches:
            source = source_of.setdefault(name, pattern)
            if precision_of.setdefault(name, precision) != precision and source != name:
                both = " and ".join(sorted({precision_of[name], precision}))
                raise ArgumentError(
                    f"the patterns {source!r} and {pattern!r} say {both} for {name}.",
                    "make only one of them match, or use its exact name.",
                )
    return precision_of


def _match_layers(
    model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str], pattern: str
) -> list[str]:
    """The names that a pattern matches."""
    compiled = Patterns([pattern], "plan")
    return [name for name in names if compiled.match([name], modules.get(name, model))]


def _is_float_layer(module: nn.Module | None) -> bool:
    """Whether a module could be quantized but is not."""
    if module is None:
        return False
    return isinstance(module, QuantInputMixin) or find_counterpart(type(module)) is not None
