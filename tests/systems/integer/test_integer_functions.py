"""`QReLU`, `QMaxPooling2d` and `QSigmoid` on codes."""

import copy

import numpy as np
import pytest
import torch
from golden import read_cases
from torch.nn import functional as F

from qdq import systems
from qdq.systems import QMaxPooling2d, QParam, QReLU, QSigmoid


def test_golden_sigmoid():
    (case,) = read_cases("jermmy_sigmoid")
    layer = QSigmoid()
    x = torch.tensor(case["input"])
    expected = torch.tensor(case["calibration_output"])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.freeze()
    assert layer.lut_qx.tolist() == case["lut_x"]
    assert layer.lut_qy.tolist() == case["lut_y"]
    codes = layer.qi.quantize_tensor(x)
    assert codes.tolist() == case["input_codes"]
    assert layer.quantize_inference(codes).tolist() == case["output_codes"]


@pytest.mark.parametrize("num_bits", [3, 6, 8])
@pytest.mark.parametrize("scheme", ["unsigned", "symmetric"])
def test_the_sigmoid_interpolates_its_table(num_bits, scheme):
    layer = QSigmoid(num_bits=num_bits, scheme=scheme)
    layer(torch.linspace(-4, 4, 100))
    layer.freeze()
    lowest, highest = layer.qi.codes
    assert len(layer.lut_qx) == min(64, 2**num_bits)
    assert (int(layer.lut_qx[0]), int(layer.lut_qx[-1])) == (lowest, highest)
    codes = torch.arange(lowest, highest + 1)
    expected = np.interp(codes.numpy(), layer.lut_qx.numpy(), layer.lut_qy.numpy())
    result = layer.quantize_inference(codes)
    assert result.dtype == torch.int32
    assert np.abs(result.numpy() - expected).max() <= 0.5
    exact = layer.qo.quantize_tensor(torch.sigmoid(layer.qi.dequantize_tensor(codes)))
    assert (result - exact).abs().max() <= 1


def test_the_table_is_saved_and_copied():
    layer, loaded = QSigmoid(), QSigmoid()
    layer(torch.linspace(-4, 4, 100))
    layer.freeze()
    loaded.load_state_dict(layer.state_dict())
    codes = torch.arange(256)
    for other in (loaded, copy.deepcopy(layer)):
        assert torch.equal(other.quantize_inference(codes), layer.quantize_inference(codes))
    with pytest.raises(ValueError, match="lut_size is 1"):
        QSigmoid(lut_size=1)


@pytest.mark.parametrize("scheme", ["unsigned", "signed", "symmetric"])
@pytest.mark.parametrize("kind", ["relu", "pool"])
def test_relu_and_pooling_keep_scale_and_zero_point(kind, scheme):
    before = QParam(8, scheme=scheme)
    values = torch.randn(2, 3, 7, 7)
    before.update(values)
    if kind == "relu":
        layer, expected = QReLU(), torch.relu
    else:
        layer = QMaxPooling2d(kernel_size=3, stride=2, padding=1)

        def expected(values):
            return F.max_pool2d(values, 3, 2, 1)

    codes = before.quantize_tensor(values)
    with pytest.raises(RuntimeError, match="quantize_inference before freeze"):
        layer.quantize_inference(codes)
    assert torch.equal(layer(values), expected(values))
    with pytest.raises(ValueError, match="qi is not existed"):
        layer.freeze()
    layer.freeze(before)
    result = layer.quantize_inference(codes)
    assert result.dtype == torch.int32
    assert torch.equal(before.dequantize_tensor(result), expected(before.dequantize_tensor(codes)))
    with pytest.raises(RuntimeError, match="forward after freeze"):
        layer(values)


def test_a_range_of_its_own_needs_a_width():
    with pytest.raises(RuntimeError, match="without num_bits"):
        QReLU(qi=True)(torch.randn(3))
    layer = QReLU(qi=True, num_bits=8)
    layer(torch.randn(3))
    with pytest.raises(ValueError, match="qi has been provided"):
        layer.freeze(QParam())
    layer.freeze()


def test_max_pooling_has_two_names():
    for package in (systems, systems.integer):
        assert package.QMaxPool2d is package.QMaxPooling2d is QMaxPooling2d
