"""Which layer runs in int8 and which in float, as a YAML file that a person can read, edit and apply."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from qdq.files import as_path, write_atomic
from qdq.schema import read_yaml, validate

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("int8", "float")
_FIX = "correct it by hand, see docs/analyze.md for the form, or give the plan.yaml of a run."
_FIX_MISSING = "give the plan.yaml of a run, or one in the form that docs/analyze.md shows."
_PINNED, _EARLIER = "pinned", "; earlier: "
_HEAD = """# qdq plan: which layer runs in int8 and which in float. Edit `precision`, then apply it: qdq ptq --plan FILE
# gain: how much the metric improves when this layer alone goes from int8 to float. "leave-one-out" measures that,
# "one-at-a-time" estimates it from the layer's own error, as if the errors of all layers were independent.
"""


@dataclass(frozen=True)
class _StoredEntry:
    """An entry as it stands in the file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    precision: Literal["int8", "float"]
    reason: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class _StoredPlan:
    """A plan as it stands in the file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layers: dict[str, _StoredEntry]
    metric: str = "sqnr"


@dataclass(frozen=True)
class PlanEntry:
    """What is decided for a layer or a call.

    Args:
        precision: "int8" or "float".
        reason: Why, in one sentence.
        gain: What leaving it in float gained in the measurement, None where nothing was measured.
    """

    precision: str
    reason: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class Plan:
    """The decision for a model.

    Args:
        layers: Dotted name of a layer, or of a function call with quantizers -> what is decided.
        metric: What the gains are in.
    """

    layers: Mapping[str, PlanEntry] = field(default_factory=dict)
    metric: str = "sqnr"

    @property
    def precisions(self) -> dict[str, str]:
        """Layer -> "int8" or "float"."""
        return {name: entry.precision for name, entry in self.layers.items()}

    def pin(self, name: str, precision: str, metric: str) -> PlanEntry:
        """The entry of a layer that was pinned after this plan: what is known of it stays, and that it was pinned.

        Args:
            name: The layer; one that this plan does not name has no history.
            precision: What it is pinned to.
            metric: What gains are in from now on; a gain in another metric becomes part of the reason.
        """
        entry = self.layers.get(name, PlanEntry(precision))
        known = entry.reason.removeprefix(_PINNED).removeprefix(_EARLIER)
        gain = entry.gain
        if gain is not None and metric != self.metric:
            known, gain = f"{known}{', ' if known else ''}gain {gain:g} in {self.metric}", None
        return PlanEntry(precision, f"{_PINNED}{_EARLIER}{known}" if known else _PINNED, gain)


@dataclass(frozen=True)
class PlanChange:
    """A layer on which two plans differ; None where a plan does not name it.

    Args:
        name: The layer.
        before: Its precision in the first plan.
        after: Its precision in the second.
    """

    name: str
    before: str | None
    after: str | None


def save_plan(plan: Plan, path: Path | str) -> Path:
    """Write a plan as YAML, atomically."""
    layers = {
        name: {
            "precision": entry.precision,
            **({} if entry.gain is None else {"gain": _round(entry.gain)}),
            **({"reason": entry.reason} if entry.reason else {}),
        }
        for name, entry in plan.layers.items()
    }
    text = yaml.safe_dump(
        {"metric": plan.metric, "layers": layers}, sort_keys=False, allow_unicode=True, width=10**6
    )
    return write_atomic(as_path(path, "path"), _HEAD + text)


def _round(gain: float) -> float | None:
    """Null for the gain of the one layer that makes all of the error: no number says it."""
    return round(float(gain), 6) if math.isfinite(gain) else None


def load_plan(path: Path | str) -> Plan:
    """Read a plan.

    Raises:
        DataError: The file cannot be read, is no plan, names a layer twice, or has keys that a plan has not.
    """
    path = as_path(path, "path")
    content = read_yaml(path, _FIX if os.path.isfile(path) else _FIX_MISSING)
    if isinstance(content, dict) and isinstance(content.get("layers"), dict):
        layers = {name: _write_out(entry) for name, entry in content["layers"].items()}
        content = {**content, "layers": layers}
    stored = validate(_StoredPlan, content, str(path), _FIX)
    entries = {
        name: PlanEntry(entry.precision, entry.reason, entry.gain)
        for name, entry in stored.layers.items()
    }
    return Plan(entries, stored.metric)


def _write_out(entry: Any) -> Any:
    """`conv1: float` is enough."""
    return {"precision": entry} if isinstance(entry, str) else entry


def diff_plans(before: Plan, after: Plan) -> list[PlanChange]:
    """Where two plans differ in precision, in the order of the first plan, then of the second."""
    first, second = before.precisions, after.precisions
    names = dict.fromkeys([*first, *second])
    changes = (PlanChange(name, first.get(name), second.get(name)) for name in names)
    return [change for change in changes if change.before != change.after]


def apply_plan(model: nn.Module, plan: Plan, example_inputs: Any) -> list[str]:
    """Switch the quantizers of a model as a plan says: those of float layers off, of int8 layers on.

    What exists only for a layer, the quantizer on the shortcut of the residual add behind it, goes with it. Layers
    that the plan does not name stay as they are.

    Args:
        model: A swapped (and rewired) model.
        plan: The plan; its names may be patterns (see `qdq.patterns`). A name goes before patterns.
        example_inputs: One batch (see `trace.call_model`).

    Returns:
        The layers that the plan leaves in float.

    Raises:
        ArgumentError: The plan names what is not quantized in this model, or its patterns contradict each other;
            nothing is switched then.
    """
    from qdq.forward import require_model
    from qdq.units import (
        find_all_quantizers,
        match_precisions,
    )  # with torch, which reading plans does not need

    require_model(model)
    found = find_all_quantizers(model, example_inputs)
    precisions = match_precisions(model, list(found), plan.precisions)
    for name, precision in precisions.items():
        for quantizer in found[name]:
            quantizer.is_enabled = precision != "float"
    return [name for name, precision in precisions.items() if precision == "float"]
