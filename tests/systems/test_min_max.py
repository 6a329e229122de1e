"""Min-max against its formula in float64."""

import numpy as np
import pytest
import torch

from qdq.systems import min_max_quantize
from qdq.systems.min_max import describe_min_max


def formula(values, bits):
    x = values.double().numpy()
    lo, hi, n = x.min(), x.max(), 2**bits - 1
    return np.floor((x - lo) / (hi - lo) * n + 0.5) / n * (hi - lo) + lo


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
def test_formula(bits):
    values = torch.randn(1000, dtype=torch.float64) + 0.7
    assert np.allclose(min_max_quantize(values, bits).numpy(), formula(values, bits), 1e-12, 1e-12)


def test_ends_stay():
    values = torch.randn(50)
    result = min_max_quantize(values, 3)
    assert result.min() == values.min() and result.max() == values.max()


def test_equal_values_stay():
    values = torch.full((3,), 0.3)
    assert torch.equal(min_max_quantize(values, 8), values)


def test_one_bit_has_the_two_ends():
    assert min_max_quantize(torch.tensor([-2.0, -0.6, 0.9, 3.0]), 1).tolist() == [-2, -2, 3, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid(bits):
    values = torch.randn(500) + 0.5
    grid = describe_min_max(values, bits)
    scale = (values.max() - values.min()).item() / (2**bits - 1)
    assert grid.scale.item() == pytest.approx(scale)
    assert grid.zero_point.item() == round(-values.min().item() / scale)
    assert (grid.lowest, grid.highest, grid.obstacle) == (0, 2**bits - 1, "")
    assert grid.amax.item() == values.abs().max().item()
    # Values of the rounded zero point are at most half a step away.
    codes = (values / grid.scale + grid.zero_point).round().clamp(grid.lowest, grid.highest)
    on_grid = grid.scale * (codes - grid.zero_point)
    assert (on_grid - min_max_quantize(values, bits)).abs().max() <= 1.01 * scale


def test_grid_without_a_whole_zero_point_is_not_symmetric():
    grid = describe_min_max(torch.tensor([0.001, 1.0]), 7)
    assert grid.zero_point.item() != 0


def test_grid_from_zero_is_symmetric():
    grid = describe_min_max(torch.tensor([0.0, 0.3, 1.0]), 7)
    assert (grid.zero_point.item(), grid.highest) == (0, 127)


@pytest.mark.parametrize("value", [0.3, -0.3, 0.0])
def test_grid_of_equal_values(value):
    grid = describe_min_max(torch.full((4,), value), 8)
    assert grid.zero_point.item() == 0 and grid.scale.item() > 0
    assert grid.lowest == grid.highest
    assert grid.scale.item() * grid.lowest == pytest.approx(value)


def test_wide_codes_cannot_be_int8():
    assert describe_min_max(torch.randn(9), 16).obstacle == "16 bits"
