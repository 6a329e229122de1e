"""The estimate of the screen, against energies from plain products."""

import copy

import pytest
import torch
from torch import nn

from qdq import calibrate_model, swap_modules
from qdq.analyze.gradients import recording_recurrence
from qdq.analyze.screen import screen_units
from qdq.quantizer import disable_quantization
from qdq.units import find_units
from qdq.work import freezing_parameters


@pytest.fixture
def two_layers():
    """Two linear layers in int8, samples, and by plain products: the error of each, and of the outputs."""
    model, batch = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval(), torch.randn(20000, 16)
    exact = copy.deepcopy(model).double()
    swap_modules(model, batch, include=["*"])
    calibrate_model(model, [batch], method="max")
    with torch.no_grad():
        hidden = model[0](batch)
        first = hidden.double() - exact[0](batch.double())
        second = model[1](hidden).double() - exact[1](hidden.double())
        outputs = model[1](hidden).double() - exact(batch.double())
    return model, batch, first, second, outputs


def screened(model, batch, mode):
    with disable_quantization(model), torch.no_grad():
        reference = model(batch)
    return screen_units(model, [batch], [reference], find_units(model, batch), mode)


def test_the_estimate_alone_is_the_energy_of_the_error_of_each_channel(two_layers):
    """Behind a linear layer the error of channel c is multiplied by column c of the weight."""
    model, batch, first, second, _ = two_layers
    energies = screened(model, batch, "one-at-a-time")
    columns = model[1].weight.detach().double().square().sum(0)
    # One draw for each sample.
    assert energies["0"] == pytest.approx(float((first.square() * columns).sum()), rel=0.03)
    assert energies["1"] == pytest.approx(float(second.square().sum()), rel=0.03)


def test_the_estimate_without_a_layer_is_its_part_of_the_error(two_layers):
    model, batch, first, second, outputs = two_layers
    energies = screened(model, batch, "leave-one-out")
    weight = model[1].weight_quantizer(model[1].weight).detach().double()
    assert energies["0"] == pytest.approx(float((outputs * (first @ weight.T)).sum()), rel=1e-3)
    assert energies["1"] == pytest.approx(float((outputs * second).sum()), rel=1e-3)


class Attention(nn.Module):
    """Attention whose output is changed in place, or not; the tuple of the attention is not a tensor."""

    def __init__(self, *, batch_first, in_place):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.last = nn.Linear(8, 8)
        self.in_place = in_place

    def forward(self, x):
        hidden = self.first(x)
        output, _ = self.attention(hidden, hidden, hidden)
        if self.in_place:
            hidden *= 2
            output += hidden
        else:
            output = output + hidden * 2
        return self.last(output)


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_views_and_tuples_may_be_changed_in_place(mode, batch_first):
    """A linear layer of 3-D inputs and an attention return views, whose hooks torch drops then."""
    model, batch = Attention(batch_first=batch_first, in_place=False).eval(), torch.randn(6, 5, 8)
    swap_modules(model, batch, include=["*"])
    calibrate_model(model, [batch], method="max")
    expected = screened(model, batch, mode)
    model.in_place = True
    energies = screened(model, batch, mode)
    assert all(expected.values())
    assert energies == pytest.approx(expected)


def test_recurrent_layers_of_a_gpu_record_their_gradients(device):
    """As cuDNN asks for it: "RNN backward can only be called in training mode"."""
    layer = nn.LSTM(4, 4, num_layers=2, dropout=0.5).eval().to(device)
    x = torch.randn(3, 2, 4, device=device)
    expected, _ = layer(x)
    is_on_gpu = device.type != "cpu"
    with recording_recurrence(layer):
        assert layer.training is is_on_gpu
        assert layer.dropout == (0.0 if is_on_gpu else 0.5)
        outputs, _ = layer(x.requires_grad_())
        outputs.sum().backward()
    assert (layer.training, layer.dropout) == (False, 0.5)
    assert torch.equal(outputs, expected)
    assert x.grad.abs().sum() > 0


def test_parameters_are_frozen_for_a_while():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    expected = [parameter.requires_grad for parameter in model.parameters()]
    with freezing_parameters(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == expected
