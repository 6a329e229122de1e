"""The integer multiplier at its ends, and layers with ranges of zeros, against exact fractions and float networks."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from qdq.systems import QConv2d, QConvBNReLU, QLinear
from qdq.systems.integer.arithmetic import find_multiplier, rescale, shift_right
from qdq.systems.integer.restore import read_parameters

RATIOS = [
    *(1e-114, 1e-80, 1e-30, 2.0**-62, 1e-12, 2.0**-33, 2.0**-32, 2.0**-31, 3e-10, 2.0**-30),
    *(0.7, 1.0, 37.5, 2.0**30, 2.0**31, 3e9, 1e30, 1e100, 1e114),
]
SUMS = [0, 1, -1, 1000, -1000, 2**30, 2**31 - 1, -(2**31 - 1)]
CODE = 2**16  # beyond all codes


def clamp(number):
    return max(-CODE, min(CODE, number))


@pytest.mark.parametrize("is_integer", [True, False])
@pytest.mark.parametrize("ratio", RATIOS)
def test_any_multiplier_gives_the_code_of_exact_fractions(ratio, is_integer):
    sums = torch.tensor([SUMS])
    result = rescale(
        sums, torch.tensor(ratio, dtype=torch.float64), is_shared=False, is_integer=is_integer
    )
    for total, code in zip(SUMS, result.tolist(), strict=True):
        exact = Fraction(ratio) * total
        nearest = math.floor(exact + Fraction(1, 2))
        is_tie = abs(exact - math.floor(exact) - Fraction(1, 2)) < Fraction(1, 1000)
        assert abs(clamp(code) - clamp(nearest)) <= is_tie


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_multiplier_has_31_bits_at_any_size(ratio):
    multiplier, shift = find_multiplier(torch.tensor(ratio, dtype=torch.float64))
    assert 2**30 <= int(multiplier) < 2**31
    exact = Fraction(int(multiplier)) / 2**31 * Fraction(2) ** -int(shift)
    assert abs(exact / Fraction(ratio) - 1) < Fraction(1, 2**30)


def test_multipliers_with_one_shift_lose_only_what_is_below_the_largest():
    ratios = torch.tensor([1e100, 1e99, 1.0, 1e-100], dtype=torch.float64)
    multiplier, shift = find_multiplier(ratios, is_shared=True)
    assert shift.dim() == 0 and multiplier[2:].tolist() == [0, 0]
    expected = Fraction(1e99) / Fraction(1e100)
    assert Fraction(int(multiplier[1]), int(multiplier[0])) == pytest.approx(expected, rel=1e-8)


def test_shifts_of_any_size():
    products = torch.tensor([2**62 - 1, 2**61, -(2**62) + 1, 3])
    for shift in (1, 2, 31, 61, 62, 63, 64, 200):
        expected = [
            math.floor(Fraction(int(product), 2**shift) + Fraction(1, 2)) for product in products
        ]
        assert shift_right(products, torch.tensor(shift)).tolist() == expected
    for shift in (1, 31, 62, 63, 200):
        expected = [max(-(2**62), min(2**62, int(product) << shift)) for product in products]
        result = shift_right(products, torch.tensor(-shift)).tolist()
        assert [clamp(code) for code in result] == [clamp(code) for code in expected]


def check_codes(layer, x):
    """Codes of the frozen layer within one of those of the calibrated one.

    Args:
        layer: A layer that is not calibrated.
        x: Its input.
    """
    layer.eval()
    with torch.no_grad():
        values = layer(x)
        expected = layer.qo.quantize_tensor(values)
        layer.freeze()
        codes = layer.quantize_inference(layer.qi.quantize_tensor(x))
        assert (codes - expected).abs().max() <= 1


@pytest.mark.parametrize(
    "options", [{}, {"axis": 0}, {"axis": 0, "groups": 2}, {"axis": 1}, {"axis": 1, "groups": 2}]
)
@pytest.mark.parametrize("zeros", ["all", "outputs", "inputs"])
def test_weights_of_zeros_keep_their_bias(options, zeros, caplog):
    """Their scale is 1 by definition: multiples of Sw * Sx would be far apart for a bias."""
    float_layer = nn.Linear(4, 6)
    with torch.no_grad():
        float_layer.weight /= 1000
        float_layer.bias.copy_(torch.tensor([0.01, 0.3333, 0.2, -0.123, 0.05, 0.15]))
        place = {"all": ..., "outputs": slice(2, 4), "inputs": (slice(None), slice(2, 4))}[zeros]
        float_layer.weight[place] = 0
        if zeros == "outputs":
            float_layer.weight[:3] = 0  # one of two groups
    layer = QLinear(copy.deepcopy(float_layer), **options)
    check_codes(layer, torch.randn(50, 4) * 100)
    assert caplog.text == ""
    weight, bias = read_parameters(layer)
    step = float(layer.qo.scale)
    torch.testing.assert_close(bias, float_layer.bias.detach(), rtol=0, atol=step)
    assert not weight[float_layer.weight == 0].any()
    loaded = QLinear(nn.Linear(4, 6), **options)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(read_parameters(loaded)[1], bias)


def test_a_channel_that_batchnorm_switched_off_keeps_its_bias():
    batchnorm = nn.BatchNorm2d(3)
    with torch.no_grad():
        batchnorm.weight[1] = 0
        batchnorm.weight *= 1e-4
        batchnorm.bias.copy_(torch.tensor([0.1, 0.3333, 0.2]))
    layer = QConvBNReLU(nn.Conv2d(2, 3, 3), batchnorm, axis=0)
    check_codes(layer, torch.randn(4, 2, 6, 6) * 1000)


def test_zeros_everywhere():
    layer = QConv2d(nn.Conv2d(2, 3, 3, bias=False))
    nn.init.zeros_(layer.conv_module.weight)
    check_codes(layer, torch.zeros(1, 2, 4, 4))


def test_a_bias_that_is_rounded_by_more_than_a_code_is_reported(caplog):
    """An input of zeros has the scale 1, and the output has the range of the bias alone."""
    layer = QLinear(nn.Linear(4, 3))
    with torch.no_grad():
        layer.fc_module.weight.copy_(torch.linspace(-50, 50, 12).reshape(3, 4))
        layer.fc_module.bias.copy_(torch.tensor([0.01, 0.3333, 0.2]))
        layer(torch.zeros(5, 4))
    layer.freeze()
    ratio = float(layer.qw.scale * layer.qi.scale / layer.qo.scale)
    assert ratio > 200
    assert f"QLinear of {layer.fc_module}: M is {ratio:.4g}, so 3 of 3 biases" in caplog.text


def test_biases_that_saturate_are_reported_for_the_layer(caplog):
    layer = QLinear(nn.Linear(4, 3))
    with torch.no_grad():
        layer.fc_module.weight /= 1e9
        layer.fc_module.bias.copy_(torch.tensor([1.0, -2.0, 0.0]))
        layer(torch.randn(5, 4))
    layer.freeze()
    assert f"QLinear of {layer.fc_module}: 2 of 3 bias codes do not fit int32" in caplog.text
    assert layer.fc_module.bias.tolist() == [2**31 - 1, -(2**31), 0]
