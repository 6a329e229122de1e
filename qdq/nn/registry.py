"""The table of quantized layers by float layer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from qdq.errors import ArgumentTypeError
from qdq.nn.mixin import QuantInputMixin

QuantClass = TypeVar("QuantClass", bound=type[QuantInputMixin])
Derived = TypeVar("Derived", bound=nn.Module)


class _quant_entry(NamedTuple):  # noqa: N801  # the name that scripts know
    orig_mod: ModuleType
    mod_name: str
    replace_mod: type[QuantInputMixin]


_DEFAULT_QUANT_MAP: list[_quant_entry] = []


def register_module(float_class: type[nn.Module]) -> Callable[[QuantClass], QuantClass]:
    """Class decorator: the decorated layer replaces `float_class` from now on.

    The layer must be built as `class QuantThing(QuantMixin, Thing)` (or `QuantInputMixin` without a weight). A later
    registration takes precedence over an earlier one.

    Raises:
        ArgumentTypeError: The decorated class is not built that way.
    """

    def register(quant_class: QuantClass) -> QuantClass:
        if not (issubclass(quant_class, QuantInputMixin) and issubclass(quant_class, float_class)):
            raise ArgumentTypeError(
                f"{quant_class.__name__} cannot replace {float_class.__name__}: a swapped module keeps its "
                "attributes and its own forward.",
                f"write `class {quant_class.__name__}(QuantMixin, {float_class.__name__})`.",
            )
        quant_class.float_class = float_class
        name = float_class.__name__
        home: ModuleType = torch.nn
        if getattr(home, name, None) is not float_class:
            home = sys.modules[float_class.__module__]
        if getattr(home, name, None) is not float_class:
            raise ArgumentTypeError(
                f"{name} is not found in its module {home.__name__}: the map looks classes up by name.",
                "define the class at the top of a module.",
            )
        _DEFAULT_QUANT_MAP.append(_quant_entry(home, name, quant_class))
        return quant_class

    return register


def find_counterpart(float_class: type[nn.Module]) -> type[QuantInputMixin] | None:
    """The quantized class for a float class or for the nearest of its base classes; None if there is none.

    For a subclass it is a derived class that quantizes and has the forward of the subclass.
    """
    # By class, not by name: its name in `torch.nn` may be bound to another class at the moment (compat.initialize).
    table: dict[type, type[QuantInputMixin]] = {}
    for entry in _DEFAULT_QUANT_MAP:
        table[entry.replace_mod.float_class] = entry.replace_mod
    for base in float_class.__mro__:
        if base is float_class and base in table:
            return table[base]
        if base in table:
            return derive_class(table[base], float_class)
    return None


_derived: dict[tuple[type, type], Any] = {}


def derive_class(quant_class: type[Derived], float_class: type[nn.Module]) -> type[Derived]:
    """A class that quantizes like `quant_class` and behaves like `float_class` otherwise; one for each pair."""
    key = (quant_class, float_class)
    if key in _derived:
        return cast("type[Derived]", _derived[key])
    body: dict[str, Any] = {
        "float_class": float_class,
        "__doc__": f"{float_class.__name__} quantized as {quant_class.__name__}, made by qdq.",
        "__module__": float_class.__module__,
    }
    if quant_class.__reduce_ex__ is object.__reduce_ex__:
        body["__reduce_ex__"] = functools.partialmethod(_reduce_derived, quant_class)
    _derived[key] = type(f"Quant{float_class.__name__}", (quant_class, float_class), body)
    return cast("type[Derived]", _derived[key])


def _reduce_derived(module: Any, quant_class: type[nn.Module], protocol: Any) -> tuple[Any, ...]:
    """Pickle both bases: the derived class cannot be imported from any module."""
    return _rebuild, (quant_class, module.float_class), module.__getstate__()


def _rebuild(quant_class: type[nn.Module], float_class: type[nn.Module]) -> nn.Module:
    derived = derive_class(quant_class, float_class)
    return derived.__new__(derived)
