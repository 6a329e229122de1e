"""`NormalQuant`: a function for every batch."""

import copy

import pytest
import torch

from qdq.systems import NormalQuant, log_minmax_quantize, min_max_quantize, tanh_quantize


@pytest.mark.parametrize("function", [min_max_quantize, log_minmax_quantize, tanh_quantize])
def test_each_batch_anew(function):
    quantizer = NormalQuant("fc_quant", 4, function)
    for scale in (1.0, 100.0):
        values = torch.randn(30) * scale
        assert torch.equal(quantizer(values), function(values, 4))
        assert torch.equal(copy.deepcopy(quantizer)(values), function(values, 4))


def test_repr_and_counter():
    quantizer = NormalQuant("fc_quant", 8, min_max_quantize)
    assert repr(quantizer) == "NormalQuant(bits=8)"
    assert quantizer.counter == 0
    assert quantizer.name == "fc_quant"


def test_gradient_passes():
    values = torch.randn(5, requires_grad=True)
    NormalQuant("fc_quant", 3, tanh_quantize)(values).sum().backward()
    assert values.grad.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("function", "bits", "obstacle"),
    [
        (min_max_quantize, 8, "recomputed for every batch"),
        (min_max_quantize, 1, "recomputed for every batch"),
        (log_minmax_quantize, 8, "exponentials"),
        (log_minmax_quantize, 1, "recomputed for every batch"),
        (tanh_quantize, 8, "tangents"),
        (lambda values, bits: values.round(), 8, "recomputed for every batch"),
    ],
)
def test_no_activation_has_a_constant_grid(function, bits, obstacle):
    assert obstacle in NormalQuant("fc_quant", bits, function).describe(None).obstacle


def test_a_weight_has_one():
    weight = torch.randn(4, 4)
    grid = NormalQuant("fc_quant", 8, min_max_quantize).describe(weight)
    assert grid.obstacle == "" and grid.zero_point.item() != 0
    assert NormalQuant("fc_quant", 1, tanh_quantize).describe(weight).obstacle == ""


def test_values_that_are_refused():
    with pytest.raises(ValueError, match=r"fc_quant: .* is empty"):
        NormalQuant("fc_quant", 8, tanh_quantize)(torch.zeros(0))
    with pytest.raises(ValueError, match="fc_quant: bits is 0"):
        NormalQuant("fc_quant", 0, tanh_quantize)
