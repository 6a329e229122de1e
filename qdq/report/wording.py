"""What is known of a layer in words, for the page and for `qdq explain`; what is not known says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qdq.report.records import LayerRecord, Sensitivity, TensorRecord

Fact = tuple[str, str]


def describe_layer(
    layer: LayerRecord, unit: str, neighbours: Mapping[str, str] | None = None
) -> list[Fact]:
    """Term and text, what decides first.

    Args:
        layer: The record.
        unit: What gains are in.
        neighbours: What the layers that it reads or feeds run in, to be said with their names.
    """
    missing, found = layer.unknown, layer.sensitivity
    why = missing.get("sensitivity", "there is no error, or it was only estimated")
    size = f"{layer.weights:,}, {layer.weight_bytes:,} bytes in the file"
    reads = [*["the input of the network"] * layer.reads_input, *_name(layer.reads, neighbours)]
    feeds = [*_name(layer.feeds, neighbours), *["an output of the network"] * layer.writes_output]
    return [
        ("Runs in", layer.precision),
        ("Why", layer.reason),
        ("Gain in float", _gain(found, unit) if found else _not_known(why)),
        *_describe_cost(found),
        ("Outputs in that state", _outputs(found, unit, why)),
        ("Own output in int8", _known(layer.output_sqnr_db, _sqnr, missing.get("output_sqnr_db"))),
        (
            "Multiplications",
            _known(layer.macs, lambda macs: _work(macs, layer.macs_share), missing.get("macs")),
        ),
        ("Weights", size if layer.weights else "none of its own"),
        (
            "Engine",
            _known(
                layer.engine, lambda kind: _engine(kind, layer.engine_note), missing.get("engine")
            ),
        ),
        (
            "Kernel",
            ", ".join(layer.kernels) or _not_known(missing.get("engine", "the engine names none")),
        ),
        ("Reads", _list(reads, missing, "constants only")),
        ("Feeds", _list(feeds, missing, "no layer reads it")),
    ]


def describe_tensor(tensor: TensorRecord) -> list[Fact]:
    """Term and text of what one quantizer does."""
    missing = tensor.unknown
    return [
        ("Range", _known(tensor.amax, lambda amax: _range(amax, tensor), missing.get("amax"))),
        ("Quantizes", "yes" if tensor.is_on else "no, it is switched off"),
        ("Error", _known(tensor.sqnr_db, _sqnr, missing.get("sqnr_db"))),
        (
            "Clipped",
            _known(tensor.clipped, lambda part: format_share(part, 3), missing.get("clipped")),
        ),
        (
            "Same range as",
            f"{', '.join(tensor.shares)}; figures are of all" if tensor.shares else "no other",
        ),
    ]


def title_of(tensor: TensorRecord) -> str:
    """The role with a capital letter."""
    return tensor.role[:1].upper() + tensor.role[1:]


def format_number(value: float | None, form: str = ".4g", unknown: str = "–") -> str:
    """A number in a few characters."""
    return unknown if value is None else format(value, form)


def format_share(value: float | None, digits: int = 1) -> str:
    """0.123 as "12.3 %"; what is little is not shown as nothing."""
    if value is None:
        return "–"
    least = 10.0**-digits
    return f"< {least:g} %" if 0 < 100 * value < least / 2 else f"{100 * value:.{digits}f} %"


def format_state(state: Mapping[str, Any], metric: str) -> str:
    """The quality of the outputs in one state of the model, "18.25 dB" or "top1 0.741, SQNR 18.25 dB".

    Args:
        state: `sqnr_db` and `metric` of an analysis, or of a step or a point of it.
        metric: Name of the metric that ranked.
    """
    sqnr = "no error" if state["sqnr_db"] is None else f"{state['sqnr_db']:.2f} dB"
    if metric == "sqnr":
        return sqnr
    value = format_number(state["metric"], unknown="not finite")
    return f"{metric} {value}{' nats' if metric == 'kl' else ''}, SQNR {sqnr}"


def format_gain(unit: Sensitivity) -> str:
    """Gain and interval, "0.52 (0.41 to 0.63)"; of an estimate the SQNR."""
    if unit.gain is None and unit.is_exact:
        return "not finite"
    if unit.gain is None:
        return "estimated" if unit.sqnr_db is None else f"estimated: SQNR {unit.sqnr_db:.2f} dB"
    interval = (
        "" if unit.low is None or unit.high is None else f" ({unit.low:.2g} to {unit.high:.2g})"
    )
    return f"{unit.gain:.3g}{interval}"


def _gain(found: Sensitivity, unit: str) -> str:
    name = (
        found.unit if found.unit.startswith("group ") else f"group {found.unit}"
    )  # of a pattern: "group layer1.*"
    group = f", in the {name} of {len(found.layers)} layers" if len(found.layers) > 1 else ""
    rank = f"rank {found.rank} of {found.units}, {'measured' if found.is_exact else 'estimated'}{group}"
    if found.gain is None:
        return f"not finite; {rank}" if found.is_exact else rank
    interval = (
        ""
        if found.low is None or found.high is None
        else f" (95 % interval {found.low:.3g} to {found.high:.3g})"
    )
    return f"{found.gain:.3g} {unit}{interval}; {rank}"


def _describe_cost(found: Sensitivity | None) -> list[Fact]:
    if found is None or found.cost is None:
        return []
    return [("Cost in float", f"{found.cost:.4g} microseconds more than in int8")]


def _outputs(found: Sensitivity | None, unit: str, why: str) -> str:
    """In the state that was measured."""
    metric = "" if found is None or found.metric is None else f"{found.metric:.4g} {unit}, "
    return metric + _known(found.sqnr_db if found else None, _sqnr, why)


def _known(value: float | str | None, write: Callable[..., str], why: str | None) -> str:
    return _not_known(why or "nothing was measured") if value is None else write(value)


def _not_known(why: str) -> str:
    return f"not known: {why}"


def _sqnr(value: float) -> str:
    return f"SQNR {value:.2f} dB"


def _engine(kind: str, note: str) -> str:
    return f"{kind}: {note}" if note else kind


def _work(macs: int, share: float | None) -> str:
    return f"{macs:,} a sample, {format_share(share, 2)} of all"


def _range(amax: float, tensor: TensorRecord) -> str:
    method = f" by {tensor.method}" if tensor.method else ""
    if tensor.ranges > 1:
        return f"{tensor.least_amax or 0.0:.4g} to {amax:.4g} in {tensor.ranges} channels{method}"
    return f"{amax:.5g}{method}"


def _name(names: Sequence[str], precisions: Mapping[str, str] | None) -> Sequence[str]:
    return (
        names
        if precisions is None
        else [f"{name} ({precisions.get(name, 'not known')})" for name in names]
    )


def _list(names: Sequence[str], missing: Mapping[str, str], none: str) -> str:
    return ", ".join(names) or f"nothing: {missing.get('neighbours', none)}"
