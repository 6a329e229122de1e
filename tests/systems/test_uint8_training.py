"""UINT8 training: values and gradients against formulas in numpy, averages, and a run of `finetune`."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq import distributed
from qdq.errors import ArgumentError, StateError
from qdq.systems import (
    UInt8Activation,
    UInt8Weight,
    bias_codes,
    moving_ranges,
    prepare_uint8_training,
)


def quantize_exactly(values, low, high, lowest, highest):
    """The values, and the nudged range, in float64."""
    values = values.detach().double().numpy()
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (highest - lowest)
    zero_point = np.clip(np.rint(lowest - low / scale), lowest, highest)
    codes = np.clip(np.rint(values / scale) + zero_point, lowest, highest)
    ends = scale * (lowest - zero_point), scale * (highest - zero_point)
    return scale * (codes - zero_point), codes, ends


@pytest.mark.parametrize("shift", [-3.0, -0.3, 0.0, 0.8, 4.0])
def test_weights_have_codes_1_to_255(shift):
    values = torch.randn(30, 20) + shift
    expected, codes, _ = quantize_exactly(values, float(values.min()), float(values.max()), 1, 255)
    result = UInt8Weight()(values)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    assert codes.min() - 128 >= -127
    grid = UInt8Weight().describe(values)
    assert (grid.lowest, grid.highest) == (1, 255)
    integers = result / grid.scale + grid.zero_point
    assert (integers - integers.round()).abs().max() < 1e-3
    assert integers.min() > 0.99


@pytest.mark.parametrize("shift", [-3.0, -0.3, 0.0, 0.8, 4.0])
def test_symmetric_weights_have_codes_of_tensorrt(shift):
    values = torch.randn(30, 20) + shift
    result = UInt8Weight(symmetric=True)(values)
    grid = UInt8Weight(symmetric=True).describe(values)
    assert (grid.lowest, grid.highest, grid.obstacle) == (-127, 127, "")
    assert not grid.zero_point.any()
    scale = values.abs().max() / 127
    torch.testing.assert_close(result, (values / scale).round() * scale)


def observe(quantizer, *batches):
    """Train on batches."""
    quantizer.train()
    for batch in batches:
        quantizer(batch)
    return quantizer.eval()


def test_the_range_is_an_average_of_the_extremes():
    batches = [torch.randn(100) * size for size in (1, 2, 3, 4)]
    quantizer = observe(UInt8Activation(decay=0.9), *batches)
    weights = 0.9 ** np.arange(3, -1, -1)
    weights /= weights.sum()
    low = float(weights @ [float(batch.min()) for batch in batches])
    high = float(weights @ [float(batch.max()) for batch in batches])
    values = torch.linspace(-20, 20, 1001)
    expected, _, _ = quantize_exactly(values, low, high, 0, 255)
    np.testing.assert_allclose(quantizer(values).numpy(), expected, atol=1e-5)
    before = quantizer.describe(None)
    quantizer(100 * values)  # in evaluation mode the range does not move
    assert torch.equal(quantizer.describe(None).scale, before.scale)


def test_published_averages():
    """Batches with extremes -t and 2t, decay 0.999: -2.5012658 and 5.0025315 after four."""
    steps = [torch.tensor([-1.0, 2.0]) * step for step in (1, 2, 3, 4)]
    quantizer = observe(UInt8Activation(), *steps)
    scale = float(quantizer.describe(None).scale)
    assert scale * 255 == pytest.approx(2.5012658 + 5.0025315, rel=1e-5)


def test_the_gradient_passes_inside_the_nudged_range():
    quantizer = observe(UInt8Activation(), torch.tensor([-1.0, 3.0]))
    _, _, (low, high) = quantize_exactly(torch.zeros(1), -1.0, 3.0, 0, 255)
    assert low != -1
    edges = torch.tensor([low, high], dtype=torch.float32)
    grid = quantizer.describe(None)
    edges = torch.stack([-grid.zero_point * grid.scale, (255 - grid.zero_point) * grid.scale])
    values = torch.cat([edges.flatten(), torch.tensor([low - 0.001, 0.3, 2.99, high + 0.001])])
    values.requires_grad_()
    quantizer(values).sum().backward()
    assert values.grad.tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    values = torch.randn(100).to(dtype)
    quantizer = observe(UInt8Activation(), values)
    result = quantizer(values)
    assert result.dtype == dtype
    assert torch.equal(result, quantizer(values.float()).to(dtype))
    assert UInt8Weight()(values).dtype == dtype


@pytest.mark.parametrize(
    "values", [torch.zeros(4), torch.full((4,), 1e-45), torch.tensor([3e38, -3e38])]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_finite_values_stay_finite(values, symmetric):
    quantizer = observe(UInt8Activation(symmetric=symmetric), values)
    assert torch.isfinite(quantizer(values)).all()
    assert torch.isfinite(UInt8Weight(symmetric=symmetric)(values)).all()


def test_quantization_starts_after_the_delay():
    quantizer = UInt8Activation(delay=2).train()
    values = torch.randn(50)
    assert torch.equal(quantizer(values), values)
    assert torch.equal(quantizer(values), values)
    with pytest.raises(StateError, match="has seen 2 batches, with a delay of 2"):
        quantizer.describe(None)
    assert not torch.equal(quantizer(values), values)
    quantizer.describe(None)


def test_bad_calls_are_refused(monkeypatch):
    with pytest.raises(StateError, match=r"^fc: the range of its input has seen 0 batches"):
        UInt8Activation("fc").eval()(torch.randn(3))
    with pytest.raises(ValueError, match=r"^fc: .*not finite"):
        UInt8Activation("fc").train()(torch.tensor([torch.nan]))
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"delay": -1}):
        with pytest.raises(ArgumentError):
            prepare_uint8_training(nn.Linear(2, 2), torch.randn(1, 2), **options)
    with pytest.raises(ArgumentError, match="no float layer"):
        prepare_uint8_training(nn.ReLU(), torch.randn(1, 2))
    monkeypatch.setattr("qdq.systems.quantizer.find_rank", lambda: (0, 2))
    with pytest.raises(StateError, match="averages ranges in 2 processes"):
        UInt8Activation().train()(torch.randn(3))
    assert distributed.find_rank() == (0, 1)


class Concat(nn.Module):
    """Two branches, a concat, and a residual addition."""

    def __init__(self):
        super().__init__()
        self.left, self.norm = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.right = nn.Conv2d(1, 2, 1)
        self.joined = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        parts = torch.cat([torch.relu(self.norm(self.left(x))), 5 * self.right(x)], 1)
        return self.head((self.joined(parts) + parts).flatten(1))


def make_data():
    x = torch.randn(96, 1, 4, 4)
    return x, (x.mean((1, 2, 3)) * 8).clamp(-1, 1).round().long() + 1


def prepare(**options):
    x, labels = make_data()
    model = Concat()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    model.eval()
    float_outputs = model(x).detach()
    names = prepare_uint8_training(model, x[:2], **options)
    return model, names, x, labels, float_outputs


def test_batchnorm_is_folded_and_concat_has_one_scale():
    model, names, x, _, float_outputs = prepare()
    assert names == ["left", "right", "joined", "head"]
    assert isinstance(model.norm, nn.Identity)
    model.train()(x)
    model.eval()
    assert (model(x) - float_outputs).abs().max() < 0.1
    grid = model.joined.input_system.describe(None)
    assert grid.scale.shape == (1,)


def tune(model, x, labels, **options):
    batches = DataLoader(TensorDataset(x, labels), 32, shuffle=True)
    schedule = qdq.Schedule(epochs=2, lr=1e-3, bias_lr=1e-3)
    with moving_ranges(model):
        return qdq.finetune(
            model,
            batches,
            loss=qdq.cross_entropy,
            distillation=None,
            ranges="none",
            schedule=schedule,
            **options,
        )


def test_finetune_moves_weights_and_ranges_but_measurements_do_not():
    model, _, x, labels, _ = prepare()
    former = model.head.weight.detach().clone()
    tuning = tune(model, x, labels, held=[(x, labels)], measure_every=1)
    assert len(tuning.losses) == 6 and len(tuning.curve) == 7
    assert not torch.equal(model.head.weight, former)
    best = tuning.best_step
    for layer in (model.left, model.head):
        assert int(layer.input_system.num_steps) == best
        assert not layer.input_system.is_moving
    expected = model(x)
    loaded, *_ = prepare()
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(x), expected)


def test_a_stopped_run_resumes(tmp_path):
    model, _, x, labels, _ = prepare()
    start = copy.deepcopy(model)
    whole = tune(model, x, labels, folder=tmp_path / "whole")
    stopped = copy.deepcopy(start)

    class StopError(Exception):
        pass

    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 4:
            raise StopError

    handle = stopped.head.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        tune(stopped, x, labels, folder=tmp_path / "parts")
    handle.remove()
    resumed = copy.deepcopy(start)
    assert tune(resumed, x, labels, folder=tmp_path / "parts").losses == whole.losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("symmetric", [False, True])
def test_bias_codes_have_the_scale_of_the_products(symmetric):
    model, _, x, _, _ = prepare(symmetric=symmetric)
    model.train()(x)
    layer = model.head
    scale = (
        layer.input_system.describe(None).scale
        * UInt8Weight(symmetric=symmetric).describe(layer.weight).scale
    )
    codes = bias_codes(layer)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.double(), (layer.bias.double() / scale.double()).round())
    assert bias_codes(qdq.systems.layer.convert_layer(nn.Linear(2, 2, bias=False), None)) is None


def test_a_symmetric_model_has_the_grids_of_tensorrt():
    model, names, x, _, _ = prepare(symmetric=True)
    model.train()(x)
    for name in names:
        layer = model.get_submodule(name)
        for grid in (layer.input_system.describe(None), layer.weight_system.describe(layer.weight)):
            assert not grid.zero_point.any() and grid.obstacle == ""
            assert grid.lowest >= -128 and grid.highest == 127
