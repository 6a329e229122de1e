"""`quantize_parameters`: which entries get how many bits, and what stays."""

import copy

import pytest
import torch
from torch import nn

from qdq.systems import (
    UInt8Activation,
    compute_integral_part,
    linear_quantize,
    log_minmax_quantize,
    min_max_quantize,
    quantize_parameters,
    tanh_quantize,
)
from qdq.systems.grid import find_grid


def make_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(6, 2)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model[1].num_batches_tracked.fill_(1000)
    return model


def quantize(values, bits):
    return linear_quantize(values, bits - 1 - compute_integral_part(values), bits)


def test_every_entry_has_its_own_range():
    model = make_model()
    state = copy.deepcopy(model.state_dict())
    weight = model[0].weight
    report = quantize_parameters(model, 6, 10)
    assert model[0].weight is weight  # in place
    for name, values in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert values == 1000
        else:
            assert torch.equal(values, quantize(state[name], 10 if "running" in name else 6)), name
    lines = report.format_table().splitlines()
    assert lines == [
        "0.weight 6",
        "0.bias 6",
        "1.weight 6",
        "1.bias 6",
        "1.running_mean 10",
        "1.running_var 10",
        "Ignoring 1.num_batches_tracked",
        "3.weight 6",
        "3.bias 6",
    ]


def test_defaults_leave_running_statistics():
    model = make_model()
    state = copy.deepcopy(model.state_dict())
    report = quantize_parameters(model)
    assert torch.equal(model[1].running_var, state["1.running_var"])
    assert torch.equal(model[0].weight, quantize(state["0.weight"], 8))
    assert "Ignoring 1.running_mean" in report.format_table()


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("method", ["linear", "minmax", "log", "tanh"])
@pytest.mark.parametrize("variances", [[0.0, 1e-3, 2.0, 100.0], [0.0, 0.0, 0.0, 0.0]])
def test_no_running_variance_is_0(method, bits, variances):
    model = make_model()
    model[1].running_var.copy_(torch.tensor(variances))
    quantize_parameters(model, 32, bits, quant_method=method)
    assert (model[1].running_var > 0).all()
    assert torch.isfinite(model[1].running_var).all()


def test_a_running_variance_of_0_is_raised_to_one_step_of_min_max(caplog):
    model = make_model()
    model[1].running_var.copy_(torch.tensor([0.0, 1e-3, 2.0, 51.0]))
    quantize_parameters(model, 32, 8, quant_method="minmax")
    step = 51 / 255
    expected = torch.tensor([step, step, 10 * step, 51.0])
    torch.testing.assert_close(model[1].running_var, expected)
    assert "2 of 4 variances have code 0" in caplog.text


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


def test_extra_state_stays():
    report = quantize_parameters(WithExtraState(2, 2), 4)
    assert report.format_table().splitlines() == [
        "weight 4",
        "bias 4",
        "Ignoring _extra_state",
    ]


def test_ranges_of_quantizers_stay():
    quantizer = UInt8Activation("x")
    quantizer(torch.randn(9))
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    report = quantize_parameters(nn.Sequential(quantizer, nn.Linear(2, 2)), 4, 2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in quantizer.named_buffers())
    assert "Ignoring 0.running_min" in report.format_table()


def test_only_running_statistics():
    model = make_model()
    state = copy.deepcopy(model.state_dict())
    quantize_parameters(model, 32, 4)
    changed = [name for name in state if not torch.equal(state[name], model.state_dict()[name])]
    assert changed == ["1.running_mean", "1.running_var"]


@pytest.mark.parametrize(
    ("method", "function"),
    [("minmax", min_max_quantize), ("log", log_minmax_quantize), ("tanh", tanh_quantize)],
)
def test_other_methods(method, function):
    model = make_model()
    weight = model[3].weight.clone()
    quantize_parameters(model, 5, quant_method=method)
    assert torch.equal(model[3].weight, function(weight, 5))
    grid = find_grid(model[3], "weight")
    assert (grid.obstacle == "") == (method == "minmax")


def test_saturation():
    model = nn.Linear(10, 10)
    weight = model.weight.detach().clone()
    quantize_parameters(model, 4, overflow_rate=0.5)
    sf = 3 - compute_integral_part(weight, 0.5)
    assert torch.equal(model.weight, linear_quantize(weight, sf, 4))


def test_a_variance_that_would_be_zero(caplog):
    model = make_model()
    model[1].running_var.copy_(torch.tensor([1e-6, 0.9, 0.5, 1e-9]))
    quantize_parameters(model, 8, 8)
    step = 2.0**-7
    assert model[1].running_var.tolist() == [
        step,
        quantize(torch.tensor([0.9]), 8).item(),
        0.5,
        step,
    ]
    assert "1.running_var: 2 of 4 variances have code 0 and are raised to one step" in caplog.text
    assert bool(torch.isfinite(model[1](torch.randn(2, 4, 3, 3))).all())


def test_variances_above_zero_are_not_mentioned(caplog):
    quantize_parameters(make_model(), 8, 8)
    assert caplog.text == ""


@pytest.mark.parametrize("bits", [1, 6, 12])
def test_grids_are_remembered(bits):
    model = make_model()
    quantize_parameters(model, bits)
    for layer in (model[0], model[3]):
        grid = find_grid(layer, "weight")
        codes = layer.weight / grid.scale
        assert torch.equal(codes, codes.round())
        assert grid.lowest <= codes.min() and codes.max() <= grid.highest
        assert grid.obstacle == ("12 bits" if bits == 12 else "")
    assert find_grid(copy.deepcopy(model)[0], "weight") is not None


def test_a_module_prefix_is_only_a_prefix():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(3, 3))

    model = nn.DataParallel(Network())
    quantize_parameters(model, 4)
    assert find_grid(model.module.module[0], "weight") is not None


def test_half_precision():
    model = nn.Linear(5, 5).half()
    weight = model.weight.detach().clone()
    quantize_parameters(model, 8)
    assert model.weight.dtype == torch.float16
    assert torch.equal(model.weight, quantize(weight, 8))


def test_on_a_device(device):
    model = nn.Linear(5, 5)
    expected = quantize(model.weight.detach(), 8)
    quantize_parameters(model.to(device), 8)
    assert torch.equal(model.weight.detach().cpu(), expected)


def test_an_error_changes_nothing():
    model = make_model()
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"3\.bias: 1 of 2 values are not finite"):
        quantize_parameters(model)
    for name, values in model.state_dict().items():
        assert torch.equal(values.nan_to_num(), state[name].nan_to_num())
    assert find_grid(model[0], "weight") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"param_bits": 0}, "param_bits: bits is 0"),
        ({"bn_bits": 33}, "bn_bits: bits is 33"),
        ({"overflow_rate": -1}, "overflow_rate is -1"),
        ({"quant_method": "cubic"}, "quant_method is 'cubic'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        quantize_parameters(make_model(), **settings)


def test_a_state_dict_is_refused():
    with pytest.raises(TypeError):
        quantize_parameters(make_model().state_dict())
