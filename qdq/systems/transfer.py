"""Puts the quantizers of qdq in the place of those of a number system, with the same values where they fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.device import find_device
from qdq.metrics import sqnr_db
from qdq.observers.max import reduce_amax
from qdq.quantize import fake_quantize
from qdq.quantizer import QuantDescriptor, TensorQuantizer
from qdq.swap import swap_modules, switch_fast_paths
from qdq.systems.grid import INT8_HIGHEST, INT8_LOWEST, Grid
from qdq.systems.integer.restore import restore_float
from qdq.systems.integer.weighted import QWeighted
from qdq.systems.layer import SystemLayer, restore_layer
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.sites import Layout, Site

CALIBRATION_CALL = "qdq.systems.calibrate_inputs"
"""What computes missing ranges, and keeps those of the number system."""

_SAMPLES = 10_001  # evenly spread over a range, to compare two grids


class PreparedQuantizer(TensorQuantizer):
    """A quantizer of int8 behind an ordinary operation, which gives it values of the system.

    Args:
        quant_desc: The format and the range.
        prepare: The operation: a clamp to a shorter range of codes, or a sign.
    """

    def __init__(self, quant_desc: QuantDescriptor, prepare: nn.Module) -> None:
        super().__init__(quant_desc)
        self.prepare = prepare

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As `TensorQuantizer`, after the operation."""
        if self.is_enabled and self.is_quantizing:
            inputs = self.prepare(inputs)
        return super().forward(inputs)


def transfer(model: nn.Module, layout: Layout) -> None:
    """Replace all quantizers of a model, in place.

    Args:
        model: A model whose verdicts allow it.
        layout: Its layers and quantizers.
    """
    if any(isinstance(module, QWeighted) for module in model.modules()):
        restore_float(model)
    sites = [site for site in layout.sites if site.weight is not None]
    input_systems = {}
    for site in layout.sites:
        if isinstance(site.layer, SystemLayer):
            input_systems[site.name] = site.layer.input_system
            _keep_weight(site)
            _keep_bias(site.layer)
            restore_layer(site.layer)
    if sites:
        layers = {site.layer for site in sites}
        swap_modules(model, include=[lambda _, module: module in layers])
    for site in sites:
        layer: Any = site.layer
        for quantizer in (layer._weight_quantizer, layer._input_quantizer):
            quantizer.calibration_call = CALIBRATION_CALL
        layer._weight_quantizer.amax = _weight_range(site.weight, site.values)
        if site.input is not None:
            system = input_systems.get(site.name)
            layer._input_quantizer = make_quantizer(site.input, system).to(layer.weight.device)
    _replace_standing(model, layout)
    switch_fast_paths(model)


def _replace_standing(model: nn.Module, layout: Layout) -> None:
    """Replace the quantizers between layers, at all their names: one that is used twice has several."""
    device = find_device(model)
    names = list(model.named_modules(remove_duplicate=False))
    for name, quantizer in layout.standing.items():
        replacement: nn.Module = nn.Identity()
        if name in layout.needed:
            replacement = make_quantizer(quantizer.describe(None), quantizer).to(device)
        for alias, module in names:
            if module is quantizer:
                model.set_submodule(alias, replacement)


def is_convertible(grid: Grid) -> bool:
    """Whether a grid needs another range for int8."""
    is_symmetric = not bool((grid.zero_point != 0).any())
    return not is_symmetric or grid.lowest < INT8_LOWEST or grid.highest > INT8_HIGHEST


@torch.no_grad()
def _keep_weight(site: Site) -> None:
    """Replace the float weight by its quantized values, if int8 has them; otherwise by those that are rounded."""
    layer: Any = site.layer
    if site.weight is None or layer.weight_system is None:
        return
    system = layer.weight_system
    exported = system.transform if is_convertible(site.weight) else system
    layer.weight.copy_(exported(layer.weight))
    site.values = layer.weight.detach()


@torch.no_grad()
def _keep_bias(layer: SystemLayer) -> None:
    """Replace the float bias by its quantized values: TensorRT adds it in float."""
    if layer.bias_system is not None and layer.bias is not None:
        layer.bias.copy_(layer.bias_system(layer.bias))


def _weight_range(grid: Grid | None, weight: torch.Tensor) -> torch.Tensor:
    """Amax of each output channel, `[C, 1, ...]`."""
    assert grid is not None  # noqa: S101  # the caller has chosen such layers
    if is_convertible(grid):
        return reduce_amax(weight, 0)
    shape = [-1] + [1] * (weight.dim() - 1)
    scale = grid.scale.to(weight.device).float().flatten().expand(weight.shape[0])
    return (scale * INT8_HIGHEST).reshape(shape)


def _input_range(grid: Grid) -> float:
    """Amax of a tensor with one scale."""
    if not is_convertible(grid):
        return float(grid.scale) * INT8_HIGHEST
    if grid.amax is not None:
        return float(grid.amax.max())
    return max(map(abs, _find_ends(grid)))


def _find_ends(grid: Grid) -> tuple[float, float]:
    """The smallest and the largest value."""
    scale = float(grid.scale.max())
    zero_point = float(grid.zero_point.flatten()[0])
    return scale * (grid.lowest - zero_point), scale * (grid.highest - zero_point)


def make_quantizer(grid: Grid, system: SystemQuantizer | None) -> TensorQuantizer:
    """The quantizer of an activation.

    Args:
        grid: Its grid, with one scale.
        system: The quantizer of the system; it stays as an ordinary operation where the grid is taken on request only.
    """
    desc = QuantDescriptor(amax=_input_range(grid))
    is_shorter = grid.lowest > INT8_LOWEST or grid.highest < INT8_HIGHEST
    quantizer = TensorQuantizer(desc)
    if grid.on_request and system is not None:
        quantizer = PreparedQuantizer(desc, system)
    elif is_shorter and not is_convertible(grid):
        quantizer = PreparedQuantizer(desc, nn.Hardtanh(*_find_ends(grid)))
    quantizer.calibration_call = CALIBRATION_CALL
    return quantizer


def measure_conversion(grid: Grid, site: Site | None) -> tuple[float, float]:
    """SQNR in dB before and after a conversion.

    Args:
        grid: The grid of the system.
        site: The layer whose weight has the grid; None for an activation, for which values spread evenly over the grid
            stand.
    """
    if site is None:
        return _measure_activation(grid)
    layer: Any = site.layer
    weight = site.values.float()
    before = weight
    if isinstance(layer, SystemLayer) and layer.weight_system is not None:
        before = layer.weight_system(site.values).detach().float()
        weight = layer.weight_system.transform(site.values).detach().float()
    exported = weight if is_convertible(grid) else before
    after = fake_quantize(exported, _weight_range(grid, weight), axis=0)
    return _sqnr(weight, before), _sqnr(weight, after)


def _measure_activation(grid: Grid) -> tuple[float, float]:
    low, high = _find_ends(grid)
    values = torch.linspace(low, high, _SAMPLES)
    scale = grid.scale.float().cpu().reshape(-1)[0]
    zero_point = grid.zero_point.float().cpu().reshape(-1)[0]
    codes = (values / scale + zero_point).round().clamp(grid.lowest, grid.highest)
    after = fake_quantize(values, torch.tensor(_input_range(grid)))
    return _sqnr(values, (codes - zero_point) * scale), _sqnr(values, after)


def _sqnr(expected: torch.Tensor, values: torch.Tensor) -> float:
    return sqnr_db(_to_array(expected), _to_array(values))


def _to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.reshape(1, -1).cpu().numpy()
    return array
