"""`to_tensorrt`: a model of any number system as quantized layers of qdq, with a verdict for each layer.

TensorRT int8 has the values k * S with integer k from -128 to 127 and a constant S > 0. A system whose values are such
products is exported exactly. One with a zero point, or with codes beyond, is converted on request: it gets a symmetric
range. Others are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from qdq.errors import ExportError
from qdq.systems.grid import INT8_HIGHEST, INT8_LOWEST, Grid, Verdict
from qdq.systems.sites import Site, find_sites
from qdq.systems.transfer import measure_conversion, transfer


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor.

    Args:
        place: "weight", "input", or the name of a quantizer between layers.
        system: Its number system.
        verdict: "exact", "convert" or "refuse".
        reason: The property that does not fit, with its value; "" if it is exact.
        before_db: SQNR of the system's values, in dB: of a weight against the float weight, of an input against evenly
            spread values. None if it has the same values in int8, infinite if the system's values are all that is
            known.
        after_db: The same for the int8 values.
    """

    place: str
    system: str
    verdict: Verdict
    reason: str
    before_db: float | None = None
    after_db: float | None = None


@dataclass(frozen=True)
class LayerVerdict:
    """What becomes of a layer.

    Args:
        name: Dotted name.
        precision: "int8" or "float".
        tensors: The verdicts on its weight and its input.
        note: Why it is float, or what is still to do; "" if nothing.
    """

    name: str
    precision: str
    tensors: tuple[TensorVerdict, ...]
    note: str


@dataclass(frozen=True)
class Transfer:
    """Result of `to_tensorrt`.

    Args:
        layers: All convolutions and linear layers.
        standing: The quantizers that stay between layers, such as before a sum.
    """

    layers: tuple[LayerVerdict, ...]
    standing: tuple[TensorVerdict, ...]

    def format_table(self) -> str:
        """A line for each layer, with the SQNR before and after where something was converted."""
        num_int8 = sum(layer.precision == "int8" for layer in self.layers)
        lines = [f"{num_int8} of {len(self.layers)} layers in int8"]
        for layer in self.layers:
            lines.append(f"  {layer.name}: {layer.precision}{_prefix(': ', layer.note)}")
            lines += [f"    {_format_tensor(tensor)}" for tensor in layer.tensors]
        lines += [f"  between layers: {_format_tensor(tensor)}" for tensor in self.standing]
        return "\n".join(lines)


def _prefix(separator: str, text: str) -> str:
    return separator + text if text else ""


def _format_tensor(tensor: TensorVerdict) -> str:
    line = f"{tensor.place}: {tensor.system}, {tensor.verdict}{_prefix(', ', tensor.reason)}"
    if tensor.before_db is None or tensor.after_db is None:
        return line
    if math.isinf(tensor.before_db):
        return f"{line}; SQNR of the conversion {tensor.after_db:.1f} dB"
    return f"{line}; SQNR {tensor.before_db:.1f} dB before, {tensor.after_db:.1f} dB after"


def to_tensorrt(model: nn.Module, *, convert: bool = False) -> Transfer:
    """Turn a model of any number system into swapped layers with ranges, in place.

    Then `export_onnx`, `check_onnx` and `build_engine` do what they always do. A layer whose weight is quantized and
    whose input is not gets an input quantizer without a range: `calibrate_model(model, batches, weight_method="keep")`
    computes it. A layer whose weight is float stays float. A range of fewer codes than int8 gets a Clip before its Q.

    Args:
        model: A calibrated model, in evaluation mode.
        convert: Also take tensors with a zero point or with codes that int8 lacks, which get new symmetric ranges.

    Returns:
        The verdicts.

    Raises:
        ExportError: Tensors that do not fit; the message names all of them, and the model does not change.
        StateError: A quantizer is not calibrated.
        UnsupportedError: As for `sites.find_sites`.
    """
    layout = find_sites(model)
    verdicts = {site.name: judge_site(site) for site in layout.sites}
    standing = {}
    for name in sorted(layout.needed):
        standing[name] = judge_tensor(name, layout.standing[name].describe(None))
    _require_fit(verdicts | {name: (verdict,) for name, verdict in standing.items()}, convert)
    transfer(model, layout)
    layers = []
    for site in layout.sites:
        precision = "float" if site.weight is None else "int8"
        layers.append(LayerVerdict(site.name, precision, verdicts[site.name], _note_of(site)))
    return Transfer(tuple(layers), tuple(standing.values()))


def _require_fit(verdicts: dict[str, tuple[TensorVerdict, ...]], convert: bool) -> None:
    """Refuse all tensors that do not fit, in one error.

    Raises:
        ExportError: The message has a line for each of them.
    """
    lines = []
    is_hopeless = False
    for name, tensors in verdicts.items():
        for tensor in tensors:
            if tensor.verdict == "exact" or (tensor.verdict == "convert" and convert):
                continue
            is_hopeless |= tensor.verdict == "refuse"
            lines.append(f"{name}: {tensor.reason}")
    if not lines:
        return
    fix = "re-calibrate symmetric, or allow conversion: to_tensorrt(model, convert=True)."
    if is_hopeless:
        fix = "leave the layers that are refused in float, or use a system with a constant scale and codes of 8 bits."
    raise ExportError("\n".join(["not for TensorRT int8:", *lines]), fix)


def judge_site(site: Site) -> tuple[TensorVerdict, ...]:
    """The verdicts on the tensors of a layer; none if its weight is float."""
    if site.weight is None:
        return ()
    verdicts = [judge_tensor("weight", site.weight, site)]
    if site.input is not None:
        verdicts.append(judge_tensor("input", site.input))
    return tuple(verdicts)


def judge_tensor(place: str, grid: Grid, site: Site | None = None) -> TensorVerdict:
    """The verdict on the values of a grid.

    Args:
        place: As for `TensorVerdict`.
        grid: The grid.
        site: The layer whose weight has the grid; None for any other tensor.
    """
    kind = "weights" if place == "weight" else "inputs" if place == "input" else "values"
    subject = f"{grid.system} {kind}"
    if grid.obstacle:
        reason = (
            f"{subject}: {grid.obstacle}; TensorRT int8 needs codes of 8 bits and a constant scale"
        )
        return TensorVerdict(place, grid.system, "refuse", reason)
    is_valid = torch.isfinite(grid.scale) & (grid.scale > 0)
    if not bool(is_valid.all()):
        reason = (
            f"{subject} have a scale of {float(grid.scale.min())}; TensorRT int8 needs one above 0"
        )
        return TensorVerdict(place, grid.system, "refuse", reason)
    problem = _find_problem(grid)
    if not problem:
        return TensorVerdict(place, grid.system, "exact", "")
    reason = f"{subject} {problem}"
    if (
        site is None and grid.on_request
    ):  # the quantizer of the system stays, before the one of int8
        return TensorVerdict(place, grid.system, "convert", reason)
    before, after = measure_conversion(grid, site)
    return TensorVerdict(place, grid.system, "convert", reason, before, after)


def _find_problem(grid: Grid) -> str:
    """Why a grid with a constant scale is not one of int8; "" if it is."""
    zero_points = grid.zero_point[grid.zero_point != 0]
    if zero_points.numel():
        return (
            f"have zero point {float(zero_points.flatten()[0]):g}; TensorRT int8 needs zero point 0"
        )
    if grid.lowest < INT8_LOWEST or grid.highest > INT8_HIGHEST:
        return f"have codes from {grid.lowest} to {grid.highest}; TensorRT int8 has -128 to 127"
    return grid.on_request


def _note_of(site: Site) -> str:
    if site.weight is None and site.input is None:
        return "no number system quantizes it"
    if site.weight is None:
        return "its weight is float, and TensorRT needs both inputs of a product in int8"
    if site.input is None:
        return "its input has no range yet: calibrate_model(model, batches, weight_method='keep')"
    return ""
