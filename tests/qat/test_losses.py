"""The losses against numpy in float64, the schedule and the moving average against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq.errors import ArgumentError
from qdq.qat.losses import Objective, divergence, relative_error
from qdq.quantizer import named_quantizers
from qdq.schedule import Schedule


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error(shape, dtype):
    found, expected = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    f, e = (t.double().numpy().reshape(5, -1) for t in (found, expected))
    signal = (e**2).sum(1)
    truth = (((f - e) ** 2).sum(1) / np.maximum(signal, 1e-3 * signal.mean())).mean()
    assert float(relative_error(found, expected)) == pytest.approx(truth, rel=1e-5)
    assert float(relative_error(torch.zeros(shape), torch.zeros(shape))) == 0


def test_a_sample_that_is_zero_in_the_float_model_costs_a_finite_loss():
    expected = torch.randn(8, 6)
    expected[2] = 0
    found = (expected + 0.1).requires_grad_()
    loss = relative_error(found, expected)
    loss.backward()
    signal = expected.double().numpy() ** 2
    floor = 1e-3 * signal.sum(1).mean()
    assert float(loss.detach()) == pytest.approx(
        (0.06 / np.maximum(signal.sum(1), floor)).mean(), rel=1e-4
    )
    assert torch.isfinite(found.grad).all()
    assert float(relative_error(torch.ones(4, 6), torch.zeros(4, 6))) == pytest.approx(6)


def test_distillation_survives_samples_that_a_relu_makes_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    nn.init.constant_(model[0].bias, -0.9)
    inputs = torch.randn(256, 16)
    with torch.no_grad():
        hidden = model[:2](inputs)
    assert (hidden.abs().sum(1) == 0).any()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [inputs])
    options = {"schedule": Schedule(steps=3), "distillation": qdq.Distillation(layers=["1"])}
    assert np.isfinite(qdq.finetune(model, [inputs], **options).losses).all()


def test_divergence():
    found, expected = torch.randn(6, 10) * 3, torch.randn(6, 10) * 3
    p, q = (np.exp(t.double().numpy()) for t in (expected, found))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert float(divergence(found, expected)) == pytest.approx(
        (p * np.log(p / q)).sum(1).mean(), rel=1e-5
    )


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_temperature_softens_the_classes(temperature):
    teacher, student = nn.Linear(6, 10), nn.Linear(6, 10)
    inputs = torch.randn(6, 6)
    with torch.no_grad():
        logits = [model(inputs).double().numpy() / temperature for model in (teacher, student)]
    p, q = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in logits)
    distillation = qdq.Distillation(mse=0, kl=0.3, features=0, temperature=temperature)
    loss = Objective(student, teacher, None, distillation)([inputs])
    expected = 0.3 * temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ArgumentError, match="temperature is"):
        qdq.Distillation(temperature=temperature)


def test_gradients_of_equal_outputs_are_finite():
    found = torch.randn(4, 10, requires_grad=True)
    (relative_error(found, found.detach()) + divergence(found, found.detach())).backward()
    assert torch.allclose(found.grad, torch.zeros(4, 10), atol=1e-6)


def test_the_rate_rises_then_falls_along_a_cosine():
    schedule = Schedule(steps=100, warm_up=0.1)
    rates = [schedule.rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10:] == pytest.approx(
        [(1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    )
    assert Schedule(steps=1, warm_up=0).rate_at(0, 1) == 1
    assert all(0 < Schedule(steps=n).rate_at(step, n) <= 1 for n in (1, 2, 3) for step in range(n))


def test_epochs_count_batches():
    assert Schedule(epochs=3).count_steps([1, 2]) == 6
    assert Schedule(steps=5, epochs=3).count_steps(iter([])) == 5


class Pair(nn.Module):
    """Two outputs, in a dictionary."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x, mask=None):
        x = torch.relu(self.stem(x))
        return {
            "boxes": self.left(x)[:, None].expand(-1, 2, -1),
            "scores": self.right(x),
            "count": len(x),
        }


def test_a_detector_with_several_outputs_and_its_own_loss():
    model = Pair().eval()
    batches = [{"x": torch.randn(8, 16), "mask": torch.ones(8, dtype=torch.bool)} for _ in range(3)]
    qdq.swap_modules(model, batches[0])
    qdq.calibrate_model(model, batches)
    seen = []

    def loss(outputs, batch):
        seen.append((set(outputs), set(batch)))
        return outputs["boxes"].square().mean()

    before = float(model(**batches[0])["boxes"].square().mean().detach())
    schedule = Schedule(steps=30, lr=1e-3, bias_lr=1e-3)
    tuning = qdq.finetune(model, batches, loss=loss, distillation=None, schedule=schedule)
    assert seen[0] == ({"boxes", "scores", "count"}, {"x", "mask"})
    assert tuning.losses[0] == pytest.approx(before)
    assert float(model(**batches[0])["boxes"].square().mean().detach()) < before
    assert np.isfinite(qdq.finetune(model, batches, schedule=Schedule(steps=2)).losses).all()


def test_a_model_without_floating_outputs_is_refused():
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [torch.randn(4, 16)])
    model.register_forward_hook(lambda *_: torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="no floating-point tensor"):
        qdq.finetune(model, [torch.randn(4, 16)], schedule=Schedule(steps=1))


def test_the_moving_average_of_the_largest_values(quantized):
    batches = [(index + 1.0) * torch.randn(4, 3, 12, 12) for index in range(3)]
    expected = float(quantized.stem.input_quantizer.amax)
    for batch in batches:
        expected = 0.99 * expected + 0.01 * float(batch.abs().max())
    schedule = Schedule(steps=3, tune_ranges=1)

    def metric(model):  # runs the model, which must not count
        model(100 * batches[0])
        return float(len(calls.append(1) or calls))

    calls = []
    qdq.finetune(
        quantized, batches, schedule=schedule, ranges="ema", metric=metric, measure_every=1
    )
    assert float(quantized.stem.input_quantizer.amax) == pytest.approx(expected)
    for layer in (quantized.stem, quantized.conv, quantized.head):
        largest = layer.weight.detach().abs().flatten(1).amax(1)
        assert torch.allclose(layer.weight_quantizer.amax.flatten(), largest)
    assert all(not quantizer._forward_pre_hooks for _, quantizer in named_quantizers(quantized))
