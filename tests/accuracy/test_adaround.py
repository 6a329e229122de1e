import contextlib
import copy
import io
import itertools
import logging
import math
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from pretended_device import list_waits, watch
from torch import nn

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    QuantDescriptor,
    StateError,
    calibrate_model,
    correct_bias,
    export_onnx,
    fold_batchnorm,
    reconstruct_blocks,
    restore_modules,
    round_weights,
    swap_modules,
)
from qdq.accuracy.adaround import _LeastSquares, _Moments
from qdq.quantize import quantize_codes
from qdq.quantizer import disable_quantization


def codes_of(layer, weight=None):
    weight = layer._parameters["weight"] if weight is None else weight
    return quantize_codes(
        weight.detach(), layer.weight_quantizer.scale.flatten(), layer.weight_quantizer.format, 0
    )


def test_learned_codes_reconstruct_better_and_are_stored_as_values(quantized, images):
    reference = copy.deepcopy(quantized)
    report = round_weights(quantized, [images])
    assert report.after_db > report.before_db + 1
    for name in ("stem", "conv", "head"):
        layer = quantized.get_submodule(name)
        codes = codes_of(layer)
        assert torch.equal(
            layer.weight_quantizer.amax, reference.get_submodule(name).weight_quantizer.amax
        )
        values = codes * layer.weight_quantizer.scale.reshape(-1, *[1] * (codes.dim() - 1))
        torch.testing.assert_close(layer._parameters["weight"].detach(), values)
    assert all(layer.changed > 0 and layer.error < 1 for layer in report.layers)


def test_weights_make_up_for_the_noise_of_the_input():
    """The input is rounded to steps as large as itself; then smaller weights have less error (closed form, float64)."""
    torch.manual_seed(2)
    layer = nn.Linear(6, 4)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 6), include=["*"])
    x = torch.randn(4096, 6) @ torch.randn(6, 6)
    calibrate_model(model, [x], method="max")
    quantizer = layer._input_quantizer
    quantizer.amax = quantizer.amax * 30
    weight = layer.weight.detach().double().clone()
    noisy = quantizer(x).detach().double()
    expected = x.double() @ weight.t()
    round_weights(model, [x])

    best = torch.linalg.lstsq(noisy - noisy.mean(0), expected - expected.mean(0)).solution.t()
    learned = layer._parameters["weight"].detach().double()

    def error(values):
        residual = expected - noisy @ values.t()
        return float((residual - residual.mean(0)).square().mean())

    assert error(learned) < 1.02 * error(best)
    assert error(learned) < 0.9 * error(weight)


def test_weights_do_not_follow_noise_of_the_target():
    """A residual that has nothing to do with the input moves no weight: samples that are held out refuse it."""
    torch.manual_seed(3)
    layer = nn.Linear(24, 4)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 24), include=["*"])
    x = torch.randn(48, 24)
    calibrate_model(model, [x], method="max")
    before = codes_of(layer)
    noise = nn.Sequential(nn.Linear(24, 4))
    noise.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
    noise[0].register_forward_hook(lambda *args: args[-1] + torch.randn(args[-1].shape))
    round_weights(model, [x], reference=noise)
    assert (codes_of(layer) - before).abs().max() <= 1


@pytest.mark.parametrize("groups", [1, 3])
def test_moves_are_the_least_squares_of_the_rows(groups):
    """The error is the one of its definition, in float64, and each move has the gradient 0."""
    torch.manual_seed(4)
    x, residual = torch.randn(groups, 64, 8), torch.randn(groups, 5, 64)
    counted = torch.rand(groups, 1, 64)
    fit = _LeastSquares(_Moments.of_rows(x, residual, counted))
    weight = (counted / counted.sum(-1, keepdim=True)).double()
    for penalty, move in zip([0.1, 1.0], fit.solve([0.1, 1.0]), strict=True):
        wanted = move.double().requires_grad_()
        left = residual.double() - wanted @ x.double().transpose(1, 2)
        variance = (weight * left.square()).sum(-1) - (weight * left).sum(-1).square()
        torch.testing.assert_close(fit.error(move).double(), variance.detach(), atol=1e-5, rtol=0)
        mean_variance = fit.covariance.diagonal(dim1=1, dim2=2).mean(-1).double()
        bound = penalty * mean_variance[:, None] * wanted.square().sum(-1)
        (gradient,) = torch.autograd.grad((variance + bound).sum(), wanted)
        assert gradient.abs().max() < 1e-5


def test_the_moments_of_two_parts_are_those_of_all_rows():
    """Against the definition of covariance and error in float64; the parts have other means."""
    torch.manual_seed(5)
    x, residual = torch.randn(3, 64, 8), torch.randn(3, 5, 64)
    x[:, :20] += 10
    residual[..., :20] -= 5
    counted = torch.rand(3, 1, 64)
    is_held = torch.arange(64) < 20
    parts = [_Moments.of_rows(x, residual, counted * rows) for rows in (is_held, ~is_held)]
    fit = _LeastSquares(parts[0] + parts[1])
    weight = (counted / counted.sum(-1, keepdim=True)).double()
    centered = x.double() - weight @ x.double()
    covariance = (centered * weight.transpose(1, 2)).transpose(1, 2) @ centered
    torch.testing.assert_close(fit.covariance.double(), covariance, atol=1e-5, rtol=0)
    variance = (weight * residual.double().square()).sum(-1)
    variance -= (weight * residual.double()).sum(-1).square()
    error = fit.error(torch.zeros(3, 5, 8)).double()
    torch.testing.assert_close(error, variance, atol=1e-5, rtol=0)
    x[:, :20] += 500  # far from the others beside their deviation
    part = _LeastSquares(_Moments.of_rows(x, residual, counted * is_held))
    rows = x[:, :20].double()
    weight = (counted / counted[..., :20].sum(-1, keepdim=True)).double()[..., :20]
    centered = rows - weight @ rows
    covariance = (centered * weight.transpose(1, 2)).transpose(1, 2) @ centered
    torch.testing.assert_close(part.covariance.double(), covariance, atol=1e-4, rtol=0)
    empty = _LeastSquares(_Moments.of_rows(x, residual, counted * 0))
    assert empty.covariance.abs().max() == empty.error(torch.ones(3, 5, 8)).abs().max() == 0


def test_the_weight_of_an_input_that_hardly_varies_stays():
    """One row moves the input by chance: without a bound its weight would make up for the residual of that row."""
    torch.manual_seed(4)
    x = torch.randn(1, 64, 8)
    x[..., 0] = 0
    x[0, 5, 0] = 1e-3
    fit = _LeastSquares(_Moments.of_rows(x, torch.randn(1, 4, 64), torch.ones(1, 1, 64)))
    for move in fit.solve([10.0, 0.01]):
        assert move[..., 0].abs().max() < 0.1


def test_layer_beats_nearest_rounding_with_its_best_bias():
    torch.manual_seed(1)
    layer = nn.Linear(32, 16)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 32))
    layer._weight_quantizer._num_bits = 4
    x = torch.randn(256, 32) @ torch.randn(32, 32)
    calibrate_model(model, [x], method="max")
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())

    @torch.no_grad()
    def error():
        residual = expected - model(x).double()
        return float((residual - residual.mean(0)).square().mean())

    nearest = error()
    report = round_weights(model, [x])
    assert error() < 0.7 * nearest
    assert report.layers[0].error < 0.8
    assert (model(x).double() - expected).mean(0).abs().max() < 1e-4 * expected.abs().max()


def test_a_small_filter_gets_the_best_codes_of_all():
    layer = nn.Conv2d(2, 2, (1, 4), groups=2)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 2, 4, 9), include=["0"])
    layer._weight_quantizer._num_bits = 3
    x = torch.randn(64, 2, 4, 9).cumsum(-1)
    calibrate_model(model, [x], method="max")
    weight, scale = layer.weight.detach().clone(), layer.weight_quantizer.scale.flatten()
    expected = F.conv2d(x, weight, layer.bias.detach(), groups=2)
    quantized_x = layer._input_quantizer(x)
    ideal = weight.flatten(1) / scale[:, None]

    def error(channel, codes):
        kernel = (torch.tensor(codes, dtype=torch.float32) * scale[channel]).reshape(1, 1, 1, 4)
        residual = (
            expected[:, channel] - F.conv2d(quantized_x[:, channel : channel + 1], kernel)[:, 0]
        )
        return float(residual.double().var())

    round_weights(model, [x])
    for channel in range(2):
        sides = [{max(math.floor(v), -3), min(math.ceil(v), 3)} for v in ideal[channel].tolist()]
        best = min(error(channel, codes) for codes in itertools.product(*sides))
        learned = error(channel, codes_of(layer)[channel].flatten().tolist())
        assert learned <= 1.1 * best


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_search_ends_near_the_best_codes_of_all(num_bits):
    """Against all 1,024 codes around each filter, in float64. The inputs are codes of int8, so only weights err."""
    learned = best = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        layer = nn.Linear(10, 16)
        model = nn.Sequential(layer)
        swap_modules(model, torch.zeros(2, 10), include=["0"])
        layer._weight_quantizer._num_bits = num_bits
        x = (20 * torch.randn(4096, 10) @ torch.randn(10, 10)).round().clamp(-127, 127)
        calibrate_model(model, [x], method="max")
        assert torch.equal(layer._input_quantizer(x), x)
        scale = layer.weight_quantizer.scale.reshape(-1, 1)
        ideal = (layer.weight.detach() / scale).double()
        most = 2 ** (num_bits - 1) - 1
        ups = torch.tensor(list(itertools.product((0, 1), repeat=10)))[:, None]
        covariance = x.double().t().cov()

        round_weights(model, [x])
        learned += float(rounding_losses(codes_of(layer), ideal, covariance).sum())
        choices = (ideal.floor() + ups).clamp(-most, most)
        best += float(rounding_losses(choices, ideal, covariance).amin(0).sum())
    assert 1 <= learned / best < 1.15  # flips from the nearest codes alone end at 1.15 to 1.23


def test_the_search_uses_correlations_of_many_inputs():
    """Inputs of 30 causes, 288 weights: mean field annealing beats the flips alone only if it is damped enough."""
    torch.manual_seed(8)
    layer = nn.Linear(288, 64)
    model = nn.Sequential(layer)
    swap_modules(model, torch.zeros(2, 288), include=["0"])
    x = torch.randn(2000, 30) @ torch.randn(30, 288) + 0.3 * torch.randn(2000, 288)
    calibrate_model(model, [x], method="max")
    quantized_x = layer._input_quantizer(x).double()
    scale = layer.weight_quantizer.scale.reshape(-1, 1)
    ideal = (layer.weight.detach() / scale).double()
    covariance = quantized_x.t().cov()
    nearest = rounding_losses(ideal.round(), ideal, covariance).sum()
    round_weights(model, [x])
    learned = rounding_losses(codes_of(layer), ideal, covariance).sum()
    assert learned < 0.044 * nearest  # 0.040; flips from the nearest codes alone end at 0.047


def rounding_losses(codes, ideal, covariance):
    """The squared error of the output of each filter, in units of the squared scale, float64 `[..., Cout]`."""
    error = codes.double() - ideal
    return ((error @ covariance) * error).sum(-1)


def test_export_has_the_learned_codes_and_restoring_forgets_them(quantized, images, tmp_path):
    nearest = codes_of(quantized.conv)
    weights = {name: tensor.clone() for name, tensor in quantized.named_parameters()}
    round_weights(quantized, [images])
    codes = codes_of(quantized.conv)
    export_onnx(quantized, images, tmp_path / "net.onnx")
    stored = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
        if list(tensor.dims) == list(codes.shape)
    ]
    assert any(np.array_equal(array, codes.numpy()) for array in stored)
    assert not torch.equal(codes, nearest)
    restore_modules(quantized)
    assert dict(quantized.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(quantized.get_parameter(name), weights[name]) for name in weights)
    swap_modules(quantized, images)
    calibrate_model(quantized, [images], method="max")
    assert torch.equal(codes_of(quantized.conv), nearest)


def test_the_same_seed_gives_the_same_weights(quantized, images):
    twin = copy.deepcopy(quantized)
    round_weights(quantized, [images])
    round_weights(twin, [images])
    assert torch.equal(quantized.conv._parameters["weight"], twin.conv._parameters["weight"])


@pytest.mark.parametrize("seed", [1.5, True, "0", -1])
@pytest.mark.parametrize("learn", [round_weights, reconstruct_blocks])
def test_wrong_seeds(quantized, images, learn, seed):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"seed is {seed!r}"):
        learn(quantized, [images], seed=seed)


def test_reference_is_the_target(quantized, images):
    reference = copy.deepcopy(quantized)
    with torch.no_grad():
        quantized.stem.bias.add_(0.5)
    round_weights(quantized, [images], reference=reference)
    torch.testing.assert_close(quantized.stem.bias, reference.stem.bias, atol=0.05, rtol=0)
    report = correct_bias(quantized, [images], reference=reference)
    assert report.before_db > 30


def test_layers_that_run_twice_are_left_alone(images):
    shared = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), shared, nn.ReLU(), shared, nn.Conv2d(16, 16, 1)
    )
    swap_modules(model, images, include=["*"])
    calibrate_model(model, [images])
    weight = shared.weight.clone()
    report = round_weights(model, [images])
    assert {entry.layer: entry.reason for entry in report.layers if entry.reason} == {
        "1": "it runs 2 times in one forward"
    }
    assert torch.equal(shared.weight, weight)


def test_interrupt_keeps_what_is_done(quantized, images, monkeypatch, caplog):
    from qdq.accuracy.adaround import _Problem

    logging.getLogger("qdq").setLevel(logging.WARNING)
    solve, calls = _Problem.solve, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self)

    weights = {name: quantized.get_submodule(name).weight.clone() for name in ("stem", "conv")}
    monkeypatch.setattr(_Problem, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round_weights(quantized, [images])
    assert "1 of 3 layers are rounded" in caplog.text
    assert not torch.equal(quantized.stem.weight, weights["stem"])
    assert torch.equal(quantized.conv.weight, weights["conv"])
    assert torch.isfinite(quantized(images)).all()


def test_the_gpu_rounds_as_the_cpu_does(quantized, gpu):
    batches = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    twin = copy.deepcopy(quantized).to(gpu)
    expected, report = (round_weights(model, batches) for model in (quantized, twin))
    assert report.before_db == pytest.approx(expected.before_db, abs=0.01)
    assert report.after_db == pytest.approx(expected.after_db, abs=0.3)
    for name in ("stem", "conv", "head"):
        codes, codes_of_gpu = (codes_of(model.get_submodule(name)) for model in (quantized, twin))
        assert (codes == codes_of_gpu.cpu()).float().mean() > 0.99


def test_rounding_seldom_waits_for_the_gpu(quantized, gpu):
    quantized.to(gpu)
    batches = [torch.randn(4, 3, 12, 12, device=gpu) for _ in range(2)]
    with watch(gpu) as events:
        report = round_weights(quantized, batches)
    num_waits = len(list_waits(events))
    print(f"round_weights: {num_waits} waits for {len(report.layers)} layers")
    assert num_waits <= len(report.layers) + 4


def test_residual_network_of_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    model = torchvision.models.regnet_x_400mf(num_classes=16).eval()
    images = torch.randn(4, 3, 64, 64)
    fold_batchnorm(model, images)
    swap_modules(model, images)
    calibrate_model(model, [images], method="max")
    report = round_weights(model, [images])
    assert report.after_db > report.before_db + 2
    assert not any(layer.reason for layer in report.layers)
    with disable_quantization(model):
        assert torch.isfinite(model(images)).all()


def test_the_page_runs(residual, images):
    page = Path(__file__).parents[2] / "docs" / "accuracy.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page.name, "exec"), {"model": residual, "batches": [images, images + 1]})  # noqa: S102
    assert "SQNR" in printed.getvalue()


@pytest.mark.parametrize("learn", [round_weights, reconstruct_blocks])
def test_fp8_weights_keep_their_nearest_code(residual, images, learn):
    fp8 = QuantDescriptor(num_bits=(4, 3))
    swap_modules(residual, images, input_desc=fp8, weight_desc=fp8)
    calibrate_model(residual, [images])
    before = {name: value.clone() for name, value in residual.state_dict().items()}
    with pytest.raises(StateError, match="all weights are FP8"):
        learn(residual, [images])
    after = residual.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
