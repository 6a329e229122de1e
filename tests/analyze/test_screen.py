"""The estimate of the screen, against energies from plain products."""

import copy

import pytest
import torch
from torch import nn

from qdq import calibrate_model, swap_modules
from qdq.analyze.gradients import freezing_parameters
from qdq.analyze.screen import screen_units
from qdq.quantizer import disable_quantization
from qdq.units import find_units


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


def test_parameters_are_frozen_for_a_while():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    expected = [parameter.requires_grad for parameter in model.parameters()]
    with freezing_parameters(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == expected
