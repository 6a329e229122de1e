"""The precision of each layer, int8, FP8 or float, as a YAML file that a person can read, edit and apply."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from qdq.errors import ArgumentTypeError
from qdq.files import as_path, write_atomic
from qdq.schema import read_yaml, validate

if TYPE_CHECKING:
    from torch import nn

_FIX = "correct it by hand, see docs/analyze.md for the form, or give the plan.yaml of a run."
_FIX_MISSING = "give the plan.yaml of a run, or one in the form that docs/analyze.md shows."
_PINNED = "pinned"
_EARLIER = "; earlier: "
_HEAD = """\
# qdq plan: which layer runs in {formats} and which in float. Edit `precision`, then apply it: qdq ptq --plan FILE
# gain: how much the metric improves when this layer alone goes from {formats} to float. "leave-one-out" measures that,
# "one-at-a-time" estimates it from the layer's own error, as if the errors of all layers were independent.
"""


@dataclass(frozen=True)
class _StoredEntry:
    """The form of an entry in the file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    precision: Literal["int8", "fp8", "float"]
    reason: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class _StoredPlan:
    """The form of a plan in the file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layers: dict[str, _StoredEntry]
    metric: str = "sqnr"


@dataclass(frozen=True)
class PlanEntry:
    """The decision for a layer or a call.

    Args:
        precision: "int8", "fp8" or "float".
        reason: The reason, in one sentence.
        gain: Measured or estimated gain of leaving it in float; None if it is not known.
    """

    precision: str
    reason: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class Plan:
    """The decision for a model.

    Args:
        layers: Dotted name of a layer, or of a function call with quantizers -> decision.
        metric: The metric of the gains.
    """

    layers: Mapping[str, PlanEntry] = field(default_factory=dict)
    metric: str = "sqnr"

    @property
    def precisions(self) -> dict[str, str]:
        """Layer -> "int8", "fp8" or "float"."""
        return {name: entry.precision for name, entry in self.layers.items()}

    def pin(self, name: str, precision: str, metric: str) -> PlanEntry:
        """The entry of a layer that is pinned after this plan: it keeps its history.

        Args:
            name: The layer; a layer that this plan does not name has no history.
            precision: The precision that it is pinned to.
            metric: The metric of gains from now on; a gain in another metric becomes a part of the reason.
        """
        entry = self.layers.get(name, PlanEntry(precision))
        history = entry.reason.removeprefix(_PINNED).removeprefix(_EARLIER)
        gain = entry.gain
        if gain is not None and metric != self.metric:
            separator = ", " if history else ""
            history = f"{history}{separator}gain {gain:g} in {self.metric}"
            gain = None
        reason = _PINNED
        if history:
            reason = f"{_PINNED}{_EARLIER}{history}"
        return PlanEntry(precision, reason, gain)


@dataclass(frozen=True)
class PlanChange:
    """A layer on which two plans differ.

    Args:
        name: The layer.
        before: Its precision in the first plan; None if the plan does not name it.
        after: Its precision in the second plan; None if the plan does not name it.
    """

    name: str
    before: str | None
    after: str | None


def save_plan(plan: Plan, path: Path | str) -> Path:
    """Write a plan as YAML, atomically.

    Args:
        plan: The plan.
        path: The file.

    Returns:
        The path of the file.

    Raises:
        ArgumentTypeError: `plan` is not a plan.
    """
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(
            f"plan is of type {type(plan).__name__}; expected a Plan.",
            "pass the `plan` of analyze_layers, or what load_plan returned.",
        )
    layers = {name: _to_yaml(entry) for name, entry in plan.layers.items()}
    content = {"metric": plan.metric, "layers": layers}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)
    formats = "int8 or FP8" if "fp8" in plan.precisions.values() else "int8"
    return write_atomic(as_path(path, "path"), _HEAD.format(formats=formats) + text)


def _to_yaml(entry: PlanEntry) -> dict[str, Any]:
    """An entry as it is written; empty fields are left out."""
    fields: dict[str, Any] = {"precision": entry.precision}
    if entry.gain is not None:
        fields["gain"] = _round(entry.gain)
    if entry.reason:
        fields["reason"] = entry.reason
    return fields


def _round(gain: float) -> float | None:
    """A gain with six decimals; None for the infinite gain of a layer that causes all of the error."""
    if not math.isfinite(gain):
        return None
    return round(float(gain), 6)


def load_plan(path: Path | str) -> Plan:
    """Read a plan.

    Raises:
        DataError: The file cannot be read, is not a plan, names a layer twice, or has unknown keys.
    """
    path = as_path(path, "path")
    content = read_yaml(path, _FIX if os.path.isfile(path) else _FIX_MISSING)
    if isinstance(content, dict) and isinstance(content.get("layers"), dict):
        layers = {name: _expand(entry) for name, entry in content["layers"].items()}
        content = {**content, "layers": layers}
    stored = validate(_StoredPlan, content, str(path), _FIX)
    entries: dict[str, PlanEntry] = {}
    for name, entry in stored.layers.items():
        entries[name] = PlanEntry(entry.precision, entry.reason, entry.gain)
    return Plan(entries, stored.metric)


def _expand(entry: Any) -> Any:
    """An entry in full: a plan may say `conv1: float` for `conv1: {precision: float}`."""
    if isinstance(entry, str):
        return {"precision": entry}
    return entry


def diff_plans(before: Plan, after: Plan) -> list[PlanChange]:
    """The layers whose precision differs, in the order of the first plan, then of the second."""
    first, second = before.precisions, after.precisions
    changes = []
    for name in dict.fromkeys([*first, *second]):
        change = PlanChange(name, first.get(name), second.get(name))
        if change.before != change.after:
            changes.append(change)
    return changes


def apply_plan(model: nn.Module, plan: Plan, example_inputs: Any) -> list[str]:
    """Switch the quantizers of a model as a plan says: off for float layers, on for all others.

    A quantizer that exists only for a layer is switched with it: the one on the shortcut of the residual add after the
    layer. Layers that the plan does not name do not change. Formats stay: `choose_formats(pinned=...)` sets them, with
    the ranges that they need.

    Args:
        model: A swapped (and rewired) model.
        plan: The plan; its names may be patterns (see `qdq.patterns`). A name takes precedence over patterns.
        example_inputs: One batch (see `forward.call_model`).

    Returns:
        The layers that the plan leaves in float.

    Raises:
        ArgumentError: The plan names something that is not quantized in this model, sets a layer to another format than
            it has, or its patterns contradict each other; nothing is switched then.
    """
    # With torch, which reading plans does not need.
    from qdq.corrections import redoing_passes
    from qdq.forward import require_model
    from qdq.units import find_all_quantizers, match_precisions, require_formats_of

    require_model(model)
    quantizers = find_all_quantizers(model, example_inputs)
    precisions = match_precisions(model, list(quantizers), plan.precisions)
    require_formats_of(precisions, quantizers)
    float_layers = []
    with redoing_passes(model):
        for name, precision in precisions.items():
            is_float = precision == "float"
            for quantizer in quantizers[name]:
                quantizer.is_enabled = not is_float
            if is_float:
                float_layers.append(name)
    return float_layers
