import copy

import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    StateError,
    calibrate_model,
    correct_bias,
    restore_modules,
    round_weights,
    swap_modules,
)
from qdq.accuracy import bias
from qdq.check.rules import find_violations
from qdq.quantize import fake_quantize
from qdq.quantizer import disable_quantization


def layer_outputs(model, images, names):
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: outputs.setdefault(name, out)
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {name: out.double().transpose(0, 1).flatten(1) for name, out in outputs.items()}


@pytest.fixture
def plain():
    """Linear in its layers: nothing behind them hides an error."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.Flatten(), nn.Linear(1024, 16)
    )
    swap_modules(model.eval(), torch.randn(2, 3, 12, 12))
    data = torch.rand(8, 3, 12, 12)
    calibrate_model(model, [data], method="max")
    return model, data


def test_empirical_leaves_the_mean_of_every_channel(plain):
    model, data = plain
    names = ["0", "1", "3"]
    with disable_quantization(model):
        expected = layer_outputs(model, data, names)
    quantized = layer_outputs(model, data, names)
    report = correct_bias(model, [data[:4], data[4:]])
    corrected = layer_outputs(model, data, names)
    for name in names:
        error = (quantized[name] - expected[name]).mean(1).abs().max()
        assert (corrected[name] - expected[name]).mean(1).abs().max() < 1e-3 * error
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
    y, quantized = data.double() @ weight.t() + bias, x @ w.t() + bias
    live = torch.where((y > 0) | (quantized > 0), 1.0, 0.01).double()
    expected = bias + (live * (y - quantized)).sum(0) / live.sum(0)
    correct_bias(model, [data])
    torch.testing.assert_close(layer.bias.double(), expected, atol=1e-5, rtol=1e-4)


def test_analytic_is_the_formula_of_the_paper():
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 16), include=["0"])
    data = torch.rand(64, 16)
    calibrate_model(model, [data], method="max")
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    error = (
        fake_quantize(layer.weight.detach(), layer._weight_quantizer.amax, axis=0).double() - weight
    )
    correct_bias(model, [data], method="analytic")
    torch.testing.assert_close(
        layer.bias.double(), bias - error @ data.double().mean(0), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_residual_network_exports_clean(residual, images, tmp_path, method):
    import onnx_ir as ir

    from qdq import export_onnx, fold_batchnorm, rewire_operations

    fold_batchnorm(residual, images)
    residual.conv.bias = None
    swap_modules(residual, images)
    rewire_operations(residual, images)
    calibrate_model(residual, [images])
    expected = find_violations(
        ir.load(export_onnx(residual, images, tmp_path / "before.onnx").path)
    )
    report = correct_bias(residual, [images], method=method)
    assert residual.conv.bias is not None
    assert report.after_db > report.before_db
    violations = find_violations(
        ir.load(export_onnx(residual, images, tmp_path / "after.onnx").path)
    )
    assert [f.rule for f in violations] == [f.rule for f in expected]


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
    bias = residual.conv.bias.clone()
    report = correct_bias(residual, [images])
    reasons = {layer.layer: layer.reason for layer in report.layers}
    assert reasons == {"stem": "", "head": "", "conv": "it is in float"}
    assert torch.equal(residual.conv.bias, bias)


@pytest.mark.parametrize("correct", [correct_bias, round_weights])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_a_new_bias_loads_in_a_swapped_model(plain, correct, assign):
    model, data = plain
    assert model[1].bias is None
    correct(model, [data])
    fresh = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.Flatten(), nn.Linear(1024, 16)
    )
    swap_modules(fresh.eval(), data)
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert isinstance(fresh[1].bias, nn.Parameter)
    assert torch.equal(fresh(data), model(data))
    # The float model has none.
    assert "1.bias" not in restored(model).state_dict()


def restored(model):
    model = copy.deepcopy(model)
    restore_modules(model)
    return model


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("correct", [correct_bias, round_weights])
def test_attention_is_left_alone(correct):
    torch.manual_seed(0)
    model, data = Attending().eval(), torch.randn(16, 5, 32)
    swap_modules(model, data)
    calibrate_model(model, [data])
    packed = model.attention.in_proj_weight.detach().clone()
    report = correct(model, [data])
    reasons = {layer.layer: layer.reason for layer in report.layers}
    assert "does not run" in reasons.pop("attention")
    assert set(reasons.values()) == {""} and set(reasons) >= {"first", "last"}
    assert torch.equal(model.attention.in_proj_weight, packed)
    assert report.after_db > report.before_db


class Shifted(nn.Module):
    """Its dictionary holds a table of positions and a number beside the samples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, positions, factor):
        return self.last(torch.relu(self.first(factor * x + positions)))


@pytest.fixture
def shifted():
    torch.manual_seed(0)
    model, positions = Shifted().eval(), torch.randn(6, 16)
    batches = [
        {"x": torch.randn(n, 6, 16), "positions": positions.clone(), "factor": 2.0} for n in (4, 3)
    ]
    swap_modules(model, batches[0])
    calibrate_model(model, batches)
    return model, batches


@pytest.mark.parametrize("correct", [correct_bias, round_weights])
def test_inputs_without_samples_are_kept_once(shifted, correct):
    model, batches = shifted
    twin = copy.deepcopy(model)
    joined = {**batches[0], "x": torch.cat([batch["x"] for batch in batches])}
    correct(twin, [joined])
    correct(model, [*batches, {**batches[0], "x": torch.empty(0, 6, 16)}])
    assert torch.equal(model.first.bias, twin.first.bias)
    assert torch.equal(model.last.weight, twin.last.weight)


@pytest.mark.parametrize("correct", [correct_bias, round_weights])
@pytest.mark.parametrize(("key", "value"), [("factor", 3.0), ("positions", torch.zeros(6, 16))])
def test_inputs_without_samples_that_differ_are_named(shifted, correct, key, value):
    model, batches = shifted
    with pytest.raises(DataError, match=f"{key}.* differs between batches") as caught:
        correct(model, [batches[0], {**batches[1], key: value}])
    assert "samples first" in caught.value.fix


def test_a_table_as_long_as_the_batch_is_taken_for_samples(shifted):
    model, batches = shifted
    batches = [{**batches[0], "x": torch.randn(6, 6, 16)} for _ in range(2)]
    with pytest.raises(DataError, match="does not run on the batches joined") as caught:
        correct_bias(model, batches)
    assert "first axis" in caught.value.fix


@pytest.mark.parametrize("correct", [correct_bias, round_weights])
@pytest.mark.parametrize(
    ("layer", "data", "message"),
    [
        (nn.Linear(16, 32), torch.randn(16), "0 has 1 dimensions; expected 2 or more"),
        (nn.Linear(16, 32), torch.randn(0, 16), "all 1 batches are empty"),
        (
            nn.Conv2d(16, 16, 3),
            torch.randn(16, 8, 8),
            "0 has 3 dimensions; expected 4 or more",
        ),
        (
            nn.Conv2d(2, 16, 3),
            torch.randn(2, 8, 8),
            "0 has 3 dimensions; expected 4 or more",
        ),
    ],
)
def test_batches_without_an_axis_of_samples(correct, layer, data, message):
    model = nn.Sequential(layer, nn.ReLU())
    swap_modules(model, include=["0"])
    calibrate_model(model, [data if data.numel() else torch.randn(4, 16)])
    with pytest.raises(DataError, match=message) as caught:
        correct(model, [data])
    assert caught.value.fix


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


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_the_gpu_corrects_as_the_cpu_does(quantized, gpu, method):
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    twin = copy.deepcopy(quantized).to(gpu)
    expected = correct_bias(quantized, batches, method=method)
    with watch(gpu) as events:
        report = correct_bias(twin, batches, method=method)
    assert report.before_db == pytest.approx(expected.before_db, abs=0.01)
    assert report.after_db == pytest.approx(expected.after_db, abs=0.01)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.cpu(), quantized.get_parameter(name))
    print(f"correct_bias {method}: {len(list_waits(events))} waits for 3 layers and 3 batches")
    assert len(list_waits(events)) <= 4


class Stream(nn.Module):
    """A layer whose output a LayerNorm divides after a residual add."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.layer(x))


def test_error_that_a_norm_divides_away_counts_little():
    """One token in sixteen is huge and clipped: its error must not shift the others."""
    model = Stream().eval()
    data = torch.randn(64, 16, 16)
    data[:, 0] *= 50
    swap_modules(model, data, include=["layer"])
    calibrate_model(model, [data], method="max")
    layer = model.layer
    layer.input_quantizer.amax = layer.input_quantizer.amax / 4
    rows = data.flatten(0, 1)
    weight, bias = layer.weight.detach(), layer.bias.detach().clone()
    x = fake_quantize(rows, layer.input_quantizer.amax).double()
    w = fake_quantize(weight, layer.weight_quantizer.amax, axis=0).double()
    y = rows.double() @ weight.double().t()
    variance = (rows.double() + y + bias).var(1, correction=0)
    share = (1 / variance) / (1 / variance).sum()
    expected = bias + share @ (y - x @ w.t())
    correct_bias(model, [data])
    torch.testing.assert_close(layer.bias.detach(), expected.float(), rtol=1e-3, atol=1e-6)


def quantized_pair():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    images = torch.randn(64, 16)
    swap_modules(model, images, include=["*"])
    calibrate_model(model, [images], method="max")
    return model, images


def test_the_analytic_correction_twice_is_that_of_once():
    model, images = quantized_pair()
    correct_bias(model, [images], method="analytic")
    once = [parameter.clone() for parameter in model.parameters()]
    correct_bias(model, [images], method="analytic")
    torch.testing.assert_close(list(model.parameters()), once)


def test_the_analytic_correction_is_refused_for_learned_weights():
    model, images = quantized_pair()
    round_weights(model, [images])
    with pytest.raises(StateError, match="round_weights has learned"):
        correct_bias(model, [images], method="analytic")


def test_an_interrupted_correction_changes_no_bias(monkeypatch):
    model, images = quantized_pair()
    before = [parameter.clone() for parameter in model.parameters()]
    add_to_bias = bias.add_to_bias

    def interrupt(layer, shift):
        add_to_bias(layer, shift)
        raise KeyboardInterrupt

    monkeypatch.setattr(bias, "add_to_bias", interrupt)
    with pytest.raises(KeyboardInterrupt):
        correct_bias(model, [images])
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


def test_a_layer_norm_over_the_positions_of_a_convolution():
    """It divides over another axis than that of the channels, so it weighs no row."""
    model = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.LayerNorm(20)).eval()
    images = torch.randn(12, 3, 20)
    swap_modules(model, images, include=["*"])
    calibrate_model(model, [images], method="max")
    report = correct_bias(model, [images])
    assert not report.layers[0].reason
