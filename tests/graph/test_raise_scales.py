"""Exported files in ONNX Runtime's default session, where biases are int32, against torch's fake-quantized numbers."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from qdq import calibrate_model, check_onnx, export_onnx, predict, swap_modules
from qdq.check import OnnxModel
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.quantize import fake_quantize


class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )


class Transposed(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )


class Linear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


SHAPES = {Conv: (4, 3, 8, 8), Transposed: (4, 3, 8, 8), Linear: (16, 8)}


def make_quantized(build, change):
    """A calibrated model whose layers have been changed before the calibration, and a batch."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for layer in model:
            if hasattr(layer, "weight"):
                change(layer)
    batch = torch.randn(SHAPES[build])
    swap_modules(model, include="*")
    calibrate_model(model, [batch], method="max")
    return model, batch


def channel(layer):
    """The weights of the second output channel of a layer."""
    return layer.weight[:, 1] if isinstance(layer, nn.ConvTranspose2d) else layer.weight[1]


def zero(layer):
    channel(layer).zero_()
    layer.bias[1] = 0.7


def shrink(layer):
    channel(layer).mul_(1e-12)
    layer.bias[1] = 0.7


def shrink_a_little(layer):
    """Just over what int32 holds: most codes stay other than zero."""
    channel(layer).mul_(1e-7)
    layer.bias[1] = 0.7


def require_torch_numbers(path, model, batch, step):
    """Both sessions give torch's numbers but for ties, of which a value moves by one step of a later quantizer."""
    expected = predict(model, [batch])
    for session in ("plain", "default"):
        error = np.abs(predict(path, [batch], session=session) - expected)
        assert error.max() < step
        assert np.median(error) < 1e-6
    assert not [
        finding for finding in check_onnx(path).findings if finding.rule in ("QDQ101", "QDQ140")
    ]


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("change", [zero, shrink, shrink_a_little])
@pytest.mark.parametrize("build", SHAPES)
def test_channels_of_zeros_and_of_tiny_weights(tmp_path, build, change, weights):
    model, batch = make_quantized(build, change)
    path = export_onnx(model, batch, tmp_path / "model.onnx", weights=weights).path
    require_torch_numbers(path, model, batch, step=0.01)


@pytest.mark.parametrize("build", SHAPES)
def test_per_tensor_weights_of_zeros(tmp_path, build):
    model, batch = make_quantized(build, lambda layer: None)
    with torch.no_grad():
        model[2].weight.zero_()
    quantizer = model[2]._weight_quantizer
    quantizer._axis = None
    del quantizer._buffers["_amax"]
    quantizer.amax = 0.0
    path = export_onnx(model, batch, tmp_path / "model.onnx").path
    require_torch_numbers(path, model, batch, step=0.01)


@pytest.mark.parametrize("amax", [0.0, 1e-20])
@pytest.mark.parametrize("build", SHAPES)
def test_dead_input_with_values_at_run_time(tmp_path, build, amax):
    model, batch = make_quantized(build, lambda layer: None)
    model[2]._input_quantizer.amax.fill_(amax)
    path = export_onnx(model, batch, tmp_path / "model.onnx").path
    require_torch_numbers(path, model, batch, step=0.01)


def test_range_set_to_zero_below_its_weights(tmp_path):
    """What torch clips to nothing stays clipped with the larger scale."""
    model, batch = make_quantized(Conv, lambda layer: None)
    model[2]._weight_quantizer.amax.view(-1)[1] = 0
    path = export_onnx(model, batch, tmp_path / "model.onnx", weights="float").path
    require_torch_numbers(path, model, batch, step=0.01)


def test_float16_keeps_no_layer_in_float32_for_a_dead_channel(tmp_path):
    model, batch = make_quantized(Conv, zero)
    report = export_onnx(model, batch, tmp_path / "model.onnx", precision="fp16")
    assert not report.precision.kept
    np.testing.assert_allclose(predict(report.path, [batch]), predict(model, [batch]), atol=0.02)


def test_a_weight_with_two_readers_keeps_its_numbers_for_the_other(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["": 19]>
    g (float[N,2,4,4] x) => (float[N,2,4,4] y, float[N,2,4,4] u)
    <float xs = {0.03}, float ts = {1e-20}, int8 z = {0}, int8[2,2,1,1] w = {1,-2,5,127}, float[2] ws = {0.01,0.02},
     int8[2] wz = {0,0}, float[2] bias = {0.1,0.7}>
    {
        [xq] a = QuantizeLinear(x, xs, z)
        [xd] b = DequantizeLinear(a, xs, z)
        [tq] p = QuantizeLinear(x, ts, z)
        [td] q = DequantizeLinear(p, ts, z)
        [w] c = DequantizeLinear<axis=0>(w, ws, wz)
        [first] y = Conv(b, c, bias)
        [second] u = Conv(q, c, bias)
    }
    """
    model = ir.from_onnx_text(text)
    ir.save(model, tmp_path / "before.onnx")
    graph_pass = RaiseWeightScales()
    graph_pass(model)
    assert graph_pass.removed_dq == -1
    ir.save(model, tmp_path / "after.onnx")
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    expected_outputs = OnnxModel(tmp_path / "before.onnx")(x)
    outputs = OnnxModel(tmp_path / "after.onnx")(x)
    for output, expected in zip(outputs, expected_outputs, strict=True):
        np.testing.assert_allclose(output, expected, atol=1e-7)
    scales = [
        model.graph.node(name).inputs[1].const_value.numpy() for name in ("w", "w_for_second")
    ]
    np.testing.assert_array_equal(scales[0], np.float32([0.01, 0.02]))
    assert (scales[1] * 1e-20 * 2.0**30 >= np.array([0.1, 0.7]) * 0.999).all()


def test_error_of_the_larger_scale_is_that_of_float_rounding():
    """Against float64: K products move the output by less than K * 2^-24 of the bias."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-9, -4):
        weight = torch.randn(1, 4608, generator=generator) * 10.0**exponent
        codes = torch.randint(-128, 128, (64, 4608), generator=generator).double()
        bias, input_scale = 0.7, 0.02
        amax = weight.abs().max()
        larger = torch.tensor(max(bias / (2.0**30 * input_scale), float(amax) / 127) * 127)
        exact = codes * input_scale @ fake_quantize(weight, amax).double().T
        raised = codes * input_scale @ fake_quantize(weight, larger).double().T
        assert (raised - exact).abs().max() < 4608 * 2.0**-24 * bias


def test_sound_scales_stay(tmp_path):
    model, batch = make_quantized(Conv, lambda layer: None)
    path = export_onnx(model, batch, tmp_path / "model.onnx").path
    for name, layer in model.named_modules():
        if hasattr(layer, "_weight_quantizer"):
            stored = (
                ir.load(path)
                .graph.initializers[f"{name}._weight_quantizer.scale"]
                .const_value.numpy()
            )
            np.testing.assert_array_equal(stored, layer._weight_quantizer.scale.flatten().numpy())
