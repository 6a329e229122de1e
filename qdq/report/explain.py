"""Why one layer is as it is, from the report of a run. Needs no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from qdq.errors import ArgumentError
from qdq.report.charts import unit_of_gain
from qdq.report.load import StoredReport, guarded, load_report
from qdq.report.records import LayerRecord, TensorRecord
from qdq.report.wording import Fact, describe_layer, describe_tensor, format_share, title_of
from qdq.text import MOST_CHARACTERS, printable

_HINTS = 5


@dataclass(frozen=True)
class Explanation:
    """All that a run knows of one layer.

    Args:
        layer: The record.
        neighbours: Name of each layer that it reads or feeds -> "int8" or "float".
        text: The same for a person.
    """

    layer: LayerRecord
    neighbours: dict[str, str]
    text: str


def explain_layer(run: Path | str, name: str) -> Explanation:
    """Why a layer is int8 or float, by which rule or measurement, with its ranges, errors, kernel and neighbours.

    Args:
        run: A run folder.
        name: Dotted name of a layer, or of a function call that a rule says something about.

    Raises:
        ArgumentError: As for `load_report`; no such layer, with those that are meant perhaps.
        DataError: As for `load_report`.
    """
    report = load_report(run)
    return guarded(report.path, lambda: _explain(report, name))


def _explain(report: StoredReport, name: str) -> Explanation:
    layers = {layer.name: layer for layer in report.layers}
    if name not in layers:
        raise _unknown(report, name)
    layer = layers[name]
    neighbours = {
        other: layers[other].precision for other in (*layer.reads, *layer.feeds) if other in layers
    }
    return Explanation(layer, neighbours, _format(layer, neighbours, unit_of_gain(report)))


def _unknown(report: StoredReport, name: str) -> ArgumentError:
    modules = {str(module["name"]): module for module in report.data["swap"]["modules"]}
    if name in modules:
        found = modules[name]
        calls = [
            layer.name
            for layer in report.layers
            if layer.is_call and layer.name.rpartition(".")[0] == name
        ]
        if found["action"] == "missed" and calls:
            return ArgumentError(
                f"{name or 'the model'} is a {found['type']} that stands there with its calls.",
                f"choose one of {', '.join(calls)}.",
            )
        return ArgumentError(
            f"{name} is a {found['type']} that cannot be int8: {found['reason']}.",
            "layers that can are in report.html; choose one of them.",
        )
    names = [layer.name for layer in report.layers]
    parts = [other for other in names if name and name.lower() in other.lower()]
    close = list(dict.fromkeys([*parts, *difflib.get_close_matches(name, names, _HINTS, 0.5)]))[
        :_HINTS
    ]
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else "report.html in the run folder lists all layers."
    )
    return ArgumentError(f"the run {report.name} has no layer {name!r}.", hint)


def _format(layer: LayerRecord, neighbours: dict[str, str], unit: str) -> str:
    blocks = [
        _block(
            f"{layer.name or 'the model'} ({layer.kind})", describe_layer(layer, unit, neighbours)
        )
    ]
    blocks += [
        _block(f"{title_of(tensor)} ({tensor.quantizer})", _list_facts(tensor))
        for tensor in layer.tensors
    ]
    if "tensors" in layer.unknown:
        blocks.append(printable(f"No ranges: {layer.unknown['tensors']}", MOST_CHARACTERS))
    return "\n\n".join(blocks)


def _list_facts(tensor: TensorRecord) -> list[Fact]:
    facts = describe_tensor(tensor)
    facts += [
        (
            f"by {method}",
            f"{found.amax:.5g}, clips {format_share(found.clipped, 3)}"
            + (" (used)" if method == tensor.method else ""),
        )
        for method, found in tensor.methods.items()
    ]
    if "methods" in tensor.unknown:
        facts.append(("by other methods", f"not known: {tensor.unknown['methods']}"))
    return facts


def _block(title: str, facts: list[Fact]) -> str:
    """A title, and below it a line of each fact."""
    width = max(len(printable(term)) for term, _ in facts)
    lines = [
        f"  {printable(term):{width}}  {printable(text, MOST_CHARACTERS)}" for term, text in facts
    ]
    return "\n".join([printable(title), *lines])
