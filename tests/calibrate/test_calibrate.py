import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    Calibration,
    CalibrationError,
    calibrate_model,
    collect_statistics,
    disable_quantization,
    fold_batchnorm,
    rewire_operations,
    solve_ranges,
    swap_modules,
)
from qdq.calibrate import CALIB_METHODS
from qdq.formats import Format
from qdq.observers.solve import SOLVERS
from qdq.quantize import fake_quantize
from qdq.quantizer import QuantDescriptor, TensorQuantizer, named_quantizers


def record_inputs(model, batches):
    """What each convolution and linear layer of the float model sees: the independent truth."""
    inputs = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in inputs.items()}


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 12, 12), torch.randn(2, 3, 12, 12) * 3]


def test_max_is_the_maximum_of_the_float_model(residual, batches):
    inputs = record_inputs(residual, batches)
    swap_modules(residual)
    ranges = {r.name: r for r in calibrate_model(residual, batches, method="max")}
    for name, values in inputs.items():
        layer = residual.get_submodule(name)
        assert layer.input_quantizer.amax == values.abs().max()
        assert ranges[f"{name}._input_quantizer"].amax == values.abs().max()
        assert ranges[f"{name}._input_quantizer"].batches == 2
        reduced_axes = tuple(range(1, layer.weight.dim()))
        assert torch.equal(
            layer.weight_quantizer.amax.flatten(), layer.weight.detach().abs().amax(reduced_axes)
        )


@pytest.mark.parametrize("method", [method for method in CALIB_METHODS if method != "max"])
def test_all_methods_stay_inside_the_data(residual, batches, method):
    inputs = record_inputs(residual, batches)
    swap_modules(residual)
    calibrate_model(residual, batches, method=method)
    for name, values in inputs.items():
        amax = residual.get_submodule(name).input_quantizer.amax.item()
        assert 0 < amax <= values.abs().max() * 1.001


def test_percentile_is_passed_on(residual, batches):
    inputs = record_inputs(residual, batches)
    swap_modules(residual)
    calibrate_model(residual, batches, method="percentile", percentile=90)
    expected = np.quantile(inputs["conv"].abs().numpy(), 0.9)
    assert residual.conv.input_quantizer.amax.item() == pytest.approx(expected, rel=0.02)


def test_states_and_modes_are_put_back(residual, batches):
    swap_modules(residual)
    residual.train()
    residual.conv.eval()
    calibrate_model(residual, batches)
    assert residual.training
    assert not residual.conv.training
    assert residual.stem.training
    assert all(q._if_quant and not q._if_calib for _, q in named_quantizers(residual))
    assert residual.norm.num_batches_tracked == 0


def test_excluded_layers_are_left_alone(residual, batches):
    swap_modules(residual)
    residual.conv.input_quantizer.disable()
    residual.conv.weight_quantizer.disable()
    names = {r.name for r in calibrate_model(residual, batches)}
    assert not any(name.startswith("conv") for name in names)
    assert residual.conv.input_quantizer.amax is None


def test_quantizer_placed_by_hand_is_calibrated():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.residual_quantizer = TensorQuantizer()

        def forward(self, x):
            return self.layer(x) + self.residual_quantizer(x)

    model, x = Shortcut(), torch.randn(3, 16)
    swap_modules(model)
    calibrate_model(model, [x], method="max")
    assert model.residual_quantizer.amax == x.abs().max()


def test_a_quantizer_with_an_axis_takes_maxima_and_says_so(residual, batches, caplog):
    swap_modules(residual, exclude=["head"], input_desc=QuantDescriptor(axis=1))
    with caplog.at_level("INFO", logger="qdq.calibrate"):
        ranges = {r.name: r for r in calibrate_model(residual, batches, method="mse")}
    torch.testing.assert_close(
        residual.stem.input_quantizer.amax.flatten(), torch.cat(batches).abs().amax((0, 2, 3))
    )
    assert ranges["stem._input_quantizer"].method == "max"
    assert "use the maximum, not mse: stem._input_quantizer" in caplog.text


def test_inference_mode_and_then_without(residual, batches):
    swap_modules(residual)
    with torch.inference_mode():
        calibrate_model(residual, batches)
    calibrate_model(residual, batches)


def test_one_tensor_is_no_loader(residual, batches):
    swap_modules(residual)
    with pytest.raises(ArgumentTypeError, match="one Tensor"):
        calibrate_model(residual, batches[0])


def test_weights_alone(residual, batches):
    swap_modules(residual)
    for layer in (residual.stem, residual.conv, residual.head):
        layer.input_quantizer.disable()
    ranges = calibrate_model(residual, batches)
    assert {r.name for r in ranges} == {
        f"{name}._weight_quantizer" for name in ("stem", "conv", "head")
    }
    assert residual.conv.input_quantizer.amax is None


def test_calibrating_again_replaces_the_range(residual, batches):
    swap_modules(residual)
    calibrate_model(residual, batches, method="max")
    calibrate_model(residual, [batches[0] * 0.1], method="max")
    assert residual.stem.input_quantizer.amax == (batches[0] * 0.1).abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_nan_names_layer_and_batch(residual, batches, bad, method):
    swap_modules(residual)
    batches[1][0, 0, 0, 0] = bad
    with pytest.raises(
        CalibrationError, match=r"batch 1: the input of quantizer stem\._input_quantizer: 1 of"
    ):
        calibrate_model(residual, batches, method=method)
    assert all(
        q.amax is None and q._if_quant and not q._if_calib for _, q in named_quantizers(residual)
    )


def test_nan_in_a_weight_names_the_layer(residual, batches):
    swap_modules(residual)
    residual.head.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"head\.weight holds 1 NaN"):
        calibrate_model(residual, batches)


def test_empty_loader(residual):
    swap_modules(residual)
    with pytest.raises(CalibrationError, match="no batch reached"):
        calibrate_model(residual, [])


def test_an_empty_loader_leaves_no_file_behind(residual, batches, tmp_path):
    swap_modules(residual)
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(CalibrationError, match="no batch reached"):
        calibrate_model(residual, [], statistics=path)
    assert not path.exists()
    assert calibrate_model(residual, batches, statistics=path)


def test_memory_of_an_input_that_is_filled_again(residual):
    swap_modules(residual)
    memory = np.ones((1, 3, 8, 8), np.float32)
    data = torch.from_numpy(memory)
    with Calibration(residual, "max") as calibration:
        for value in (1, 10, 100):
            memory[:] = value
            residual(data)
    assert calibration.ranges[0].amax == 100


def test_a_mask_of_the_least_float(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    swap_modules(model)
    data = torch.randn(4, 16)
    data[:, :2] = torch.finfo(torch.float32).min
    ranges = calibrate_model(model, [data], method="max", statistics=tmp_path / "s.safetensors")
    assert ranges[0].amax == torch.finfo(torch.float32).max


def test_what_was_off_while_collecting_is_named(residual, batches):
    swap_modules(residual)
    names = dict(named_quantizers(residual))
    layer = next(iter(names)).rpartition(".")[0]
    quantizers = [quantizer for name, quantizer in names.items() if name.startswith(f"{layer}.")]
    for quantizer in quantizers:
        quantizer.disable()
    statistics = collect_statistics(residual, batches)
    for quantizer in quantizers:
        quantizer.enable()
    with pytest.raises(
        ArgumentError, match=f"no statistics of {layer}._input_quantizer: it was off"
    ):
        solve_ranges(residual, statistics)


def test_other_batchnorm_statistics_are_other_sources(batches, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)).eval()
    swap_modules(model)
    calibrate_model(model, batches, statistics=tmp_path / "s.safetensors")
    model[1].running_var.fill_(1e-4)
    with pytest.raises(ArgumentError, match="other weights or other data"):
        calibrate_model(model, batches, statistics=tmp_path / "s.safetensors")


def test_a_pass_that_was_cut_off_is_said(residual, batches, caplog):
    swap_modules(residual)
    statistics = dataclasses.replace(collect_statistics(residual, batches), complete=False)
    solve_ranges(residual, statistics)
    assert f"cut off after {len(batches)} batches" in caplog.text


def test_a_second_block_goes_on_counting(residual, batches):
    swap_modules(residual)
    calibration = Calibration(residual)
    for _ in range(2):
        with calibration:
            residual(batches[0])
    assert calibration.statistics.batches == 2


def test_nothing_to_calibrate(residual, batches):
    with pytest.raises(ArgumentError, match="swap_modules"):
        calibrate_model(residual, batches)


@pytest.mark.parametrize(
    ("options", "words"), [({"method": "kl"}, "kl"), ({"percentile": 101}, "101")]
)
def test_bad_options(residual, batches, options, words):
    swap_modules(residual)
    with pytest.raises(ArgumentError, match=words):
        calibrate_model(residual, batches, **options)


@pytest.mark.parametrize("method", ["max", "entropy", "best"])
def test_layer_without_data_is_left_in_float_and_named(batches, method, caplog):
    model = nn.Sequential(nn.Conv2d(3, 16, 1))
    model.spare = nn.Linear(16, 16)
    model.forward = lambda x: model[0](x)
    swap_modules(model)
    ranges = calibrate_model(model, batches, method=method)
    notes = {r.name: r.note for r in ranges if r.note}
    assert set(notes) == {"spare._input_quantizer", "spare._weight_quantizer"}
    assert "saw no batch" in notes["spare._input_quantizer"]
    assert model.spare.input_quantizer._disabled
    assert model.spare.weight_quantizer._disabled
    assert "spare._input_quantizer (it saw no batch" in caplog.text


@pytest.mark.parametrize("method", CALIB_METHODS)
def test_zeros_only_are_left_in_float_and_named(method, caplog):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1)
    swap_modules(model)
    x = torch.randn(8, 16)
    ranges = calibrate_model(model, [x], method=method)
    assert {r.name: r.note for r in ranges if r.note} == {
        "2._input_quantizer": "left in float: it saw zeros only",
        "2._weight_quantizer": "left in float: the _input_quantizer of its layer has no range: it saw zeros only",
    }
    assert "zeros only" in caplog.text
    assert torch.isfinite(model(x)).all()


def test_dead_channel_gets_a_positive_scale(batches):
    layer = nn.Conv2d(3, 16, 1)
    layer.weight.data[2] = 0
    swap_modules(layer)
    calibrate_model(layer, batches)
    assert layer.weight_quantizer.amax.flatten()[2] == 0
    assert (layer.weight_quantizer.scale > 0).all()
    assert torch.isfinite(layer(batches[0])).all()


def test_with_block_and_any_forward(residual, batches):
    swap_modules(residual)
    with Calibration(residual, "max") as calibration:
        for batch in batches:
            residual.head(residual.pool(residual.conv(residual.stem(batch))).flatten(1))
    assert len(calibration.ranges) == 6


def test_block_that_raises_touches_nothing(residual, batches):
    swap_modules(residual)
    residual.head = nn.Linear(3, 3)  # does not fit what comes before
    with pytest.raises(RuntimeError, match="shapes"), Calibration(residual):
        residual(batches[0])
    assert all(q.amax is None and not q._if_calib for _, q in named_quantizers(residual))


def test_batches_of_pairs_and_dictionaries(residual, batches):
    swap_modules(residual)
    calibrate_model(residual, [(batch, torch.zeros(4)) for batch in batches], method="max")
    first = residual.stem.input_quantizer.amax.clone()
    calibrate_model(residual, [{"images": batch} for batch in batches], method="max")
    assert residual.stem.input_quantizer.amax == first


def quantize(values, amax, fmt):
    """By the definition, in float64."""
    scale = amax.double().clamp_min(2.0**-64) / fmt.qmax
    return (values.double() / scale).round().clamp(fmt.qmin, fmt.qmax) * scale


@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize(
    "make_layer", [lambda: nn.Conv2d(8, 16, 3), lambda: nn.Linear(64, 16)], ids=["conv", "linear"]
)
def test_weights_by_mse(make_layer, axis, num_bits):
    """The best of 350 ranges for each channel is hardly better, and the maximum is never better.

    With 8 bits and few weights the error jumps from one range to the next, so that a finer grid always finds less.
    """
    layer = make_layer()
    layer.weight.data[3, 5] *= 20
    layer.weight.data[7] = 0
    swap_modules(layer, weight_desc=QuantDescriptor(num_bits, axis=axis), include=[""])
    shape = (2, 8, 9, 9) if isinstance(layer, nn.Conv2d) else (2, 64)
    ranges = {
        r.name: r
        for r in calibrate_model(layer, [torch.randn(shape)], method="max", weight_method="mse")
    }
    assert ranges["_weight_quantizer"].method == "mse"
    rows = layer.weight.detach().reshape(1 if axis is None else 16, -1)
    amax, fmt = layer.weight_quantizer.amax.reshape(-1, 1), layer.weight_quantizer.format
    largest = rows.abs().amax(1, keepdim=True)

    def error(candidate):
        return (quantize(rows, candidate, fmt) - rows).square().sum(1)

    grid = torch.stack([error(largest * i / 400) for i in range(50, 401)])
    assert error(amax).sum() <= (1.15 if num_bits == 8 else 1.02) * grid.amin(0).sum()
    assert (error(amax) <= error(largest)).all()
    assert (amax <= largest).all()


def test_best_is_the_best_of_every_layer(residual, batches):
    """By brute force: each layer's output on the batch held out, for every method."""
    swap_modules(residual)
    held_out = torch.randn(3, 3, 12, 12)
    inputs = record_inputs(residual, [])
    with disable_quantization(residual):
        inputs = record_inputs(residual, [held_out])
    chosen = {r.name: r for r in calibrate_model(residual, batches, method="best", held=[held_out])}
    candidates = {
        method: {
            r.name: r.amax for r in calibrate_model(copy.deepcopy(residual), batches, method=method)
        }
        for method in CALIB_METHODS
        if method != "best"
    }
    for name, values in inputs.items():
        layer = residual.get_submodule(name)
        float_layer = copy.deepcopy(layer)
        with disable_quantization(float_layer), torch.no_grad():
            expected = float_layer(values)
        errors = {}
        for method, amaxes in candidates.items():
            layer.input_quantizer.amax = amaxes[f"{name}._input_quantizer"]
            with torch.no_grad():
                errors[method] = (layer(values) - expected).double().square().sum().item()
        method = chosen[f"{name}._input_quantizer"].method
        assert errors[method] <= min(errors.values()) * (1 + 1e-9)
        assert (
            chosen[f"{name}._input_quantizer"].amax
            == candidates[method][f"{name}._input_quantizer"]
        )


def test_best_of_quantizers_that_share_a_range_or_have_no_layer(images):
    model = rewired_block()
    ranges = calibrate_model(model, [images, images * 2], method="best")
    assert all(r.method in CALIB_METHODS and r.amax is not None for r in ranges)
    functions = [r for r in ranges if "add" in r.name]
    assert functions
    assert all(q._if_quant and not q._disabled for _, q in named_quantizers(model))


def rewired_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = (
                nn.Conv2d(3, 16, 1),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.Conv2d(16, 16, 1),
            )

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.two(torch.relu(self.one(x) + x))

    model = Block()
    swap_modules(model)
    rewire_operations(model, torch.randn(4, 3, 12, 12))
    return model


def test_best_holds_out_the_last_batch(residual, batches):
    swap_modules(residual)
    ranges = {
        r.name: r for r in calibrate_model(residual, [*batches, batches[0] * 99], method="best")
    }
    assert ranges["stem._input_quantizer"].batches == 2
    assert ranges["stem._input_quantizer"].amax <= torch.cat(batches).abs().max()
    by_name = {r.name: r for r in calibrate_model(residual, batches[:1], method="best")}
    assert by_name["stem._input_quantizer"].batches == 1


def test_best_tries_a_layer_without_counting_it_as_a_call_of_the_forward_around_it(caplog):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return nn.functional.linear(self.layer(x).relu(), self.weight)

    batches = [torch.randn(8, 16) for _ in range(3)]
    model = Mixed().eval()
    swap_modules(model)
    rewire_operations(model, batches[0])
    name = "_linear_input0_quantizer"
    ranges = {r.name: r for r in calibrate_model(model, batches, method="best")}
    assert "no held-out batch reached" not in caplog.text
    statistics = collect_statistics(model, batches[:-1])
    calls = []
    handle = model.layer.register_forward_hook(lambda *args: calls.append(args[2].relu()))
    with torch.no_grad(), disable_quantization(model):
        model(batches[-1])
    handle.remove()
    errors = {
        method: float(
            (
                fake_quantize(calls[0], torch.tensor(statistics.solve(name, method)), Format())
                - calls[0]
            )
            .square()
            .sum()
        )
        for method in SOLVERS
    }
    assert ranges[name].method == min(errors, key=errors.get)


def test_best_refuses_what_it_cannot_compare_on(residual, batches):
    swap_modules(residual)
    with pytest.raises(CalibrationError, match="held-out batches give NaN or Inf"):
        calibrate_model(residual, [*batches, torch.full_like(batches[0], math.nan)], method="best")
    with pytest.raises(ArgumentTypeError, match="pass \\[batch\\]"):
        calibrate_model(residual, batches, method="best", held=batches[0])


def test_best_of_what_no_held_batch_reaches_is_named(images, caplog):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)

        def forward(self, x):
            return self.a(x) if x.shape[0] == 1 else self.a(x) + self.b(x)

    model = Gate().eval()
    swap_modules(model)
    ranges = calibrate_model(model, [images], method="best", held=[images[:1]])
    assert {r.name: r.method for r in ranges}["b._input_quantizer"] == "mse"
    assert "no held-out batch reached b._input_quantizer; it uses mse" in caplog.text


def test_best_needs_data(residual, batches):
    swap_modules(residual)
    with pytest.raises(ArgumentError, match="with-block"):
        Calibration(residual, "best")
    statistics = collect_statistics(residual, batches)
    with pytest.raises(ArgumentError, match="got no batch"):
        solve_ranges(residual, statistics, method="best")


def test_an_error_while_solving_puts_all_ranges_back(residual, batches):
    swap_modules(residual)
    calibrate_model(residual, batches, method="max")
    former_ranges = {name: q.amax.clone() for name, q in named_quantizers(residual)}
    with pytest.raises(RuntimeError, match="Expected 3D"):
        calibrate_model(residual, [batches[0] * 5], method="best", held=[torch.ones(1, 1)])
    assert all(torch.equal(q.amax, former_ranges[name]) for name, q in named_quantizers(residual))
    assert all(q._if_quant and not q._disabled for _, q in named_quantizers(residual))


def test_weights_may_keep_their_ranges(residual, batches):
    swap_modules(residual)
    residual.conv._weight_quantizer.amax = torch.full((16, 1, 1, 1), 3.0)
    calibrate_model(residual, batches, weight_method="keep")
    assert (residual.conv._weight_quantizer.amax == 3).all()
    largest = residual.head.weight.detach().abs().amax(1)  # it had none
    assert torch.equal(residual.head._weight_quantizer.amax.flatten(), largest)


def test_unknown_weight_method(residual, batches):
    swap_modules(residual)
    with pytest.raises(ArgumentError, match="unknown weight method 'kl'"):
        calibrate_model(residual, batches, weight_method="kl")


def prepare_pair(model, images, gpu):
    """The model folded, swapped and rewired, and the same on the GPU."""
    fold_batchnorm(model, images)
    swap_modules(model, images)
    rewire_operations(model, images)
    return model, copy.deepcopy(model).to(gpu)


@pytest.mark.parametrize("method", ["max", "percentile", "entropy", "mse", "average_max", "best"])
def test_gpu_gives_the_ranges_of_the_cpu(residual, batches, gpu, method, monkeypatch):
    """To the last bit, also where TF32 is allowed; the sums that best may choose are added in another order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, moved = prepare_pair(residual, batches[0], gpu)
    expected = calibrate_model(model, batches, method=method)
    ranges = calibrate_model(moved, batches, method=method)
    assert torch.backends.cudnn.allow_tf32
    for calculated, truth in zip(ranges, expected, strict=True):
        if method != "best":
            assert calculated == truth
            continue
        assert (calculated.name, calculated.method) == (truth.name, truth.method)
        assert calculated.amax == pytest.approx(truth.amax, rel=1e-6)
    for name, quantizer in named_quantizers(moved):
        if quantizer.amax is not None:
            assert quantizer.amax.device == gpu, name


@pytest.mark.parametrize("method", ["laplace", "gauss", "mean_std"])
def test_gpu_gives_the_ranges_of_the_cpu_but_rounding(residual, batches, gpu, method):
    model, moved = prepare_pair(residual, batches[0], gpu)
    expected = [r.amax for r in calibrate_model(model, batches, method=method)]
    ranges = [r.amax for r in calibrate_model(moved, batches, method=method)]
    for calculated, truth in zip(ranges, expected, strict=True):
        assert calculated == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("method", ["max", "mse", "entropy", "percentile", "best"])
def test_gpu_is_waited_for_as_often_for_many_batches_as_for_one(residual, gpu, method):
    """Once for the digest of the weights, the statistics and the ranges of weights; once more for best."""
    batches = [torch.randn(2, 3, 12, 12) for _ in range(12)]
    _, model = prepare_pair(residual, batches[0], gpu)
    most = 4 if method == "best" else 3
    for num_batches in (1, 12):
        with watch(gpu) as events:
            calibrate_model(model, batches[:num_batches], method=method, held=batches[:num_batches])
        assert len(list_waits(events)) <= most, list_waits(events)


def test_gpu_is_not_waited_for_in_a_batch_of_resnet18(gpu):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    batches = list(torch.randn(3, 1, 3, 32, 32))
    _, model = prepare_pair(torchvision.models.resnet18().eval(), batches[0], gpu)
    waits = []

    def stream():
        with watch(gpu) as events:
            for batch in batches:
                yield batch
                waits.append(list_waits(events))
                events.clear()

    collect_statistics(model, stream())
    assert len(waits) == 3
    assert len(waits[0]) <= 1, waits[0]  # the digest of the weights
    assert not any(waits[1:]), waits[1:]


def test_gpu_in_a_with_block(residual, batches, gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, moved = prepare_pair(residual, batches[0], gpu)
    on_device = [batch.to(gpu) for batch in batches]
    with Calibration(model, "max") as expected:
        for batch in batches:
            model(batch)
    with watch(gpu) as events, Calibration(moved, "max") as calibration:
        for batch in on_device:
            moved(batch)
        assert list_waits(events) == []
    assert len(list_waits(events)) <= 2, list_waits(events)
    assert calibration.ranges == expected.ranges


def test_gpu_with_deterministic_algorithms(residual, batches, gpu):
    model, moved = prepare_pair(residual, batches[0], gpu)
    expected = calibrate_model(model, batches)
    torch.use_deterministic_algorithms(True)
    try:
        assert calibrate_model(moved, batches) == expected
        ranges = calibrate_model(moved, batches, method="best", weight_method="mse")
    finally:
        torch.use_deterministic_algorithms(False)
    assert ranges == calibrate_model(moved, batches, method="best", weight_method="mse")


def test_gpu_ranges_of_weights_by_mse(residual, batches, gpu):
    model, moved = prepare_pair(residual, batches[0], gpu)
    expected = calibrate_model(model, batches, method="max", weight_method="mse")
    with watch(gpu) as events:
        ranges = calibrate_model(moved, batches, method="max", weight_method="mse")
    assert len(list_waits(events)) <= 3, list_waits(events)
    assert ranges == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gpu_names_layer_and_batch_of_nan(residual, batches, gpu, bad):
    swap_modules(residual)
    moved = residual.to(gpu)
    batches[1][1, 2, 3, 4] = bad
    index = np.ravel_multi_index((1, 2, 3, 4), batches[1].shape)
    message = rf"quantizer stem\._input_quantizer: batch 1: 1 of 864 .* at flat index {index};"
    with watch(gpu) as events, pytest.raises(CalibrationError, match=message):
        calibrate_model(moved, batches)
    assert len(list_waits(events)) <= 2, list_waits(events)
    assert all(q.amax is None and not q._if_calib for _, q in named_quantizers(moved))


def test_gpu_nan_in_a_weight_names_the_layer(residual, batches, gpu):
    swap_modules(residual)
    moved = residual.to(gpu)
    moved.head.weight.data[0, 0] = math.nan
    with pytest.raises(CalibrationError, match=r"head\.weight holds 1 NaN"):
        calibrate_model(moved, batches)


def test_model_on_two_devices(batches, gpu):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.second(x.to(self.second.weight.device))

    model = Split().eval()
    swap_modules(model)
    for method in ("mse", "best"):
        expected = calibrate_model(copy.deepcopy(model), batches, method=method)
        for first, second in (("cpu", gpu), (gpu, "cpu")):
            split = copy.deepcopy(model)
            split.first.to(first)
            split.second.to(second)
            ranges = calibrate_model(split, batches, method=method)
            assert [r.method for r in ranges] == [r.method for r in expected]
            assert [r.amax for r in ranges] == [pytest.approx(r.amax, rel=1e-6) for r in expected]
