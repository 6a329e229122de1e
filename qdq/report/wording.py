"""The wording of the report: a layer, a tensor and their figures as text. An unknown figure says why.

The page, `qdq explain` and the comparison of runs take their texts from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdq.report.records import LayerRecord, MethodRange, Sensitivity, TensorRecord

Fact = tuple[str, str]
"""A term and its text."""

NOTHING = "–"
"""Shown if a figure is unknown; its tooltip says why."""

_UNMEASURED = "nothing was measured"


def describe_layer(
    layer: LayerRecord, unit: str, neighbours: Mapping[str, str] | None = None
) -> list[Fact]:
    """Describe a layer, the most important fact first.

    Args:
        layer: The record.
        unit: The unit of the gains.
        neighbours: Layer -> "int8" or "float", for the layers that it reads or feeds. They are shown with their names.
    """
    why_no_output = layer.unknown.get("output_sqnr_db", _UNMEASURED)
    facts = [
        ("Runs in", layer.precision),
        ("Why", layer.reason),
        ("Gain in float", _describe_gain(layer, unit)),
    ]
    if layer.sensitivity is not None and layer.sensitivity.cost is not None:
        cost = f"{layer.sensitivity.cost:.4g} microseconds more than in int8"
        facts.append(("Cost in float", cost))
    facts += [
        ("Outputs in that state", _describe_outputs(layer, unit)),
        ("Own output in int8", _describe_sqnr(layer.output_sqnr_db, why_no_output)),
        ("Multiplications", _describe_work(layer)),
        ("Weights", _describe_weights(layer)),
        ("Engine", _describe_engine(layer)),
        ("Kernel", _describe_kernels(layer)),
        ("Reads", _describe_reads(layer, neighbours)),
        ("Feeds", _describe_feeds(layer, neighbours)),
    ]
    return facts


def describe_tensor(tensor: TensorRecord) -> list[Fact]:
    """Describe what one quantizer does to its tensor."""
    return [
        ("Range", _describe_range(tensor)),
        ("Quantizes", "yes" if tensor.is_on else "no, it is switched off"),
        ("Error", _describe_sqnr(tensor.sqnr_db, tensor.unknown.get("sqnr_db", _UNMEASURED))),
        ("Clipped", _describe_clipping(tensor)),
        ("Same range as", _describe_sharing(tensor)),
    ]


def describe_method(method: str, choice: MethodRange, tensor: TensorRecord) -> Fact:
    """Describe the range that one calibration method would choose for a tensor."""
    text = f"{choice.amax:.5g}, clips {format_percent(choice.clipped, 3)}"
    if method == tensor.method:
        text += " (used)"
    return f"by {method}", text


def title_of(tensor: TensorRecord) -> str:
    """The role of a tensor with a capital letter."""
    return tensor.role[:1].upper() + tensor.role[1:]


def name_layer(name: str) -> str:
    """The dotted name of a layer; the module at the top has none."""
    return name or "the model"


def format_number(value: float | None, form: str = ".4g", unknown: str = NOTHING) -> str:
    """A number in a few characters."""
    if value is None:
        return unknown
    return format(value, form)


def format_percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.123 as "12.3 %". A small fraction is not rounded to zero."""
    if value is None:
        return NOTHING
    percent = 100 * value
    smallest = 10.0**-digits
    if 0 < percent < smallest / 2:
        return f"< {smallest:g} %"
    return f"{percent:.{digits}f} %"


def format_decibels(value: float | None, unknown: str = "no error") -> str:
    """An SQNR in dB; None means that it is infinite."""
    if value is None:
        return unknown
    return f"{value:.2f} dB"


def format_state(state: Mapping[str, Any], metric: str) -> str:
    """The quality of the outputs in one state of the model, "18.25 dB" or "top1 0.741, SQNR 18.25 dB".

    Args:
        state: `sqnr_db` and `metric` of an analysis, or of one of its steps or points.
        metric: Name of the metric that ranked the layers.
    """
    sqnr = format_decibels(state["sqnr_db"])
    if metric == "sqnr":
        return sqnr
    value = format_number(state["metric"], unknown="not finite")
    unit = " nats" if metric == "kl" else ""
    return f"{metric} {value}{unit}, SQNR {sqnr}"


def format_gain(unit: Sensitivity) -> str:
    """Gain and interval, "0.52 (0.41 to 0.63)"; for an estimate the SQNR."""
    if unit.gain is not None:
        return f"{unit.gain:.3g}{_format_interval(unit, ' ({:.2g} to {:.2g})')}"
    if unit.is_exact:
        return "not finite"
    if unit.sqnr_db is None:
        return "estimated"
    return f"estimated: SQNR {unit.sqnr_db:.2f} dB"


def _format_interval(unit: Sensitivity, form: str) -> str:
    """The 95 % interval of a gain, if there is one."""
    if unit.low is None or unit.high is None:
        return ""
    return form.format(unit.low, unit.high)


def _describe_gain(layer: LayerRecord, unit: str) -> str:
    """The gain in float with its interval and rank."""
    sensitivity = layer.sensitivity
    if sensitivity is None:
        return _not_known(_why_no_gain(layer))
    rank = _describe_rank(sensitivity)
    if sensitivity.gain is not None:
        interval = _format_interval(sensitivity, " (95 % interval {:.3g} to {:.3g})")
        return f"{sensitivity.gain:.3g} {unit}{interval}; {rank}"
    return f"not finite; {rank}" if sensitivity.is_exact else rank


def _why_no_gain(layer: LayerRecord) -> str:
    return layer.unknown.get("sensitivity", "there is no error, or it was only estimated")


def _describe_rank(sensitivity: Sensitivity) -> str:
    """The place in the ranking, and the group if it was measured in one."""
    how = "measured" if sensitivity.is_exact else "estimated"
    rank = f"rank {sensitivity.rank} of {sensitivity.units}, {how}"
    if len(sensitivity.layers) == 1:
        return rank
    group = sensitivity.unit
    # The name of a pattern's group already has it: "group layer1.*".
    if not group.startswith("group "):
        group = f"group {group}"

    return f"{rank}, in the {group} of {len(sensitivity.layers)} layers"


def _describe_outputs(layer: LayerRecord, unit: str) -> str:
    """The outputs of the network in the state of the sensitivity measurement."""
    sensitivity = layer.sensitivity
    if sensitivity is None:
        return _not_known(_why_no_gain(layer))
    sqnr = _describe_sqnr(sensitivity.sqnr_db, _why_no_gain(layer))
    if sensitivity.metric is None:
        return sqnr
    return f"{sensitivity.metric:.4g} {unit}, {sqnr}"


def _describe_work(layer: LayerRecord) -> str:
    """MACs, and their fraction of the network."""
    if layer.macs is None:
        return _not_known(layer.unknown.get("macs", _UNMEASURED))
    return f"{layer.macs:,} per sample, {format_percent(layer.macs_share, 2)} of all"


def _describe_weights(layer: LayerRecord) -> str:
    if not layer.weights:
        return "none of its own"
    return f"{layer.weights:,}, {layer.weight_bytes:,} bytes in the file"


def _describe_engine(layer: LayerRecord) -> str:
    """Type in the engine, with the note of the census."""
    if layer.engine is None:
        return _not_known(layer.unknown.get("engine", _UNMEASURED))
    if not layer.engine_note:
        return layer.engine
    return f"{layer.engine}: {layer.engine_note}"


def _describe_kernels(layer: LayerRecord) -> str:
    if layer.kernels:
        return ", ".join(layer.kernels)
    return _not_known(layer.unknown.get("engine", "the engine does not name it"))


def _describe_reads(layer: LayerRecord, neighbours: Mapping[str, str] | None) -> str:
    """The layers before it."""
    texts = ["the input of the network"] if layer.reads_input else []
    texts += _name_neighbours(layer.reads, neighbours)
    return _list_neighbours(texts, layer, "constants only")


def _describe_feeds(layer: LayerRecord, neighbours: Mapping[str, str] | None) -> str:
    """The layers after it."""
    texts = _name_neighbours(layer.feeds, neighbours)
    if layer.writes_output:
        texts.append("an output of the network")
    return _list_neighbours(texts, layer, "no layer reads it")


def _name_neighbours(names: Sequence[str], precisions: Mapping[str, str] | None) -> list[str]:
    """Names of layers, with their types unless `precisions` is None."""
    if precisions is None:
        return list(names)
    return [f"{name} ({precisions.get(name, 'not known')})" for name in names]


def _list_neighbours(texts: Sequence[str], layer: LayerRecord, why_none: str) -> str:
    """Layers in one line, or why there are none."""
    if texts:
        return ", ".join(texts)
    return f"nothing: {layer.unknown.get('neighbours', why_none)}"


def _describe_range(tensor: TensorRecord) -> str:
    """The range and its method; for channels the smallest and the largest range."""
    if tensor.amax is None:
        return _not_known(tensor.unknown.get("amax", _UNMEASURED))
    method = f" by {tensor.method}" if tensor.method else ""
    if tensor.ranges <= 1:
        return f"{tensor.amax:.5g}{method}"
    smallest = tensor.least_amax or 0.0
    return f"{smallest:.4g} to {tensor.amax:.4g} in {tensor.ranges} channels{method}"


def _describe_clipping(tensor: TensorRecord) -> str:
    if tensor.clipped is None:
        return _not_known(tensor.unknown.get("clipped", _UNMEASURED))
    return format_percent(tensor.clipped, 3)


def _describe_sharing(tensor: TensorRecord) -> str:
    if not tensor.shares:
        return "no other"
    return f"{', '.join(tensor.shares)}; the figures are of all of them together"


def _describe_sqnr(value: float | None, reason: str) -> str:
    """An SQNR, or the reason why it is not known."""
    if value is None:
        return _not_known(reason)
    return f"SQNR {value:.2f} dB"


def _not_known(reason: str) -> str:
    return f"not known: {reason}"
