"""The logarithmic functions against their formulas in float64."""

import math

import numpy as np
import pytest
import torch

from qdq.systems import compute_log_sf, log_linear_quantize, log_minmax_quantize
from qdq.systems.logarithmic import describe_log


def test_zeros_stay_and_have_no_part_in_the_range():
    values = torch.tensor([0.0, 0.5, -1.0, 2.0, 0.7])
    result = log_minmax_quantize(values, 4)
    assert result[0] == 0
    assert torch.equal(result[1:], log_minmax_quantize(values[1:], 4))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_min_max_formula(bits):
    values = torch.randn(500, dtype=torch.float64)
    logs = np.log(np.abs(values.numpy()))
    lo, hi, n = logs.min(), logs.max(), 2 ** (bits - 1) - 1
    magnitudes = np.exp(np.floor((logs - lo) / (hi - lo) * n + 0.5) / n * (hi - lo) + lo)
    expected = np.sign(values.numpy()) * magnitudes
    assert np.allclose(log_minmax_quantize(values, bits).numpy(), expected, 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_linear_formula(bits):
    values = torch.randn(500, dtype=torch.float64)
    sf = compute_log_sf(values, bits)
    logs = np.log(np.abs(values.numpy()))
    assert sf == bits - 2 - math.ceil(math.log2(np.abs(logs).max() + 1e-12))
    half = 2 ** (bits - 2)
    codes = np.floor(logs * 2.0**sf + 0.5).clip(-half, half - 1)
    expected = np.sign(values.numpy()) * np.exp(codes * 2.0**-sf)
    assert np.allclose(log_linear_quantize(values, sf, bits).numpy(), expected, 1e-9)


def test_the_calibrated_range_does_not_saturate():
    values = torch.rand(1000) * 1e-3 + 1e-5  # negative logarithms only
    result = log_linear_quantize(values, compute_log_sf(values, 8), 8)
    steps = (result.log() - values.log()).abs().max()
    assert steps <= 0.51 * 2.0 ** -compute_log_sf(values, 8)


@pytest.mark.parametrize("bits", [2, 6])
def test_magnitudes_have_one_bit_less(bits):
    values = torch.linspace(-5, 5, 4000).exp()  # every level occurs
    levels = log_minmax_quantize(values, bits).log().mul(1000).round()
    assert levels.unique().numel() == 2 ** (bits - 1)


def test_only_zeros():
    zeros = torch.zeros(4)
    assert torch.equal(log_minmax_quantize(zeros, 8), zeros)
    assert torch.equal(log_linear_quantize(zeros, compute_log_sf(zeros, 8), 8), zeros)


def test_one_bit_is_a_sign():
    values = torch.tensor([0.5, -1.5, 0.0])
    expected = torch.tensor([2 / 3, -2 / 3, 2 / 3])
    torch.testing.assert_close(log_minmax_quantize(values, 1), expected)
    torch.testing.assert_close(log_linear_quantize(values, 2, 1), expected)
    assert log_minmax_quantize(values, 1, alpha=1.0).tolist() == [1, -1, 1]


def test_no_int8_has_the_grid():
    assert "exponentials" in describe_log(torch.randn(5), 8).obstacle
    assert "exponentials" in describe_log(None, 2).obstacle
    assert describe_log(torch.tensor([1.0, -3.0]), 1).obstacle == ""
