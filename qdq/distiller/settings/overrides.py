"""Settings of single layers: ordered regular expressions, of which a layer takes the first that matches."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qdq.distiller.settings.layer_settings import LAYER_KEYS, LayerSettings, update_settings
from qdq.distiller.settings.names import WEIGHTED, is_layer, plain_names
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.schema import describe
from qdq.text import printable

logger = logging.getLogger(__name__)

Overrides = OrderedDict[str, Mapping[str, Any]]
"""Exact name of a layer, or regular expression for whole names -> settings that replace the defaults."""


@dataclass(frozen=True)
class Resolution:
    """The settings of every module of a model.

    Args:
        settings: Name without a wrapper's `module.` -> settings, for all modules below the model. `bits_weights` and
            `bits_bias` are None for a module without weights.
        unused: Pattern that applies to no layer -> the reason.
        origins: Name of a layer -> the override that applies to it.
    """

    settings: dict[str, LayerSettings]
    unused: dict[str, str]
    origins: dict[str, str]


@dataclass(frozen=True)
class _Entry:
    """An override: its expression and the settings of the layers that it applies to."""

    expression: re.Pattern[str]
    settings: LayerSettings


def resolve(
    model: nn.Module,
    defaults: LayerSettings,
    overrides: Overrides | None = None,
    allowed: Collection[str] = LAYER_KEYS,
) -> Resolution:
    """Find the settings of every module. A pattern that applies to no layer is logged as a warning.

    An entry with the exact name of a module comes before all patterns. Otherwise the first pattern that matches the
    whole name applies, and it alone: what it leaves out is as in the defaults.

    Args:
        model: The model.
        defaults: The settings of modules without an override.
        overrides: In their order; None: no overrides.
        allowed: The keys that an override may have.

    Raises:
        ArgumentTypeError: `overrides` has no order of its own, or an unknown key.
        ArgumentError: An invalid pattern or value, or the former name of a key.
    """
    modules = plain_names(model)
    entries = _read_entries(defaults, overrides, modules.keys(), allowed)
    settings = {}
    origins = {}
    for name, module in modules.items():
        pattern = _choose(name, entries)
        if pattern is None:
            chosen = defaults
        else:
            chosen = entries[pattern].settings
            if is_layer(module):
                origins[name] = pattern
        settings[name] = _fit(chosen, module)
    layers = [name for name, module in modules.items() if is_layer(module)]
    unused = {}
    for pattern, entry in entries.items():
        if pattern not in origins.values():
            unused[pattern] = _explain_unused(entry, layers)
            logger.warning("override %s %s", describe(pattern), unused[pattern])
    return Resolution(settings, unused, origins)


def _read_entries(
    defaults: LayerSettings,
    overrides: Overrides | None,
    names: Collection[str],
    allowed: Collection[str],
) -> dict[str, _Entry]:
    """The overrides, checked, whether they match a layer or not."""
    if overrides is None:
        return {}
    if not isinstance(overrides, OrderedDict):
        raise ArgumentTypeError(
            f"overrides is of type {type(overrides).__name__}; expected an OrderedDict, as the first match counts.",
            "pass collections.OrderedDict(...), the most special pattern first.",
        )
    entries = {}
    for pattern, values in overrides.items():
        if not isinstance(pattern, str) or not isinstance(values, Mapping):
            raise ArgumentTypeError(
                f"override {printable(pattern, 40)} has the value {printable(values, 40)}; expected a name or pattern "
                "with settings.",
                f"write settings for it, some of {', '.join(allowed)}.",
            )
        settings = update_settings(defaults, values, f"override {describe(pattern)}", allowed)
        is_name = pattern in names
        entries[pattern] = _Entry(_compile(re.escape(pattern) if is_name else pattern), settings)
    return entries


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ArgumentError(
            f"override {describe(pattern)} is no layer of the model and no regular expression: {error}.",
            "correct the name or the expression.",
        ) from error


def _choose(name: str, entries: Mapping[str, _Entry]) -> str | None:
    """The pattern of the entry that applies to a module; None if none does."""
    if name in entries:
        return name
    for pattern, entry in entries.items():
        if entry.expression.fullmatch(name):
            return pattern
    return None


def _fit(settings: LayerSettings, module: nn.Module) -> LayerSettings:
    """The settings without bits for weights that a module does not have."""
    if isinstance(module, WEIGHTED):
        return settings
    return replace(settings, bits_weights=None, bits_bias=None)


def _explain_unused(entry: _Entry, layers: Iterable[str]) -> str:
    """Why an entry applies to no layer."""
    if any(entry.expression.fullmatch(name) for name in layers):
        return "applies to no layer: other entries come first for all that it matches"
    return "matches no layer"


def override_layers(no_clip: Iterable[str], no_quant: Iterable[str]) -> Overrides:
    """The overrides of layers that are not clipped, or not quantized at all.

    Args:
        no_clip: Layers whose activations are not clipped.
        no_quant: Layers that stay in float; this wins for a layer that is in both.
    """
    overrides: Overrides = OrderedDict()
    for name in no_quant:
        overrides[name] = {"bits_activations": None, "bits_weights": None}
    for name in no_clip:
        overrides.setdefault(name, {"clip_acts": "NONE"})
    return overrides
