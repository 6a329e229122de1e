"""What is before a layer: the quantizer between layers whose values reach it, as torch.fx shows.

ReLU, max pooling and reshaping keep values on the grid of a quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from qdq.functions import COPIES, FUNCTIONS, MAX_POOLINGS
from qdq.quantizer import named_quantizers
from qdq.systems.grid import Grid, find_grid
from qdq.systems.layer import SystemLayer
from qdq.systems.quantizer import SystemQuantizer, describe_or_refuse
from qdq.systems.tracing import WEIGHTED, name_of, trace


def find_standing(model: nn.Module) -> dict[str, SystemQuantizer]:
    """The quantizers that belong to no layer, by dotted name.

    Args:
        model: A model of any number system.
    """
    in_layers: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, SystemLayer):
            in_layers.update(module.modules())  # also a quantizer inside of another
    # A quantizer of qdq has kept one as an ordinary operation, see `PreparedQuantizer`.
    inside = tuple(f"{name}." for name, _ in named_quantizers(model))
    standing = {}
    for name, module in model.named_modules():
        is_standing = isinstance(module, SystemQuantizer) and module not in in_layers
        if is_standing and not name.startswith(inside):
            standing[name] = module
    return standing


def find_sources(
    model: nn.Module, standing: Mapping[str, SystemQuantizer]
) -> tuple[dict[str, str], set[str]]:
    """What the quantizers between layers feed.

    Args:
        model: A model of any number system.
        standing: As `find_standing`.

    Returns:
        Layer -> the quantizer before it, and the quantizers whose values also reach something else, such as a sum, an
        output, or a layer that quantizes its input again.

    Raises:
        UnsupportedError: torch.fx cannot trace the model.
    """
    if not standing:
        return {}, set()
    graph = trace(model)
    sources: dict[str, set[str]] = {}
    needed = set()
    for node in graph.nodes:
        quantizer = str(node.target)
        if node.op != "call_module" or quantizer not in standing:
            continue
        grid = describe_or_refuse(standing[quantizer])
        for reader in _list_readers(node, grid):
            if _takes_float(model, reader):
                sources.setdefault(str(reader.target), set()).add(quantizer)
            else:
                needed.add(quantizer)
    # A layer that is called twice with different grids has no grid.
    for layer, quantizers in list(sources.items()):
        if len(quantizers) > 1 or _count_calls(graph, layer) > 1:
            needed.update(quantizers)
            del sources[layer]
    return {layer: quantizers.pop() for layer, quantizers in sources.items()}, needed


def find_input_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """What reads the inputs of a model, also through functions that only copy or reshape.

    Args:
        model: The model.

    Returns:
        The names of layers, and those of all other readers.

    Raises:
        UnsupportedError: torch.fx cannot trace the model.
    """
    layers: dict[str, None] = {}
    others: dict[str, None] = {}
    for node in trace(model).nodes:
        if node.op != "placeholder":
            continue
        for reader in _list_readers(node, None):
            is_module = reader.op == "call_module"
            name = str(reader.target) if is_module else reader.name
            is_layer = is_module and isinstance(model.get_submodule(name), WEIGHTED)
            readers = layers if is_layer else others
            readers[name] = None
    return list(layers), list(others)


def _takes_float(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a layer that does not quantize its input itself."""
    if node.op != "call_module":
        return False
    layer = model.get_submodule(str(node.target))
    has_quantizer = isinstance(layer, SystemLayer) and layer.input_system is not None
    return isinstance(layer, WEIGHTED) and not has_quantizer and find_grid(layer, "input") is None


def _count_calls(graph: fx.Graph, layer: str) -> int:
    return sum(node.op == "call_module" and node.target == layer for node in graph.nodes)


def _list_readers(node: fx.Node, grid: Grid | None) -> list[fx.Node]:
    """The nodes that read values of a grid, also through functions that keep values on it; None: through copies."""
    readers = []
    for user in node.users:
        if "is_size" in user.meta:
            continue
        if _keeps_grid(user, grid):
            readers += _list_readers(user, grid)
        else:
            readers.append(user)
    return readers


def _keeps_grid(node: fx.Node, grid: Grid | None) -> bool:
    """Whether a function returns values of the grid that it was given."""
    if node.op not in ("call_function", "call_method"):
        return False
    inputs = node.all_input_nodes
    if sum("is_size" not in other.meta for other in inputs) != 1:
        return False
    name = name_of(node)
    if name in COPIES or name in MAX_POOLINGS:
        return True
    function = FUNCTIONS.get(name)
    if grid is None or function is None or function.clamp is None or len(inputs) != 1:
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
