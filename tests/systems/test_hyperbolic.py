"""Tanh against its formula in float64."""

import math

import numpy as np
import pytest
import torch

from qdq.systems import tanh_quantize
from qdq.systems.hyperbolic import describe_tanh


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_formula(bits):
    values = torch.randn(1000, dtype=torch.float64) * 2
    n = 2**bits - 1
    codes = np.floor((np.tanh(values.numpy()) + 1) / 2 * n + 0.5)
    levels = 2 * codes / n - 1
    levels[codes == 0] = -(1 - 1 / (2 * n))
    levels[codes == n] = 1 - 1 / (2 * n)
    assert np.allclose(tanh_quantize(values, bits).numpy(), np.arctanh(levels), 1e-9)


def test_ends_are_finite():
    result = tanh_quantize(torch.tensor([-50.0, 50.0]), 8)
    end = math.atanh(1 - 1 / 510)
    assert end == pytest.approx(3.463, abs=5e-4)
    assert result.tolist() == pytest.approx([-end, end], rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_order_stays(bits):
    values = torch.linspace(-8, 8, 999)
    assert bool((tanh_quantize(values, bits).diff() >= 0).all())


def test_one_bit_is_a_sign():
    values = torch.tensor([0.5, -1.5, 0.0])
    torch.testing.assert_close(tanh_quantize(values, 1), torch.tensor([2 / 3, -2 / 3, 2 / 3]))
    assert tanh_quantize(values, 1, alpha=1).tolist() == [1, -1, 1]


def test_no_int8_has_the_grid():
    assert "tangents" in describe_tanh(torch.randn(5), 8).obstacle
    assert describe_tanh(torch.tensor([1.0, -3.0]), 1).obstacle == ""
