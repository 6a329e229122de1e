"""Which layer runs in int8 and which in float, as a YAML file that a person can read, edit and apply."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qdq.errors import DataError
from qdq.files import write_atomic

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("int8", "float")
_PINNED, _EARLIER = "pinned", "; earlier: "
_HEAD = """# qdq plan: which layer runs in int8 and which in float. Edit `precision`, then apply it: qdq ptq --plan FILE
# gain: how much the metric improves when this layer alone goes from int8 to float. "leave-one-out" measures that,
# "one-at-a-time" estimates it from the layer's own error, as if the errors of all layers were independent.
"""


class _Loader(yaml.SafeLoader):
    """Names are what is written: not 1.1 for `1.10`, nor true for `yes`; and none stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with the text of each key."""
        result: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no name", key.start_mark)
            if key.value in result:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here twice", key.start_mark)
            result[key.value] = self.construct_object(value, deep=deep)
        return result


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
    text = yaml.safe_dump({"metric": plan.metric, "layers": layers}, sort_keys=False, allow_unicode=True, width=10**6)
    return write_atomic(Path(path), _HEAD + text)


def _round(gain: float) -> float | None:
    """Null for the gain of the one layer that makes all of the error: no number says it."""
    return round(float(gain), 6) if math.isfinite(gain) else None


def load_plan(path: Path | str) -> Plan:
    """Read a plan.

    Raises:
        DataError: The file cannot be read, is no plan, names a layer twice, or has keys that a plan has not.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the plan {path}: {error}.", "give the plan.yaml of a run.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors end in any of these: `!!int abc`, a date that is none, thousands of brackets
        raise DataError(
            f"{path} is no YAML: {' '.join(str(error).split())}.", "mend the line that it names."
        ) from error
    _require_keys(path, "the plan", content, {"layers"}, {"metric"})
    if not isinstance(content["layers"], dict) or not isinstance(content.get("metric", ""), str):
        raise DataError(f"{path}: layers is no mapping, or metric no name.", "see docs/analyze.md for the form.")
    layers = {str(name): _read_entry(path, str(name), value) for name, value in content["layers"].items()}
    return Plan(layers, content.get("metric", "sqnr"))


def _read_entry(path: Path, name: str, value: Any) -> PlanEntry:
    if isinstance(value, str):  # "conv1: float" is enough
        value = {"precision": value}
    _require_keys(path, name, value, {"precision"}, {"reason", "gain"})
    precision, reason, gain = value["precision"], value.get("reason", ""), value.get("gain")
    if precision not in PRECISIONS:
        raise DataError(f"{path}: the precision of {name} is {precision!r}.", "write int8 or float.")
    if not isinstance(reason, str) or not (gain is None or _is_finite(gain)):
        raise DataError(f"{path}: the reason of {name} is no text, or its gain no number.", "correct or remove them.")
    return PlanEntry(precision, reason, None if gain is None else float(gain))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # an int may be larger than any float


def _require_keys(path: Path, what: str, value: Any, required: set[str], optional: set[str]) -> None:
    known = ", ".join(sorted(required | optional))
    if not isinstance(value, dict):
        raise DataError(f"{path}: {what} is no mapping.", f"its keys are {known}.")
    if unknown := [str(key) for key in value if key not in required | optional]:
        raise DataError(f"{path}: {what} has the unknown keys {', '.join(unknown)}.", f"known are {known}.")
    if missing := sorted(required - value.keys()):
        raise DataError(f"{path}: {what} lacks {', '.join(missing)}.", f"its keys are {known}.")


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
    from qdq.units import find_all_quantizers, match_precisions  # with torch, which reading plans does not need

    found = find_all_quantizers(model, example_inputs)
    precisions = match_precisions(model, list(found), plan.precisions)
    for name, precision in precisions.items():
        for quantizer in found[name]:
            quantizer._disabled = precision == "float"
    return [name for name, precision in precisions.items() if precision == "float"]
