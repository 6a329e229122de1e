"""`to_tensorrt`: a model of any number system as quantized layers of qdq, with a verdict for each layer.

TensorRT int8 has the values k * S with integer k from -128 to 127 and a constant S > 0. A system whose values are such
products is exported exactly. One with a zero point, or with codes beyond, is converted on request: it gets a symmetric
range. Others are refused.
"""

from __future__ import annotations

import torch
from torch import nn

from qdq.errors import ExportError
from qdq.forward import evaluating, require_model
from qdq.swap import plan_swap
from qdq.systems.grid import INT8_HIGHEST, INT8_LOWEST, Grid
from qdq.systems.others import NO_RANGE
from qdq.systems.quantized_inputs import quantize_inputs
from qdq.systems.quantizer import UNCALIBRATED, describe_or_refuse
from qdq.systems.records import LayerVerdict, TensorVerdict, Transfer
from qdq.systems.sites import Site, find_sites
from qdq.systems.transfer import measure_conversion, transfer
from qdq.systems.unwrap import Unwrapped, unwrap

_AFTER_LOADING = " (if its weight was replaced before it was saved, call unpack_grids)"


def to_tensorrt(model: nn.Module, *, convert: bool = False) -> Transfer:
    """Turn a model of any number system into swapped layers with ranges, in place.

    Then `export_onnx`, `check_onnx` and `build_engine` do what they always do. A layer whose weight is quantized and
    whose input is not gets an input quantizer without a range, which `calibrate_inputs` computes. A layer whose weight
    is float stays float, and one that is int8 already stays as it is. A range of fewer codes than int8 gets a Clip
    before its Q.

    Args:
        model: A calibrated model, in evaluation mode.
        convert: Also take tensors with a zero point or with codes that int8 lacks, which get new symmetric ranges.

    Returns:
        The verdicts.

    Raises:
        ArgumentTypeError: Not a module.
        ExportError: Tensors that do not fit or are not calibrated, or layers that cannot be replaced; the message names
            all of them, and the model does not change.
        StateError: A module of another tool has not run, see `unwrap`.
        UnsupportedError: As for `sites.find_sites`.
    """
    require_model(model)
    with evaluating(model):  # some systems draw at random in training
        unwrapped = unwrap(model)
        try:
            return _transfer(model, convert, unwrapped)
        except Exception:
            unwrapped.undo()
            raise


def _transfer(model: nn.Module, convert: bool, unwrapped: Unwrapped) -> Transfer:
    layout = find_sites(model)
    verdicts = {site.name: judge_site(site) for site in layout.sites}
    standing = {}
    judged = {site.source for site in layout.sites if site.weight is not None}
    for name, quantizer in sorted(layout.standing.items()):
        grid = describe_or_refuse(quantizer)
        is_uncalibrated = grid.obstacle.startswith(UNCALIBRATED) and name not in judged
        if name in layout.needed or is_uncalibrated:
            standing[name] = judge_tensor(name, grid)
    for module, grids in unwrapped.inputs.items():
        for index, grid in grids.items():
            name = f"{module}, input {index}"
            standing[name] = judge_tensor(name, grid)
    tensors = verdicts | {name: (verdict,) for name, verdict in standing.items()}
    _require_fit(tensors, _find_obstacles(model, layout.sites), convert)
    order = [name for name, _ in model.named_modules()]
    transfer(model, layout)
    quantize_inputs(model, unwrapped)
    layers = list(layout.others)
    for site in layout.sites:
        precision = "float" if site.weight is None else "int8"
        note = unwrapped.float_reasons.get(site.name) or _note_of(site)
        layers.append(LayerVerdict(site.name, precision, verdicts[site.name], note))
    layers.sort(key=lambda layer: order.index(layer.name))
    return Transfer(tuple(layers), tuple(standing.values()), unwrapped.moved)


def _find_obstacles(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """Layer -> why it cannot become one of qdq, such as a weight that is computed."""
    names = {site.name for site in sites if site.weight is not None}
    layers = {site.layer for site in sites if site.weight is not None}
    if not layers:
        return {}
    plan = plan_swap(model, include=[lambda _, module: module in layers])
    obstacles = {}
    for planned in plan.modules:
        if planned.name in names and planned.action != "quantize":
            obstacles[planned.name] = planned.reason
    return obstacles


def _require_fit(
    verdicts: dict[str, tuple[TensorVerdict, ...]], obstacles: dict[str, str], convert: bool
) -> None:
    """Refuse all tensors that do not fit and all layers that cannot be replaced, in one error.

    Raises:
        ExportError: The message has a line for each of them.
    """
    lines = [f"{name}: {reason}" for name, reason in obstacles.items()]
    is_hopeless = bool(obstacles)
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
        return f"no number system quantizes it{_AFTER_LOADING}"
    if site.weight is None:
        return "its weight is float, and TensorRT needs both inputs of a product in int8"
    return NO_RANGE if site.input is None else ""
