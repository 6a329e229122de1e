"""Why one layer is in int8 or float, from the report of a run. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.errors import ArgumentError
from qdq.report.charts import unit_of_gain
from qdq.report.load import StoredReport, guarded, load_report
from qdq.report.records import LayerRecord, TensorRecord
from qdq.report.wording import (
    Fact,
    describe_layer,
    describe_method,
    describe_tensor,
    name_layer,
    title_of,
)
from qdq.text import MOST_CHARACTERS, printable

_MOST_HINTS = 5
_LEAST_SIMILARITY = 0.5  # of a hint to the name that was given


@dataclass(frozen=True)
class Explanation:
    """All facts of a run about one layer.

    Args:
        layer: The record.
        neighbours: Name of each layer that it reads or feeds -> "int8" or "float".
        text: The same as text.
    """

    layer: LayerRecord
    neighbours: dict[str, str]
    text: str


def explain_layer(run: Path | str, name: str) -> Explanation:
    """Explain why a layer is int8 or float: the rule or measurement, its ranges, errors, kernel and neighbours.

    Args:
        run: A run folder.
        name: Dotted name of a layer, or of a function call for which a rule has a reason.

    Raises:
        ArgumentError: As for `load_report`; no such layer, with similar names.
        DataError: As for `load_report`.
    """
    report = load_report(run)
    return guarded(report.path, lambda: _explain(report, name))


def _explain(report: StoredReport, name: str) -> Explanation:
    """Explain one layer of a report that has been read."""
    layers = {layer.name: layer for layer in report.layers}
    if name not in layers:
        raise _refuse_name(report, name)
    layer = layers[name]

    neighbours = {}
    for neighbour in (*layer.reads, *layer.feeds):
        if neighbour in layers:
            neighbours[neighbour] = layers[neighbour].precision

    text = _format(layer, neighbours, unit_of_gain(report))
    return Explanation(layer, neighbours, text)


def _refuse_name(report: StoredReport, name: str) -> ArgumentError:
    """The error for a name that is not a layer of the report."""
    for module in report.data["swap"]["modules"]:
        if module["name"] == name:
            return _refuse_module(report, module)

    hint = "report.html in the run folder lists all layers."
    similar_names = _find_similar_names(report, name)
    if similar_names:
        hint = f"did you mean {', '.join(similar_names)}?"

    return ArgumentError(f"the run {report.name} has no layer {name!r}.", hint)


def _refuse_module(report: StoredReport, module: Mapping[str, Any]) -> ArgumentError:
    """The error for a module that the report does not list as a layer."""
    name = str(module["name"])
    calls = []
    for layer in report.layers:
        if layer.is_call and layer.name.rpartition(".")[0] == name:
            calls.append(layer.name)

    if module["action"] == "missed" and calls:
        return ArgumentError(
            f"{name_layer(name)} is a {module['type']} that is represented by its calls.",
            f"choose one of {', '.join(calls)}.",
        )
    word = report.quantized_state.removeprefix("in ")
    return ArgumentError(
        f"{name} is a {module['type']} that cannot be {word}: {module['reason']}.",
        "choose one of the layers that report.html lists.",
    )


def _find_similar_names(report: StoredReport, name: str) -> list[str]:
    """Layers whose names contain a name, then layers with a similar name."""
    names = [layer.name for layer in report.layers]
    similar_names: dict[str, None] = {}
    if name:
        for candidate in names:
            if name.lower() in candidate.lower():
                similar_names[candidate] = None

    matches = difflib.get_close_matches(name, names, _MOST_HINTS, _LEAST_SIMILARITY)
    similar_names.update(dict.fromkeys(matches))
    return list(similar_names)[:_MOST_HINTS]


def _format(layer: LayerRecord, neighbours: Mapping[str, str], unit: str) -> str:
    """One block for the layer, then one for each of its quantizers."""
    title = f"{name_layer(layer.name)} ({layer.kind})"
    blocks = [_format_block(title, describe_layer(layer, unit, neighbours))]
    for tensor in layer.tensors:
        title = f"{title_of(tensor)} ({tensor.quantizer})"
        blocks.append(_format_block(title, _list_facts(tensor)))

    if "tensors" in layer.unknown:
        blocks.append(printable(f"No ranges: {layer.unknown['tensors']}", MOST_CHARACTERS))

    return "\n\n".join(blocks)


def _list_facts(tensor: TensorRecord) -> list[Fact]:
    """The facts about a quantizer, with the ranges that the calibration methods would choose."""
    facts = describe_tensor(tensor)
    for method, choice in tensor.methods.items():
        facts.append(describe_method(method, choice, tensor))

    if "methods" in tensor.unknown:
        facts.append(("by other methods", f"not known: {tensor.unknown['methods']}"))

    return facts


def _format_block(title: str, facts: list[Fact]) -> str:
    """A title, and below it one line for each fact."""
    width = max(len(printable(term)) for term, _ in facts)
    lines = [printable(title)]
    for term, text in facts:
        lines.append(f"  {printable(term):{width}}  {printable(text, MOST_CHARACTERS)}")

    return "\n".join(lines)
