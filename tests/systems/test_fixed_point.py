"""Fixed point against brute force over all codes, exact fractions and closed forms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from qdq.systems import compute_integral_part, linear_quantize, sign_quantize
from qdq.systems.arithmetic import pass_gradient, round_half_up
from qdq.systems.fixed_point import describe_linear, describe_sign


@pytest.mark.parametrize("value", [0.5, -0.5, 1.5, -1.5, 0.49999997, -0.49999997, 8388609.0, -1e-9])
def test_half_up_is_exact(value):
    exact = math.floor(Fraction(float(torch.tensor(value))) + Fraction(1, 2))
    assert round_half_up(torch.tensor([value])).tolist() == [exact]


def test_gradient_leaves_values_exact():
    values = torch.tensor([1e-3, 0.3, -7.7], requires_grad=True)
    quantized = torch.tensor([1.0, 1.0, -1.0])
    result = pass_gradient(values, quantized)
    assert torch.equal(result, quantized)
    result.sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("sf", [-3, 0, 5])
def test_nearest_code_of_all(bits, sf):
    values = torch.randn(200) * 2.0 ** (bits - 1 - sf)
    step = 2.0**-sf
    levels = step * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float64)
    distances = np.abs(values.double().numpy()[:, None] - levels)
    expected = levels[distances.argmin(1)]
    assert np.array_equal(linear_quantize(values, sf, bits).double().numpy(), expected)


def test_ties_go_up():
    values = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    assert linear_quantize(values, 0, 8).tolist() == [-1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_integral_part_is_the_smallest_that_covers(rate, scale):
    values = torch.randn(997) * scale
    magnitudes = sorted(values.abs().double().tolist(), reverse=True)
    covered = magnitudes[int(rate * 997)] + 1e-12
    expected = next(power for power in range(-40, 40) if covered <= 2.0**power)
    assert compute_integral_part(values, rate) == expected


def test_a_power_of_two_gets_one_more_bit():
    values = torch.tensor([1.0, -0.3])
    sf = 8 - 1 - compute_integral_part(values)
    assert sf == 6
    assert linear_quantize(values, sf, 8)[0] == 1.0  # with sf 7 it would be 127/128


def test_all_zero():
    zeros = torch.zeros(3)
    assert compute_integral_part(zeros) == -39
    assert linear_quantize(zeros, 8 - 1 + 39, 8).tolist() == [0.0, 0.0, 0.0]
    assert sign_quantize(zeros).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [1.0, 1, -0.1, 2, float("nan"), "many"])
def test_rates_that_are_refused(rate):
    with pytest.raises(ValueError, match="overflow_rate is"):
        compute_integral_part(torch.ones(3), rate)


def test_a_rate_just_below_one():
    assert compute_integral_part(torch.tensor([1.0, 8.0]), 1 - 2**-53) == 1


@pytest.mark.parametrize("sf", [0.5, 127, -128, float("inf"), None, "3"])
def test_sf_that_is_refused(sf):
    with pytest.raises(ValueError, match="linear_quantize: sf is"):
        linear_quantize(torch.ones(3), sf, 8)


def test_sf_as_a_float():
    assert linear_quantize(torch.tensor([0.3]), 2.0, 8).tolist() == [0.25]


@pytest.mark.parametrize("bits", [2, 8, 16, 17, 24, 32])
def test_extreme_values_saturate(bits):
    limit = torch.finfo(torch.float32).max
    values = torch.tensor([-limit, -1.0, 1e-45, limit])
    for sf in (-127, -100, 0, 100, 126):
        result = linear_quantize(values, sf, bits)
        assert bool(torch.isfinite(result).all())
        assert result[0] <= result[1] <= result[2] <= result[3]


def test_wide_codes_are_exact():
    values = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    exact = [math.floor(Fraction(value) * 2**31 + Fraction(1, 2)) / 2**31 for value in (0.1, 1 / 3)]
    assert linear_quantize(values, 31, 32).tolist() == exact


def test_one_bit():
    values = torch.tensor([0.5, -1.0, 0.0])
    assert linear_quantize(values, 3, 1).tolist() == [0.5, -0.5, 0.5]
    assert linear_quantize(values, 3, 1, alpha=1).tolist() == [1.0, -1.0, 1.0]
    with pytest.raises(ValueError, match="alpha is 0"):
        sign_quantize(values, alpha=0)


def test_the_mean_of_one_bit_does_not_overflow():
    result = sign_quantize(torch.full((100,), 3e38))
    torch.testing.assert_close(result, torch.full((100,), 3e38))


@pytest.mark.parametrize("bits", [2, 4, 8, 10])
def test_values_lie_on_the_grid(bits):
    values = torch.randn(500)
    sf = bits - 1 - compute_integral_part(values)
    grid = describe_linear(sf, bits)
    codes = linear_quantize(values, sf, bits) / grid.scale
    assert torch.equal(codes, codes.round())
    assert grid.lowest <= codes.min() and codes.max() <= grid.highest
    assert grid.highest - grid.lowest == 2**bits - 1
    assert grid.zero_point.item() == 0
    assert grid.obstacle == ("" if bits <= 8 else "10 bits")


def test_the_grid_of_one_bit():
    values = torch.tensor([0.5, -1.0])
    grid = describe_sign(values, "fixed point")
    assert (grid.scale.item(), grid.lowest, grid.highest) == (0.75, -1, 1)
    assert describe_sign(torch.zeros(2), "fixed point").scale.item() > 0
