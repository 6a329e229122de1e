"""Fine-tuning as a pass: what it gains on other data, what it may change, and how it is taken back."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq import recover
from qdq.corrections import list_passes
from qdq.qat.trainer import Trainer
from qdq.quantizer import named_quantizers


class Net(nn.Module):
    """Blocks, a LayerNorm, BatchNorm that stays, and an embedding that shares the weight of a layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)])
        self.after = nn.LayerNorm(16)
        self.words = nn.Embedding(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = (block(x) + x).relu()
        x = self.after(x.mean((2, 3))) * self.scale
        return self.head(self.tied(x) + x)


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, 8, 8, generator=generator), torch.randn(
        48, 3, 8, 8, generator=generator
    )


def quantize(model, samples):
    qdq.swap_modules(model, samples[:2], include=["*"])
    qdq.calibrate_model(model, [samples])
    with torch.no_grad():  # coarse weights: training can make up for much of it
        for layer in (model.stem, *model.blocks):
            layer.weight_quantizer.amax = layer.weight_quantizer.amax * 12
    return model


@pytest.fixture
def net(samples):
    torch.manual_seed(1)
    return quantize(Net().eval(), samples[0])


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(state, expected):
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=0)


def measure_db(model, reference, images):
    """SQNR in dB, in float64."""
    with torch.no_grad():
        expected = reference(images).double().numpy()
        noise = model(images).double().numpy() - expected
    return 10 * np.log10(np.square(expected).sum() / np.square(noise).sum())


def tune(model, images, **options):
    return qdq.tune_weights(model, [images], **{"steps": 8, "lr": 1e-3, "bias_lr": 1e-3} | options)


def test_other_samples_gain(net, samples):
    fitted, held_out = samples
    reference = copy.deepcopy(net)
    qdq.restore_modules(reference)
    before, before_fitted = (measure_db(net, reference, images) for images in (held_out, fitted))
    report = tune(net, fitted, steps=60)
    assert measure_db(net, reference, held_out) > before + 3
    assert report.before_db == pytest.approx(before_fitted, abs=1e-4)
    assert report.after_db == pytest.approx(measure_db(net, reference, fitted), abs=1e-4)
    assert len(report.losses) == 60
    assert "4 layers fine-tuned in 60 steps" in report.format_table()


def test_in_an_effort_it_stays_and_is_fitted_to_all_samples(samples, monkeypatch):
    torch.manual_seed(1)
    model = Net().eval()
    fitted, held_out = samples
    judge = qdq.Judge(model, [held_out])
    quantize(model, fitted)
    judge.measure("calibrated", model)
    options = {"steps": 60, "lr": 1e-3, "bias_lr": 1e-3}
    tuning = ("weights fine-tuned", partial(qdq.tune_weights, **options))
    monkeypatch.setattr(recover, "_PASSES", recover._PASSES | {"tune_weights": tuning})
    monkeypatch.setattr(recover, "EFFORTS", {"best": ("tune_weights",)})
    by_hand = copy.deepcopy(model)
    steps = qdq.recover_accuracy(model, [fitted], judge, effort="best", refit=samples)
    qdq.tune_weights(by_hand, samples, **options)

    calibrated, tuned = steps.steps
    assert tuned.sqnr_db > calibrated.sqnr_db + 1
    assert not tuned.is_undone
    assert steps.notes[-1].endswith("fitted to all calibration samples: tune_weights")
    assert_equal(model.state_dict(), by_hand.state_dict())


def test_only_weights_and_biases_of_int8_layers_change(net, samples):
    net.blocks[1].weight_quantizer.disable()
    net.blocks[1].input_quantizer.disable()
    net.head.requires_grad_(False)
    needed = [parameter.requires_grad for parameter in net.parameters()]
    before = copy_state(net)
    random_state = torch.get_rng_state()
    report = tune(net, samples[0])
    changed = {
        name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"stem.weight", "stem.bias", "blocks.0.weight", "head.weight", "head.bias"}
    assert report.layers == ("stem", "blocks.0", "head")
    assert report.skipped == {
        "blocks.1": "it is in float",
        "tied": "another module uses its weight or bias, too",
    }
    assert "  tied: another module uses its weight or bias, too" in report.format_table()
    assert [parameter.requires_grad for parameter in net.parameters()] == needed
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_float_model_stays(net, samples):
    fitted, held_out = samples
    before = copy_state(net)
    with qdq.disable_quantization(net), torch.no_grad():
        expected = net(held_out)
    tune(net, fitted)
    with qdq.disable_quantization(net), torch.no_grad():
        assert torch.equal(net(held_out), expected)
    qdq.restore_modules(net)
    state = net.state_dict()
    assert_equal(state, {name: before[name] for name in state})


def test_the_seed_decides(net, samples):
    twin, other = copy.deepcopy(net), copy.deepcopy(net)
    tune(net, samples[0])
    torch.randn(5)  # what ran before does not matter
    tune(twin, samples[0])
    tune(other, samples[0], seed=1)
    assert_equal(twin.state_dict(), net.state_dict())
    assert not torch.equal(other.head.weight, net.head.weight)
    tune(net, samples[0])  # starts again from the calibrated model
    assert_equal(twin.state_dict(), net.state_dict())


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_stopped_in_a_step(raised, net, samples, monkeypatch):
    qdq.correct_bias(net, [samples[0]])
    before = copy_state(net)
    run_step = Trainer.run_step

    def stop(trainer, batch):
        if trainer.step == 2:
            raise raised
        return run_step(trainer, batch)

    monkeypatch.setattr(Trainer, "run_step", stop)
    with pytest.raises(KeyboardInterrupt if raised is KeyboardInterrupt else qdq.StateError):
        tune(net, samples[0])
    assert_equal(net.state_dict(), before)
    assert [entry.name for entry in list_passes(net)] == ["correct_bias"]
    assert all(parameter.requires_grad for parameter in net.parameters())


class WithoutGradient(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class InPlace(Net):
    def forward(self, x):
        x = super().forward(x).exp()
        return x.add_(1)  # changes what the backward pass of the exponential needs


@pytest.mark.parametrize("kind", [WithoutGradient, InPlace])
def test_a_model_without_a_gradient_is_left_out(kind, samples, monkeypatch):
    monkeypatch.setattr(recover, "EFFORTS", {"best": ("tune_weights",)})
    fitted, held_out = samples
    model = kind().eval()
    judge = qdq.Judge(model, [held_out])
    quantize(model, fitted)
    before = copy_state(model)
    with pytest.raises(qdq.StateError, match=r"gradient|depends on nothing"):
        tune(model, fitted)
    assert_equal(model.state_dict(), before)

    judge.measure("calibrated", model)
    steps = qdq.recover_accuracy(model, [fitted], judge, effort="best")
    assert steps.notes[-1].startswith("tune_weights was left out: ")


def test_wrong_states(net, samples):
    fitted = samples[0]
    before = copy_state(net)
    with torch.inference_mode(), pytest.raises(qdq.StateError, match="inference_mode"):
        tune(net, fitted)
    with pytest.raises(qdq.ArgumentError, match="outputs names logits"):
        tune(net, fitted, outputs={"logits": "logits"})
    with pytest.raises(qdq.ArgumentTypeError, match="batches is one Tensor"):
        qdq.tune_weights(net, fitted)
    assert_equal(net.state_dict(), before)
    half = copy.deepcopy(net).half()
    with pytest.raises(qdq.StateError, match="float16"):
        tune(half, fitted[:8].half())
    for _, quantizer in named_quantizers(net):
        quantizer.disable()
    with pytest.raises(qdq.StateError, match="no quantized layer"):
        tune(net, fitted)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range(option, message, net, samples):
    with pytest.raises(qdq.ArgumentError, match=message):
        tune(net, samples[0], **option)
