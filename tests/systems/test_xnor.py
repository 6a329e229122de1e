"""Packed bits against the simulated convolution and brute force."""

import itertools

import pytest
import torch
from torch import nn

from qdq.systems import BinaryInput, BinaryWeight, xnor_conv2d, xnor_dot
from qdq.systems.layer import convert_layer
from qdq.systems.xnor import count_bits, pack_bits


def test_bits_are_packed_eight_a_word():
    is_set = torch.rand(3, 21) > 0.5
    words = pack_bits(is_set)
    assert words.shape == (3, 3)
    for row, packed in zip(is_set.tolist(), words.tolist(), strict=True):
        number = sum(bit << place for place, bit in enumerate(row))
        assert number == sum(word << 8 * place for place, word in enumerate(packed))
    assert count_bits(words).tolist() == is_set.sum(1).tolist()


def test_dot_products_of_all_signs_of_three_values():
    for first, second in itertools.product(itertools.product((-1.0, 1.0), repeat=3), repeat=2):
        product = sum(a * w for a, w in zip(first, second, strict=True))
        assert int(xnor_dot(torch.tensor(first), torch.tensor(second))) == product


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": (1, 2)},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "stride": 2, "groups": 2},
        {"padding": 1, "groups": 6},
    ],
)
def test_the_packed_convolution_is_the_simulated_one(options):
    layer = nn.Conv2d(6, 12, (3, 3), **options).double()
    convert_layer(layer, BinaryWeight("w"), BinaryInput("x"))
    images = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    images[0, 0, 0, 0] = 0
    sums = xnor_conv2d(images, layer.weight, **options)
    assert not sums.is_floating_point()
    alpha = layer.weight_system.describe(layer.weight).scale.double()
    result = alpha[:, None, None] * sums + layer.bias[:, None, None]
    # alpha is a float32 number, which the float64 weight keeps; so only the order of the sums differs
    assert torch.allclose(result, layer(images), atol=1e-9)
    assert bool((sums.abs() <= layer.weight[0].numel()).all())


def test_the_padding_counts_as_zero():
    ones = torch.ones(1, 1, 3, 3)
    sums = xnor_conv2d(ones, ones, padding=1)
    assert sums[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
