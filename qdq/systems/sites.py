"""Where a model is quantized: each convolution and linear layer with the grids of its weight and of its input.

The grid of an input is that of the quantizer in the layer, or of the nearest one before it, if all between them keeps
its values on the grid: ReLU, max pooling, reshaping. torch.fx says what is before a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qdq.errors import UnsupportedError
from qdq.systems.grid import Grid, describe_moving, find_grid
from qdq.systems.integer.functions import QSigmoid
from qdq.systems.integer.module import QModule
from qdq.systems.integer.restore import read_parameters
from qdq.systems.integer.weighted import QWeighted
from qdq.systems.layer import SystemLayer
from qdq.systems.others import list_others
from qdq.systems.quantizer import SystemQuantizer, describe_or_refuse
from qdq.systems.records import LayerVerdict
from qdq.systems.sources import find_sources, find_standing
from qdq.systems.tracing import WEIGHTED

_CODE_TOLERANCE = 1e-3  # float32 values are this near to an integer multiple of their scale


@dataclass
class Site:
    """One layer with products.

    Args:
        name: Dotted name.
        layer: The layer.
        values: Its float weight; of a layer that computes with integers, the values of its codes.
        weight: Grid of its weight; None: the weight is float.
        input: Grid of its input; None: the input is float.
        source: Name of the quantizer before it that gives `input`; "" if the layer has it, or there is none.
    """

    name: str
    layer: nn.Module
    values: torch.Tensor
    weight: Grid | None
    input: Grid | None
    source: str = ""


@dataclass
class Layout:
    """The quantized places of a model.

    Args:
        sites: The layers, in the order of `named_modules`.
        standing: Name -> quantizer that stands between layers.
        needed: Names of the standing quantizers whose values also reach something else than the layers they are the
            source of, such as a sum or an output.
        others: The verdicts on the layers that stay as they are, in the order of `named_modules`.
    """

    sites: list[Site] = field(default_factory=list)
    standing: dict[str, SystemQuantizer] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    others: list[LayerVerdict] = field(default_factory=list)


def find_sites(model: nn.Module) -> Layout:
    """Find the layers and quantizers of a model of any number system.

    Raises:
        UnsupportedError: Quantizers stand between layers, and torch.fx cannot trace the model.
    """
    _require_layers_outside(model)
    layout = Layout(standing=find_standing(model))
    before, layout.needed = find_sources(model, layout.standing)
    frozen = {module.layer: module for module in model.modules() if isinstance(module, QWeighted)}
    layout.others = list_others(model)
    other_names = {verdict.name for verdict in layout.others}
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED) or name in other_names:
            continue
        site = _make_site(name, module, frozen.get(module))
        if site.input is None and name in before:
            site.source = before[name]
            site.input = describe_or_refuse(layout.standing[site.source])
        layout.sites.append(site)
    _refuse_other_grids_of_one_weight(layout.sites)
    if any(isinstance(module, QSigmoid) for module in model.modules()):
        _mark_table(layout.sites)
    return layout


def _require_layers_outside(model: nn.Module) -> None:
    """Refuse integer layers whose float layer is nowhere else in the model: nothing would be left of them.

    Raises:
        UnsupportedError: It is such a model.
    """
    outside: set[nn.Module] = set()
    inside = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, QModule)
    )
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(inside):
            outside.add(module)
    for name, module in model.named_modules():
        if isinstance(module, QWeighted) and module.layer not in outside:
            raise UnsupportedError(
                f"the float layer of {name} is nowhere else in the model.",
                "write a network that has its float layers, with a forward in float, beside the integer ones.",
            )


def _refuse_other_grids_of_one_weight(sites: list[Site]) -> None:
    """Give layers that share one parameter an obstacle, unless its grid is the same in all of them."""
    sharing: dict[int, list[Site]] = {}
    for site in sites:
        sharing.setdefault(id(site.layer.weight), []).append(site)
    for group in sharing.values():
        if all(_are_equal(group[0].weight, site.weight) for site in group[1:]):
            continue
        for site in group:
            if site.weight is not None:
                obstacle = "are those of another layer, too, which has another grid"
                site.weight = replace(site.weight, obstacle=obstacle)


def _are_equal(first: Grid | None, second: Grid | None) -> bool:
    if first is None or second is None:
        return first is second
    codes = (first.lowest, first.highest) == (second.lowest, second.highest)
    return (
        codes
        and torch.equal(first.scale, second.scale)
        and torch.equal(first.zero_point, second.zero_point)
    )


def _mark_table(sites: list[Site]) -> None:
    """The float layers have the exact sigmoid where the integer layers have a table."""
    for site in sites:
        if site.input is not None:
            reason = "are in a network with a sigmoid from a table, which is exact in the export"
            site.input = replace(site.input, on_request=reason)


def _make_site(name: str, layer: Any, integer_layer: QWeighted | None) -> Site:
    """One layer; of an integer layer, the float layer that it was made of."""
    values = layer.weight.detach()
    if integer_layer is None:
        return Site(name, layer, values, _grid_of_weight(layer), _grid_of_input(layer))
    if not integer_layer.is_frozen:
        obstacle = "not frozen: calibrate and freeze the network first"
        return Site(name, layer, values, describe_moving("affine", 8, obstacle), None)
    grids = integer_layer.grids()
    values, _ = read_parameters(integer_layer)
    return Site(name, layer, values, grids["weight"], grids["input"])


def _grid_of_weight(layer: Any) -> Grid | None:
    weight = layer.weight.detach()
    system = layer.weight_system if isinstance(layer, SystemLayer) else None
    grid = find_grid(layer, "weight")
    if system is None and grid is None:
        return None
    num_bad = int((~torch.isfinite(weight)).sum())
    if num_bad:
        name = type(system).__name__ if grid is None else grid.system
        return describe_moving(name, 8, f"{num_bad} of {weight.numel()} values are not finite")
    if system is not None:
        return describe_or_refuse(system, weight)
    assert grid is not None  # noqa: S101
    if not grid.obstacle and not _has_values_of(
        grid, weight
    ):  # after training, or with other weights loaded
        return replace(grid, obstacle="have other values than when they were quantized")
    return grid


def _has_values_of(grid: Grid, values: torch.Tensor) -> bool:
    """Whether a tensor is on a grid; a grid with a zero point may be an approximation, and is not asked."""
    if bool((grid.zero_point != 0).any()) or grid.on_request:
        return True
    shape = [-1] + [1] * (values.dim() - 1)
    codes = values.double() / grid.scale.to(values.device).double().reshape(shape)
    is_near = (codes - codes.round()).abs() < _CODE_TOLERANCE
    is_inside = (codes.round() >= grid.lowest) & (codes.round() <= grid.highest)
    return bool((is_near & is_inside).all())


def _grid_of_input(layer: nn.Module) -> Grid | None:
    if isinstance(layer, SystemLayer) and layer.input_system is not None:
        return describe_or_refuse(layer.input_system)
    return find_grid(layer, "input")
