"""Calibrated state keeps its type in a model that is cast: small ranges are 0 in float16, large ones infinite."""

import pytest
import torch
from torch import nn

from qdq.systems import (
    AcousticInput,
    LinearQuant,
    NormalQuant,
    UInt8Activation,
    calibrate_inputs,
    min_max_quantize,
)


def make_min_max(values):
    quantizer = NormalQuant("layer", 8, min_max_quantize)
    calibrate_inputs(nn.Sequential(quantizer), [values])
    return quantizer


def make_acoustic(values):
    quantizer = AcousticInput(name="layer")
    calibrate_inputs(nn.Sequential(quantizer), [values])
    return quantizer


def make_uint8(values):
    quantizer = UInt8Activation("layer", decay=0.9999999)
    quantizer(values)
    return quantizer.eval()


def make_linear(values):
    quantizer = LinearQuant("layer", 8, counter=1)
    quantizer(values)
    return quantizer


QUANTIZERS = {
    "min-max": make_min_max,
    "acoustic": make_acoustic,
    "UINT8": make_uint8,
    "fixed point": make_linear,
}


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_cast_quantizer_has_the_same_state_and_finite_values(make, size):
    quantizer = make(torch.linspace(-1, 1, 50) * size)
    state = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    nn.Sequential(nn.Linear(2, 2), quantizer).half()
    for name, buffer in quantizer.named_buffers():
        assert buffer.dtype == state[name].dtype and torch.equal(buffer, state[name])
    values = (torch.linspace(-1, 1, 50) * min(size, 1e4)).half()
    result = quantizer(values)
    assert result.dtype == torch.float16
    assert torch.isfinite(result).all()
