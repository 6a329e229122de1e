"""Factors in front of a layer, against the product computed here."""

import copy
import io

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qdq import calibrate_model, fake_quantize, restore_modules, swap_modules
from qdq.forward import trace_forward
from qdq.nn.scaling import is_shifted, restore_input, scale_input, shift_input, unshift_input


def make_layer():
    layer = nn.Linear(16, 16)
    factors = torch.rand(16) + 0.5
    x = torch.randn(4, 16)
    return layer, factors, x


def test_input_is_multiplied_however_it_is_given():
    layer, factors, x = make_layer()
    expected = layer(x * factors)
    scale_input(layer, factors)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(input=x), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)


def test_second_factors_are_multiplied():
    layer, factors, x = make_layer()
    expected = layer(x * factors * 3)
    scale_input(layer, factors)
    scale_input(layer, torch.full((16,), 3.0))
    torch.testing.assert_close(layer(x), expected)


def test_factors_are_saved():
    layer, factors, x = make_layer()
    scale_input(layer, factors)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), layer(x))
    assert torch.equal(layer.state_dict()["input_factors"], factors)


def test_a_process_that_loads_a_layer_gives_other_numbers_to_its_hooks():
    """torch counts them from 0 in each process; a global hook would share its number with a hook of the layer."""
    first_id = RemovableHandle.next_id
    layer, factors, x = make_layer()
    scale_input(layer, factors)
    shift_input(layer, torch.tensor(2.0))
    file = io.BytesIO()
    torch.save(nn.Sequential(layer), file)
    file.seek(0)
    # As in a process without these hooks; loading sets it further.
    RemovableHandle.next_id = first_id
    loaded = torch.load(file, weights_only=False)
    assert trace_forward(loaded, x).calls["0"] == 1
    torch.testing.assert_close(loaded(x), layer(x))
    restore_input(loaded[0])
    unshift_input(loaded[0])
    assert not loaded[0]._forward_pre_hooks
    assert loaded[0]._forward_pre_hooks_with_kwargs == {}


def test_quantizer_is_behind_the_factors():
    layer, factors, x = make_layer()
    model = nn.Sequential(layer)
    scale_input(layer, factors)
    expected = model(x)
    swap_modules(model, x, include=["*"])
    calibrate_model(model, [x], method="max")
    weight = fake_quantize(layer.weight, layer.weight.abs().amax(1), axis=0)
    scaled = x * factors
    quantized = fake_quantize(scaled, scaled.abs().max())
    torch.testing.assert_close(model(x), quantized @ weight.T + layer.bias)
    restore_modules(model)
    torch.testing.assert_close(model(x), expected)


def test_factors_are_removed():
    layer, factors, x = make_layer()
    expected = layer(x)
    restore_input(layer)
    scale_input(layer, factors)
    restore_input(layer)
    assert torch.equal(layer(x), expected)
    assert not layer._buffers
    assert not layer._forward_pre_hooks


def test_offset_is_subtracted_however_the_input_is_given():
    layer, factors, x = make_layer()
    plain = copy.deepcopy(layer)
    expected = layer(factors * x - 2.0)
    scale_input(layer, factors)
    shift_input(layer, torch.tensor(2.0))
    assert is_shifted(layer) and not is_shifted(plain)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(input=x), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    twin = copy.deepcopy(layer)
    unshift_input(twin)
    torch.testing.assert_close(twin(x), plain(factors * x))
    assert "input_offset" not in twin.state_dict() and not is_shifted(twin)
