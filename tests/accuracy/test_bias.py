import copy

import pytest
import torch
from torch import nn

from qdq import ArgumentError, ArgumentTypeError, DataError, StateError, calibrate_model, correct_bias, swap_modules
from qdq.check.rules import find_violations
from qdq.quantizer import disable_quantization, fake_quantize


def layer_outputs(model, images, names):
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, out))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {name: out.double().transpose(0, 1).flatten(1) for name, out in seen.items()}


@pytest.fixture
def plain():
    """Linear in its layers: nothing behind them hides an error."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.Flatten(), nn.Linear(1024, 16))
    swap_modules(model.eval(), torch.randn(2, 3, 12, 12))
    data = torch.rand(8, 3, 12, 12)
    calibrate_model(model, [data], method="max")
    return model, data


def test_empirical_leaves_the_mean_of_every_channel(plain):
    model, data = plain
    names = ["0", "1", "3"]
    with disable_quantization(model):
        expected = layer_outputs(model, data, names)
    before = layer_outputs(model, data, names)
    report = correct_bias(model, [data[:4], data[4:]])
    after = layer_outputs(model, data, names)
    for name in names:
        error = (before[name] - expected[name]).mean(1).abs().max()
        assert (after[name] - expected[name]).mean(1).abs().max() < 1e-3 * error
    assert report.after_db > report.before_db
    assert [layer.layer for layer in report.layers] == names
    assert "3 layers" in report.format_table()


def test_empirical_counts_what_relu_passes_on():
    layer = nn.Linear(16, 16)
    nn.init.constant_(layer.bias, -0.5)
    model = nn.Sequential(layer, nn.ReLU())
    swap_modules(model, torch.zeros(2, 16), include=["0"])
    data = torch.randn(512, 16)
    calibrate_model(model, [data], method="max")
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    x = fake_quantize(data, layer._input_quantizer.amax).double()
    w = fake_quantize(layer.weight.detach(), layer._weight_quantizer.amax, axis=0).double()
    y, found = data.double() @ weight.t() + bias, x @ w.t() + bias
    live = torch.where((y > 0) | (found > 0), 1.0, 0.01).double()
    expected = bias + (live * (y - found)).sum(0) / live.sum(0)
    correct_bias(model, [data])
    torch.testing.assert_close(layer.bias.double(), expected, atol=1e-5, rtol=1e-4)


def test_analytic_is_the_formula_of_the_paper():
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 16), include=["0"])
    data = torch.rand(64, 16)
    calibrate_model(model, [data], method="max")
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    error = fake_quantize(layer.weight.detach(), layer._weight_quantizer.amax, axis=0).double() - weight
    correct_bias(model, [data], method="analytic")
    torch.testing.assert_close(layer.bias.double(), bias - error @ data.double().mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_residual_network_exports_clean(residual, images, tmp_path, method):
    import onnx_ir as ir

    from qdq import export_onnx, fold_batchnorm, rewire_operations

    fold_batchnorm(residual, images)
    residual.conv.bias = None
    swap_modules(residual, images)
    rewire_operations(residual, images)
    calibrate_model(residual, [images])
    before = find_violations(ir.load(export_onnx(residual, images, tmp_path / "before.onnx").path))
    report = correct_bias(residual, [images], method=method)
    assert residual.conv.bias is not None
    assert report.after_db > report.before_db
    after = find_violations(ir.load(export_onnx(residual, images, tmp_path / "after.onnx").path))
    assert [f.rule for f in after] == [f.rule for f in before]


def test_reference_is_the_target(plain):
    model, data = plain
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    correct_bias(model, [data], reference=reference)
    torch.testing.assert_close(model[0].bias, reference[0].bias, atol=0.05, rtol=0)


def test_what_is_left_alone_has_a_reason(residual, images):
    swap_modules(residual, images)
    calibrate_model(residual, [images])
    disable_quantization(residual.conv)
    before = residual.conv.bias.clone()
    report = correct_bias(residual, [images])
    reasons = {layer.layer: layer.reason for layer in report.layers}
    assert reasons == {"stem": "", "head": "", "conv": "it is in float"}
    assert torch.equal(residual.conv.bias, before)


def test_refusals(residual, images):
    with pytest.raises(StateError, match="no layer"):
        correct_bias(residual, [images])
    swap_modules(residual, images)
    with pytest.raises(StateError, match="no amax"):
        correct_bias(residual, [images])
    calibrate_model(residual, [images])
    with pytest.raises(ArgumentError, match="method"):
        correct_bias(residual, [images], method="magic")
    with pytest.raises(ArgumentTypeError, match="batches"):
        correct_bias(residual, images)
    with pytest.raises(DataError, match="no batch"):
        correct_bias(residual, [])
    with pytest.raises(DataError, match="joined"):
        correct_bias(residual, [images, images[..., :8]])
    with pytest.raises(ArgumentError, match="reference"):
        correct_bias(residual, [images], reference=nn.Linear(2, 2))
    with pytest.raises(StateError, match="NaN"):
        correct_bias(residual, [images * float("nan")])
