"""Wrappers of other tools: what `to_tensorrt` asks them, and the way back after a refusal."""

import pytest
import torch
from torch import nn

from qdq.errors import ExportError
from qdq.quantizer import named_quantizers
from qdq.systems import to_tensorrt
from qdq.systems.grid import Grid, find_grid
from qdq.systems.wrapper import SystemWrapper


def grid(scale, lowest=-128):
    return Grid("test", torch.tensor([scale]), torch.zeros(1), lowest, 127)


class Codes(SystemWrapper):
    """A linear layer with integer weights of step 0.25, whose inputs have step 0.5 and whose output has step 2."""

    lowest = -128

    def __init__(self, layer):
        super().__init__(layer)
        layer.weight = nn.Parameter((layer.weight.detach() / 0.25).round())

    def forward(self, x):
        return nn.functional.linear(x, self.wrapped_module.weight * 0.25, self.wrapped_module.bias)

    def describe_weight(self):
        return grid(0.25, self.lowest)

    def describe_inputs(self):
        source = self.sources[0]
        return {0: grid(0.5) if source is None else source.describe_output()}

    def describe_output(self):
        return grid(2.0)

    def float_reason(self):
        return ""

    def list_dropped(self):
        return ["its rounding is dropped"]

    def restore(self):
        self.codes = self.wrapped_module.weight
        self.wrapped_module.weight = nn.Parameter(self.codes.detach() * 0.25)
        return self.wrapped_module

    def rewrap(self):
        self.wrapped_module.weight = self.codes


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(Codes(nn.Linear(8, 8)), Codes(nn.Linear(8, 8)), SystemWrapper(nn.ReLU()))
    model[0].note_source(0, None)
    model[1].note_source(0, model[0])
    model[2].note_source(0, model[1])
    return model.eval()


def test_wrappers_become_quantized_layers(caplog):
    model = make_model()
    weights = [wrapper.wrapped_module.weight.detach() * 0.25 for wrapper in (model[0], model[1])]
    transfer = to_tensorrt(model)
    assert [layer.name for layer in transfer.layers] == ["0", "1"]
    assert all(layer.precision == "int8" for layer in transfer.layers)
    assert isinstance(model[2], nn.ReLU)
    for layer, weight in zip((model[0], model[1]), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    amax = {name: float(quantizer.amax.max()) for name, quantizer in named_quantizers(model)}
    assert amax["0._input_quantizer"] == pytest.approx(127 * 0.5)
    assert amax["1._input_quantizer"] == pytest.approx(127 * 2.0)
    assert amax["0._weight_quantizer"] == pytest.approx(127 * 0.25)
    moved = [(place.name, place.reason) for place in transfer.moved]
    assert moved == [
        ("0", "its rounding is dropped"),
        ("1", "its rounding is dropped"),
        ("1", "its output is not rounded, as ReLU is computed in float"),
    ]
    assert "0, 1: its rounding is dropped" in caplog.text


def test_a_refusal_puts_wrappers_back():
    model = make_model()
    wrappers = list(model)
    codes = model[0].wrapped_module.weight
    model[1].lowest = -300
    with pytest.raises(ExportError, match="codes from -300"):
        to_tensorrt(model)
    assert list(model) == wrappers
    assert model[0].wrapped_module.weight is codes
    assert find_grid(model[0].wrapped_module, "weight") is None


def test_several_sources_are_noticed():
    wrapper = make_model()[1]
    assert not wrapper.has_several_sources
    wrapper.note_source(0, wrapper.sources[0])
    assert not wrapper.has_several_sources
    wrapper.note_source(0, None)
    assert wrapper.has_several_sources
