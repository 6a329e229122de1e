"""Layers that quantize in the forward: weight, input and bias, and what remains of them in the export."""

import copy

import pytest
import torch
from torch import nn

from qdq.systems import to_tensorrt
from qdq.systems.grid import Grid
from qdq.systems.layer import SystemQuantizer, convert_layer, restore_layer

LAYERS = [
    (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)),
    (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)),
    (nn.Conv3d(3, 4, 3), torch.randn(2, 3, 5, 5, 5)),
    (nn.Linear(8, 4), torch.randn(2, 8)),
]


class Steps(SystemQuantizer):
    """Multiples of a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, values):
        return (values / self.step).round().clamp(-128, 127) * self.step

    def describe(self, values):
        return Grid("steps", torch.tensor([self.step]), torch.zeros(1), -128, 127)


@pytest.mark.parametrize(("layer", "inputs"), LAYERS)
def test_weight_input_and_bias_are_quantized_and_stay_float(layer, inputs):
    before = copy.deepcopy(layer.state_dict())
    converted = convert_layer(copy.deepcopy(layer), Steps(1 / 64), Steps(1 / 16), Steps(1 / 8))
    by_hand = copy.deepcopy(layer)
    with torch.no_grad():
        by_hand.weight.copy_(Steps(1 / 64)(layer.weight))
        by_hand.bias.copy_(Steps(1 / 8)(layer.bias))
        expected = by_hand(Steps(1 / 16)(inputs))
    assert torch.equal(converted(inputs), expected)
    assert converted.state_dict().keys() == before.keys()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, before[name])
    restore_layer(converted)
    assert type(converted) is type(layer)
    assert torch.equal(converted(inputs), layer(inputs))


@pytest.mark.parametrize(("layer", "inputs"), LAYERS)
def test_the_exported_layer_has_the_quantized_bias(layer, inputs):
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    convert_layer(model[0], Steps(1 / 64), Steps(1 / 16), Steps(1 / 8))
    with torch.no_grad():
        expected = model(inputs)
        transfer = to_tensorrt(model)
        assert [tensor.verdict for tensor in transfer.layers[0].tensors] == ["exact", "exact"]
        torch.testing.assert_close(model(inputs), expected)
    assert torch.equal(model[0].bias * 8, (model[0].bias * 8).round())


def test_a_layer_without_bias_needs_none():
    layer = convert_layer(nn.Linear(8, 4, bias=False), Steps(1 / 64), None, Steps(1 / 8))
    assert torch.isfinite(layer(torch.randn(2, 8))).all()
