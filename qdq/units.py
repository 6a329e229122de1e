"""What can be left in float by itself: a layer with what exists only for it, a call, or a group of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, StateError
from qdq.forward import trace_forward
from qdq.nn import QuantInputMixin
from qdq.nn.functions import QuantFunctionsMixin
from qdq.nn.registry import find_counterpart
from qdq.patterns import Pattern, Patterns
from qdq.quantizer import TensorQuantizer, disable_quantization
from qdq.swap import quantized_layers

GROUPS = ("block", "shared")
_NUMBERED = re.compile(r"(?:.*_)?\d+")


@dataclass(frozen=True)
class Unit:
    """Quantizers that are switched together.

    Args:
        name: Of the layer, call or group.
        layers: The layers in it, and calls that stand for themselves, by dotted name.
        calls: Calls whose quantizers are there only for these layers, by dotted name.
        quantizers: The quantizers that are on.
    """

    name: str
    layers: tuple[str, ...]
    calls: tuple[str, ...]
    quantizers: tuple[TensorQuantizer, ...]


def find_units(model: nn.Module, batch: Any) -> list[Unit]:
    """Everything in a model that is quantized, each layer by itself.

    The quantizer on the shortcut of a residual add is there so that the convolution before the add can run in int8
    with it (R-ADD-1); it belongs to that convolution. Other calls with quantizers are units of their own.

    Args:
        model: A calibrated model; quantizers that are off are left out.
        batch: One batch; the model runs on it once if it was rewired.

    Raises:
        StateError: No layer is quantized, or one has no amax.
    """
    active: dict[str, list[TensorQuantizer]] = {}
    for name, own in _list_quantizers(model).items():
        quantizers = [quantizer for quantizer in own if quantizer.is_enabled]
        for quantizer in quantizers:
            if quantizer.amax is None:
                raise StateError(
                    f"{quantizer.name or name} has no amax.", "call calibrate_model first."
                )
        if quantizers:
            active[name] = quantizers
    if not active:
        raise StateError(
            "no layer of the model is quantized.", "call swap_modules and calibrate_model first."
        )
    owners = _find_owners(model, batch, active)
    calls: dict[str, list[str]] = {}
    for call, layer in owners.items():
        calls.setdefault(layer, []).append(call)
    return [
        Unit(
            name,
            (name,),
            tuple(calls.get(name, ())),
            tuple(quantizer for each in (name, *calls.get(name, ())) for quantizer in active[each]),
        )
        for name in active
        if name not in owners
    ]


def group_units(
    model: nn.Module, units: list[Unit], groups: str | Sequence[Pattern] | None
) -> list[Unit]:
    """Units joined to larger ones.

    Args:
        model: The model.
        units: What is joined.
        groups: None: nothing. "block": layers of one block, the part of their names up to the first number. "shared":
            layers whose inputs have one range. Patterns (see `qdq.patterns`): each makes a group of what it matches,
            the rest stays by itself.

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


def find_all_quantizers(model: nn.Module, batch: Any) -> dict[str, list[TensorQuantizer]]:
    """Layer or call -> the quantizers that go with it, on or off.

    Args:
        model: A swapped model.
        batch: As for `find_units`.
    """
    own = _list_quantizers(model)
    result = {name: list(quantizers) for name, quantizers in own.items()}
    for call, layer in _find_owners(model, batch, own).items():
        result[layer] += own[call]
    return result


def match_precisions(
    model: nn.Module, names: Sequence[str], precisions: Mapping[str, str]
) -> dict[str, str]:
    """What a plan says of each layer that it means; a name goes before patterns.

    Args:
        model: A swapped model.
        names: Its layers and calls that a plan may name.
        precisions: Name or pattern (see `qdq.patterns`) -> "int8" or "float".

    Returns:
        Layer -> "int8" or "float". A layer that was never swapped is in float already: a plan may say so.

    Raises:
        ArgumentError: A name that matches nothing, or patterns that contradict each other.
    """
    modules = dict(model.named_modules())
    layers = frozenset(names)
    result: dict[str, str] = {}
    meant_by: dict[str, str] = {}
    for pattern in sorted(
        precisions, key=lambda pattern: pattern not in layers
    ):  # stable: names, then patterns
        test, precision = Patterns([pattern], "plan"), precisions[pattern]
        hits = (
            [pattern]
            if pattern in layers
            else [n for n in names if test.match([n], modules.get(n, model))]
        )
        if not hits and not (precision == "float" and _is_float_layer(modules.get(pattern))):
            raise ArgumentError(
                f"the plan says {precision} for {pattern!r}, which is nothing that is quantized here.",
                "correct or remove the name: it is misspelt, of another model, excluded, or switched off.",
            )
        for name in hits:
            before = meant_by.setdefault(name, pattern)
            if result.setdefault(name, precision) != precision and before != name:
                raise ArgumentError(
                    f"the patterns {before!r} and {pattern!r} say float and int8 for {name}.",
                    "have only one of them match it, or name it by itself.",
                )
    return result


def _is_float_layer(module: nn.Module | None) -> bool:
    """Whether a module could be quantized, and is not or no longer."""
    return module is not None and (
        isinstance(module, QuantInputMixin) or find_counterpart(type(module)) is not None
    )


def _list_quantizers(model: nn.Module) -> dict[str, list[TensorQuantizer]]:
    """Layers, then calls, by their dotted names -> their quantizers, on or off."""
    layers = {
        name: list(layer.quantizers().values()) for name, layer in quantized_layers(model).items()
    }
    calls = {name: list(operands.values()) for name, operands in _quantized_calls(model)}
    return {
        **layers,
        **{name: quantizers for name, quantizers in calls.items() if name not in layers},
    }


def _quantized_calls(model: nn.Module) -> Iterator[tuple[str, dict[int, TensorQuantizer]]]:
    """Dotted names of calls, and the quantizers by the position of the operand."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantFunctionsMixin):
            for site, operands in module._function_quantizers.items():
                quantizers = {
                    position: getattr(module, attribute) for position, attribute in operands.items()
                }
                yield f"{owner}.{site}".lstrip("."), quantizers


def _find_owners(
    model: nn.Module, batch: Any, active: dict[str, list[TensorQuantizer]]
) -> dict[str, str]:
    """Residual add -> the convolution that its quantizer is there for."""
    shortcuts = {
        name: next(iter(operands))
        for name, operands in _quantized_calls(model)
        if len(operands) == 1
    }
    if not any(name in active for name in shortcuts):
        return {}
    with disable_quantization(model):
        flow = Dataflow(trace_forward(model, batch))
    owners = {}
    for operation in flow.operations:
        if operation.function == "add" and operation.name in active and operation.name in shortcuts:
            convolution = flow.backbone_of(operation.inputs[1 - shortcuts[operation.name]])
            if convolution is not None and convolution.module in active:
                owners[operation.name] = convolution.module
    return owners


def name_block(name: str) -> str:
    """The block of a layer: the part of its name up to the first number, all of it where there is none."""
    parts = name.split(".")
    numbered = next(
        (end for end, part in enumerate(parts) if _NUMBERED.fullmatch(part)), len(parts)
    )
    return ".".join(parts[: numbered + 1])


def _shared_keys(units: list[Unit]) -> list[str]:
    """The name of the first unit with the same range at its input."""
    first: dict[int, str] = {}
    keys = []
    for unit in units:
        quantizer = unit.quantizers[0]
        leader = quantizer.leader
        keys.append(first.setdefault(id(leader), unit.name))
    return keys


def _pattern_keys(model: nn.Module, units: list[Unit], patterns: Sequence[Pattern]) -> list[str]:
    modules = dict(model.named_modules())
    keys = [unit.name for unit in units]
    for pattern in patterns:
        test = Patterns([pattern], "groups")
        hits = [
            place
            for place, unit in enumerate(units)
            if test.match([unit.name], modules.get(unit.name, model))
        ]
        left = [place for place in hits if keys[place] == units[place].name]
        if not left:
            raise ArgumentError(
                f"the pattern {pattern!r} of groups matches "
                + ("only layers of the groups before it." if hits else "no quantized layer."),
                "remove it, or put it before them." if hits else "correct it.",
            )
        for place in left:
            keys[place] = f"group {pattern}"
    return keys


def _merge(units: list[Unit], keys: list[str]) -> list[Unit]:
    members: dict[str, list[Unit]] = {}
    for unit, key in zip(units, keys, strict=True):
        members.setdefault(key, []).append(unit)
    return [
        Unit(
            key,
            tuple(name for unit in group for name in unit.layers),
            tuple(name for unit in group for name in unit.calls),
            tuple(quantizer for unit in group for quantizer in unit.quantizers),
        )
        for key, group in members.items()
    ]
