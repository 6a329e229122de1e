"""Where a model is quantized: each convolution and linear layer with the grids of its weight and of its input.

The grid of an input is that of the quantizer in the layer, or of the nearest one before it, if all between them keeps
its values on the grid: ReLU, max pooling, reshaping. torch.fx says what is before a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from qdq.errors import UnsupportedError
from qdq.forward import name_function
from qdq.functions import COPIES, FUNCTIONS, MAX_POOLINGS
from qdq.systems.grid import Grid, find_grid
from qdq.systems.integer_restore import read_parameters
from qdq.systems.integer_weighted import QWeighted
from qdq.systems.layer import SystemLayer, SystemQuantizer

_CODE_TOLERANCE = 1e-3  # float32 values are this near to an integer multiple of their scale
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


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
    """

    sites: list[Site] = field(default_factory=list)
    standing: dict[str, SystemQuantizer] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)


def find_sites(model: nn.Module) -> Layout:
    """Find the layers and quantizers of a model of any number system.

    Raises:
        UnsupportedError: Quantizers stand between layers, and torch.fx cannot trace the model.
        StateError: A quantizer is not calibrated.
    """
    layout = Layout(standing=_find_standing(model))
    graph = _trace(model) if layout.standing else None
    layout.needed = set(layout.standing)
    frozen = {module.layer: module for module in model.modules() if isinstance(module, QWeighted)}
    before = {} if graph is None else _find_sources(model, graph, layout)
    for name, module in model.named_modules():
        if not isinstance(module, _WEIGHTED):
            continue
        site = _make_site(name, module, frozen.get(module))
        if site.input is None and name in before:
            site.source = before[name]
            site.input = layout.standing[site.source].describe(None)
        layout.sites.append(site)
    return layout


def _make_site(name: str, layer: Any, integer_layer: QWeighted | None) -> Site:
    """One layer; of an integer layer, the float layer that it was made of.

    Raises:
        StateError: The integer layer is not frozen.
    """
    if integer_layer is None:
        values = layer.weight.detach()
        return Site(name, layer, values, _grid_of_weight(layer), _grid_of_input(layer))
    integer_layer.require_frozen()
    grids = integer_layer.grids()
    values, _ = read_parameters(integer_layer)
    return Site(name, layer, values, grids["weight"], grids["input"])


def _grid_of_weight(layer: Any) -> Grid | None:
    if isinstance(layer, SystemLayer) and layer.weight_system is not None:
        return layer.weight_system.describe(layer.weight)
    grid = find_grid(layer, "weight")
    if grid is not None and not _has_values_of(grid, layer.weight.detach()):
        # After training, or with other weights loaded.
        obstacle = "have other values than when they were quantized"
        return replace(grid, obstacle=obstacle)
    return grid


def _has_values_of(grid: Grid, values: torch.Tensor) -> bool:
    """Whether a tensor is on a grid; a grid with a zero point may be an approximation, and is not asked."""
    if bool((grid.zero_point != 0).any()) or grid.on_request:
        return True
    shape = [-1] + [1] * (values.dim() - 1)
    codes = values.double() / grid.scale.double().reshape(shape)
    is_near = (codes - codes.round()).abs() < _CODE_TOLERANCE
    is_inside = (codes.round() >= grid.lowest) & (codes.round() <= grid.highest)
    return bool((is_near & is_inside).all())


def _grid_of_input(layer: nn.Module) -> Grid | None:
    if isinstance(layer, SystemLayer) and layer.input_system is not None:
        return layer.input_system.describe(None)
    return find_grid(layer, "input")


def _find_standing(model: nn.Module) -> dict[str, SystemQuantizer]:
    """The quantizers that belong to no layer, by dotted name."""
    in_layers: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, SystemLayer):
            in_layers.update(module.children())
    standing = {}
    for name, module in model.named_modules():
        if isinstance(module, SystemQuantizer) and module not in in_layers:
            standing[name] = module
    return standing


class _Tracer(fx.Tracer):
    """Sees layers, normalizations and quantizers as modules, and everything else as functions."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(module, (*_WEIGHTED, _NormBase, SystemQuantizer))


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:
        raise UnsupportedError(
            f"quantizers stand between the layers, and torch.fx cannot say between which: {error}",
            "write the forward without branches on values and sizes, or make the quantizers parts of the layers.",
        ) from error


def _find_sources(model: nn.Module, graph: fx.Graph, layout: Layout) -> dict[str, str]:
    """Layer -> the quantizer before it; takes the quantizers that nothing else reads out of `layout.needed`."""
    sources: dict[str, set[str]] = {}
    needed = set()
    for node in graph.nodes:
        quantizer = str(node.target)
        if node.op != "call_module" or quantizer not in layout.standing:
            continue
        grid = layout.standing[quantizer].describe(None)
        for reader in _list_readers(node, grid):
            if _is_layer(model, reader):
                sources.setdefault(str(reader.target), set()).add(quantizer)
            else:
                needed.add(quantizer)
    # A layer that is called twice with different grids has no grid.
    for layer, quantizers in list(sources.items()):
        if len(quantizers) > 1 or _count_calls(graph, layer) > 1:
            needed.update(quantizers)
            del sources[layer]
    layout.needed = needed
    return {layer: quantizers.pop() for layer, quantizers in sources.items()}


def _is_layer(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _WEIGHTED)


def _count_calls(graph: fx.Graph, layer: str) -> int:
    return sum(node.op == "call_module" and node.target == layer for node in graph.nodes)


def _list_readers(node: fx.Node, grid: Grid) -> list[fx.Node]:
    """The nodes that read values of a grid, also through functions that keep values on it."""
    readers = []
    for user in node.users:
        if _keeps_grid(user, grid):
            readers += _list_readers(user, grid)
        else:
            readers.append(user)
    return readers


def _keeps_grid(node: fx.Node, grid: Grid) -> bool:
    """Whether a function returns values of the grid that it was given."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return False
    name = name_function(node.target) if callable(node.target) else str(node.target).strip("_")
    if name in COPIES or name in MAX_POOLINGS:
        return True
    function = FUNCTIONS.get(name)
    if function is None or function.clamp is None:
        return False
    low, high = function.clamp.low, function.clamp.high
    names = function.clamp.parameters
    if names:
        low, high = _read_bounds(node, names, (low, high))
    return _is_on_grid(low, grid) and _is_on_grid(high, grid)


def _read_bounds(
    node: fx.Node, names: tuple[str, ...], defaults: tuple[float, float]
) -> tuple[float, float]:
    """The bounds of a clamp: its second and third argument, or those with these names."""
    bounds = []
    for position, (name, default) in enumerate(zip(names, defaults, strict=True), start=1):
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        bounds.append(float(value) if isinstance(value, int | float) else default)
    return bounds[0], bounds[1]


def _is_on_grid(bound: float, grid: Grid) -> bool:
    if bound in (float("inf"), float("-inf")):
        return True
    if grid.scale.numel() > 1:
        return bound == 0
    code = torch.tensor(bound, dtype=torch.float64) / grid.scale.double().cpu().reshape(())
    return bool(code == code.round())
