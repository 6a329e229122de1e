"""What the accuracy passes report for a model with outputs of very different scale."""

import copy

import pytest
import torch
from torch import nn
from two_heads import TwoHeads, db

from qdq import (
    ArgumentError,
    calibrate_model,
    correct_bias,
    equalize_layers,
    predict,
    reconstruct_blocks,
    round_weights,
    swap_modules,
    tune_weights,
)
from qdq.quantizer import disable_quantization

PASSES = {
    "analytic": lambda model, data, **view: correct_bias(model, data, method="analytic", **view),
    "empirical": correct_bias,
    "rounding": lambda model, data, **view: round_weights(model, data, **view),
    "blocks": lambda model, data, **view: reconstruct_blocks(model, data, steps=5, **view),
    "tuning": lambda model, data, **view: tune_weights(model, data, steps=3, **view),
}


@pytest.fixture
def batches():
    return [torch.randn(16, 3, 8, 8)]


@pytest.fixture
def heads(batches):
    model = TwoHeads().eval()
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    return model


@pytest.mark.parametrize("name", PASSES)
def test_each_output_has_its_figures(heads, batches, name):
    with disable_quantization(heads):
        expected = predict(heads, batches)
    before = predict(heads, batches)
    report = PASSES[name](heads, batches)
    after = predict(heads, batches)
    for output in ("boxes", "scores"):
        decibels = (db(expected[output], before[output]), db(expected[output], after[output]))
        assert report.outputs[output] == pytest.approx(decibels, abs=1e-3)
        text = f"output {output}: SQNR {decibels[0]:.2f} to {decibels[1]:.2f} dB"
        assert text in report.format_table()
    assert report.before_db == min(first for first, _ in report.outputs.values())
    assert report.after_db == min(second for _, second in report.outputs.values())


def test_fine_tuning_learns_the_parts(heads, batches):
    twin = copy.deepcopy(heads)
    report = tune_weights(heads, batches, steps=3, outputs={"scores": "scores"})
    every = tune_weights(twin, batches, steps=3)
    assert report.outputs == {}
    assert report.before_db == every.outputs["scores"][0]
    assert report.losses[0] < every.losses[0]  # without the error of the boxes


def test_fine_tuning_weighs_the_outputs(heads, batches):
    """The loss of one output alone is that of the part of this name; without a weight it does not count."""
    twin = copy.deepcopy(heads)
    weighed = tune_weights(heads, batches, steps=3, weights={"scores": 2.0})
    alone = tune_weights(twin, batches, steps=3, outputs={"scores": "scores"})
    state = twin.state_dict()
    for name, values in heads.state_dict().items():
        torch.testing.assert_close(values, state[name])
    assert set(weighed.outputs) == {"boxes", "scores"}
    assert weighed.outputs["scores"][1] == pytest.approx(alone.after_db, abs=1e-2)
    with pytest.raises(ArgumentError, match="weights names logits"):
        tune_weights(heads, batches, steps=3, weights={"logits": 1.0})


@pytest.mark.parametrize("name", ["analytic", "empirical", "rounding", "blocks"])
def test_parts_and_masks(heads, batches, name):
    twin = copy.deepcopy(heads)
    report = PASSES[name](heads, batches, outputs={"scores": "scores"})
    every = PASSES[name](twin, batches)
    assert report.outputs == {}
    assert (report.before_db, report.after_db) == every.outputs["scores"]
    with pytest.raises(ArgumentError, match="outputs names logits"):
        PASSES[name](heads, batches, outputs={"logits": "logits"})
    some = PASSES[name](heads, batches, mask=lambda batch: torch.arange(16) < 4)
    assert some.before_db != every.after_db


class Fragile(nn.Module):
    """A large output without an error beside a small one."""

    def __init__(self, is_alone):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 16, 1)
        self.is_alone = is_alone

    def forward(self, x):
        small = self.second(self.first(x).relu())
        return small if self.is_alone else {"large": 1e9 * x, "small": small}


def test_equalization_measures_the_worst_output(batches):
    model = Fragile(is_alone=False).eval()
    alone = Fragile(is_alone=True).eval()
    alone.load_state_dict(model.state_dict())
    report, expected = equalize_layers(model, batches), equalize_layers(alone, batches)
    assert report.before_db == expected.before_db < 60
    assert report.after_db == expected.after_db


@pytest.mark.parametrize("name", ["analytic", "empirical", "rounding"])
def test_padding_is_not_fitted(name):
    """Tokens with padding give the same weights and biases as the real tokens alone."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    tokens = torch.randn(12, 6, 16)
    # A quarter of the real tokens is in the last quarter of the samples, which rounding holds out.
    lengths = torch.tensor([1, 5, 2, 4, 3, 3, 2, 4, 3, 5, 1, 3])
    is_real = torch.arange(6) < lengths[:, None]
    padded = torch.where(is_real[..., None], tokens, 3 * tokens + 5)
    swap_modules(model, tokens, include=["*"])
    calibrate_model(model, [padded], method="max")
    twin = copy.deepcopy(model)
    PASSES[name](model, [padded], mask=lambda batch: is_real)
    PASSES[name](twin, [tokens[is_real]])
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
