"""Several binary bases against numpy's least squares."""

import numpy as np
import pytest
import torch
from torch import nn

from qdq.errors import ArgumentError
from qdq.systems import BinaryBases, fit_bases, split_bases
from qdq.systems.grid import find_grid
from qdq.systems.layer import convert_layer


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_bases_and_factors_are_those_of_least_squares(count):
    weight = torch.randn(4, 3, 3, 3)
    factors, bases = fit_bases(weight, count)
    values = weight.numpy().astype(np.float64).ravel()
    shifts = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    columns = [np.where(values - values.mean() + u * values.std() >= 0, 1, -1) for u in shifts]
    assert np.array_equal(bases.flatten(1).numpy(), np.stack(columns))
    expected, *_ = np.linalg.lstsq(np.stack(columns, 1), values, rcond=None)
    assert np.allclose(factors.numpy(), expected, atol=1e-6)


def test_more_bases_are_nearer_and_equal_bases_have_a_solution():
    weight = torch.randn(8, 40)
    errors = [float((BinaryBases("w", count)(weight) - weight).norm()) for count in (1, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    constant = torch.full((2, 3), -0.5)
    assert torch.allclose(BinaryBases("w", 3)(constant), constant)
    assert torch.allclose(BinaryBases("w", 2)(constant[:1, :1]), constant[:1, :1])


def test_the_gradient_passes_everywhere():
    weight = (3 * torch.randn(4, 5)).requires_grad_()
    BinaryBases("w", 2)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 5))


def test_the_sum_is_converted_on_request_and_each_base_is_exact():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))
    for name in ("0", "2"):
        convert_layer(model.get_submodule(name), BinaryBases(name, 3))
    layer = model[0]
    grid = layer.weight_system.describe(layer.weight)
    assert "sum of 3 binary bases" in grid.on_request
    assert (
        float(layer.weight_system(layer.weight).detach().abs().max()) <= float(grid.amax) * 1.000001
    )
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    split_bases(model)
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert [part.bias is None for part in model[0].layers] == [False, True, True]
    for part in [*model[0].layers, *model[2].layers]:
        grid = find_grid(part, "weight")
        codes = part.weight / grid.scale
        assert sorted(codes.unique().tolist()) == [-1, 1]
        assert (grid.lowest, grid.highest, grid.on_request) == (-1, 1, "")


def test_no_base_is_refused():
    with pytest.raises(ArgumentError, match="conv: the number of bases is 0"):
        BinaryBases("conv", 0)(torch.ones(2, 2))
