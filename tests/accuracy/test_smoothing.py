"""Smoothed inputs: the float model stays the same, and int8 gains where channels have outliers."""

import copy
import math
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from qdq import (
    DataError,
    StateError,
    calibrate_model,
    check_onnx,
    export_onnx,
    predict,
    restore_modules,
    rewire_operations,
    smooth_inputs,
    swap_modules,
)
from qdq.metrics import sqnr_db


class Block(nn.Module):
    """A transformer block with post-normalization, whose LayerNorms the residual path reads, too."""

    def __init__(self, channels=32, heads=4):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 64)
        self.narrow = nn.Linear(64, channels)
        self.last_norm = nn.LayerNorm(channels)

    def forward(self, x, mask):
        split = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        is_real = mask[:, None, None, :] != 0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=is_real)
        x = self.norm(x + self.project(mixed.transpose(1, 2).flatten(2)))
        return self.last_norm(x + self.narrow(F.gelu(self.widen(x))))


@pytest.fixture
def block():
    """Channels 3 and 7 of the LayerNorm and channel 5 of the GELU are outliers."""
    model = Block().eval()
    with torch.no_grad():
        model.norm.weight[[3, 7]] = 40.0
        model.widen.weight[:, [3, 7]] /= 40
        model.widen.weight[5] *= 30
        model.narrow.weight[:, 5] /= 30
    return model


@pytest.fixture
def batches():
    """Sentences of different lengths."""
    parts = []
    for _ in range(6):
        mask = (torch.arange(10) < torch.randint(3, 11, (4, 1))).long()
        tokens = torch.randn(4, 10, 32)
        parts.append({"x": tokens, "mask": mask})
    return parts


def sqnr(expected, model, batches):
    return sqnr_db(expected, predict(model, batches, mask="mask"))


def quantize(model, batches):
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")


def test_float_model_is_unchanged_and_int8_gains(block, batches):
    fit, held = batches[:4], batches[4:]
    expected = predict(block, held, mask="mask")
    plain = copy.deepcopy(block)
    quantize(plain, fit)
    report = smooth_inputs(block, fit, mask="mask")
    assert sqnr(expected, block, held) > 110
    assert report.float_db > 110
    smoothed = {name for entry in report.inputs if not entry.reason for name in entry.read_by}
    assert {"widen", "narrow"} <= smoothed
    quantize(block, fit)
    assert sqnr(expected, block, held) > sqnr(expected, plain, held) + 6
    restore_modules(block)
    assert sqnr(expected, block, held) > 110


def test_gain_is_that_of_the_layer():
    """One layer: its gain is the ratio of the errors of its outputs, computed in float64 here."""
    layer = nn.Linear(32, 16)
    tokens = torch.randn(4000, 32)
    tokens[:, 2] *= 60
    with torch.no_grad():
        layer.weight[:, 2] /= 60
    model = nn.Sequential(layer).eval()
    report = smooth_inputs(model, [tokens], least_db=0, include=["*"])
    (entry,) = report.inputs
    factors = layer.input_factors.double()
    weight = (layer.weight.detach().double() * factors).float().double()
    held = torch.randn(4000, 32).double()
    held[:, 2] *= 60

    def error(scale, fraction):
        x, w = held * scale, weight / scale
        x_step = fraction * (tokens.double() * scale).abs().max() / 127
        w_step = w.abs().amax(1, keepdim=True) / 127
        x = (x / x_step).round().clamp(-128, 127) * x_step
        w = (w / w_step).round() * w_step
        return float((x @ w.T - held @ weight.T).square().sum())

    before = min(error(torch.ones(32), fraction) for fraction in (1.0, 0.8, 0.6))
    after = min(error(factors, fraction) for fraction in (1.0, 0.8, 0.6))
    gain_db = 10 * math.log10(before / after)
    assert entry.gain_db == pytest.approx(gain_db, abs=2)
    assert factors[2] < 0.1 * factors.median()


def test_readers_of_one_tensor_have_the_same_factors(batches):
    model = Block().eval()
    for batch in batches:
        batch["x"][..., 4] *= 40
    report = smooth_inputs(model, batches, mask="mask", least_db=0)
    assert ("query", "key", "value") in [entry.read_by for entry in report.inputs]
    assert torch.equal(model.query.input_factors, model.value.input_factors)


def test_padding_does_not_count(block, batches):
    """Other padding, the same factors."""
    twin = copy.deepcopy(block)
    others = []
    for batch in batches:
        is_real = batch["mask"][..., None] != 0
        others.append({"x": torch.where(is_real, batch["x"], 50.0), "mask": batch["mask"]})
    smooth_inputs(block, batches, mask="mask")
    smooth_inputs(twin, others, mask="mask")
    torch.testing.assert_close(dict(block.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize(
    "make",
    [
        partial(nn.Conv2d, 16, 16, 3, padding=1, groups=16),
        partial(nn.Conv2d, 16, 8, 3, stride=2, groups=4, padding="valid"),
        partial(nn.Conv1d, 16, 8, 3, padding=1),
        partial(nn.Linear, 16, 8),
    ],
)
def test_layers_of_each_kind_are_exact(make):
    layer = make()  # here, where the seed is set
    sizes = {nn.Conv2d: (6, 6), nn.Conv1d: (6,), nn.Linear: ()}[type(layer)]
    spread = torch.logspace(-2, 1, 16).reshape(-1, *[1] * len(sizes))
    data = torch.randn(8, 16, *sizes) * spread
    if isinstance(layer, nn.Linear):
        layer.weight.data /= spread
    model = nn.Sequential(layer).eval()
    expected = layer(data).detach()
    report = smooth_inputs(model, [data], least_db=0, include=["*"])
    assert not report.inputs[0].reason
    assert not torch.equal(layer.input_factors, torch.ones_like(layer.input_factors))
    torch.testing.assert_close(model(data), expected, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_undo_of_a_second_call_keeps_the_factors_of_the_first(monkeypatch):
    layer = nn.Linear(16, 8)
    spread = torch.logspace(-2, 1, 16)
    layer.weight.data /= spread
    data = torch.randn(8, 16) * spread
    model = nn.Sequential(layer).eval()
    smooth_inputs(model, [data], least_db=0, include=["*"])
    factors = layer.input_factors.clone()
    expected = model(data)
    monkeypatch.setattr("qdq.accuracy.smoothing.rounding_db", lambda model: math.inf)
    other = data.clone()
    other[:, 3] *= 50
    report = smooth_inputs(model, [other], least_db=0, include=["*"])
    assert report.inputs[0].reason.startswith("undone")
    assert torch.equal(layer.input_factors, factors)
    assert torch.equal(model(data), expected)


def count_products(path, factors):
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    count = 0
    for node in graph.node:
        constant = arrays.get(node.input[1]) if node.op_type == "Mul" else None
        count += constant is not None and np.array_equal(constant, factors.numpy())
    return count


def test_exported_file_multiplies_before_the_quantizer(block, batches, tmp_path):
    for batch in batches:
        batch["x"][..., 4] *= 40
    smooth_inputs(block, batches, mask="mask", least_db=0)
    swap_modules(block, batches[0], include=["*"])
    rewire_operations(block, batches[0])
    calibrate_model(block, batches)
    exported = export_onnx(block, batches[0], tmp_path / "block.onnx")
    actual = predict(exported.path, batches, mask="mask")
    assert sqnr(actual, block, batches) > 45
    assert count_products(exported.path, block.query.input_factors) == 1  # of three readers
    report = check_onnx(exported.path)
    assert not [finding for finding in report.findings if finding.severity == "error"]


def test_layers_that_cannot_be_scaled():
    shared = nn.Linear(16, 16)
    data = torch.randn(8, 16)
    data[:, 3] *= 100
    model = nn.Sequential(shared, nn.Tanh(), shared).eval()
    report = smooth_inputs(model, [data])
    assert "runs several times" in report.inputs[0].reason
    assert "input_factors" not in shared._buffers
    even = smooth_inputs(nn.Sequential(nn.Linear(16, 16)), [torch.rand(8, 16)])
    assert "no factors" in even.inputs[0].reason
    assert "0 of 1 inputs" in even.format_table()


def test_refusals(block, batches):
    first = {name: values[:1] for name, values in batches[0].items()}
    with pytest.raises(DataError, match="one sample"):
        smooth_inputs(block, [first])
    swap_modules(block, batches[0], include=["*"])
    with pytest.raises(StateError, match="before swap_modules"):
        smooth_inputs(block, batches)
