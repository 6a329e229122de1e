"""Layers with added channels compute what torch computes with the same weights, and get their size back."""

import copy

import pytest
import torch
from torch import nn

from qdq.nn.width import ADDED_KEY, read_added, resize_layer, undoing_widths

LAYERS = [
    (lambda: nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6), (4, 2)),
    (lambda: nn.Conv1d(3, 8, 3, bias=False), torch.randn(2, 3, 9), (4, 2)),
    (lambda: nn.Conv2d(8, 8, 3, groups=8), torch.randn(2, 8, 6, 6), (4, 4)),
    (lambda: nn.Linear(3, 8), torch.randn(2, 5, 3), (4, 2)),
]


def append_random(x, layer, number):
    """An input with more channels, whose values do not matter where the weights are 0."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    shape = list(x.shape)
    shape[axis] = number
    return torch.cat([x, torch.randn(shape)], axis)


@pytest.mark.parametrize(("build", "x", "added"), LAYERS)
def test_added_channels_are_zero_and_the_others_stay(build, x, added):
    layer = build()
    expected = layer(x)
    outputs, inputs = added
    resize_layer(layer, outputs, inputs)
    wide = layer(append_random(x, layer, inputs))
    if isinstance(layer, nn.Linear):
        wide = wide.movedim(-1, 1)
        expected = expected.movedim(-1, 1)
    assert wide.shape[1] == expected.shape[1] + outputs
    torch.testing.assert_close(wide[:, : expected.shape[1]], expected)
    assert not wide[:, expected.shape[1] :].any()


@pytest.mark.parametrize(("build", "x", "added"), LAYERS)
def test_a_wider_layer_is_one_that_was_built_so(build, x, added):
    layer = build()
    resize_layer(layer, *added)
    resize_layer(layer, *added)
    assert read_added(layer).tolist() == [2 * number for number in added]
    arguments = {"bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        same = nn.Linear(layer.in_features, layer.out_features)
    else:
        arguments |= {"padding": layer.padding, "groups": layer.groups}
        same = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, **arguments)
    state = layer.state_dict()
    state.pop(ADDED_KEY)
    same.load_state_dict(state)
    x = append_random(x, layer, 2 * added[1])
    assert torch.equal(layer(x), same(x))
    assert repr(layer) == repr(same)


@pytest.mark.parametrize(("build", "x", "added"), LAYERS)
def test_a_layer_gets_its_size_back(build, x, added):
    layer = build()
    former = copy.deepcopy(layer)
    layer(x).sum().backward()
    resize_layer(layer, *added)
    resize_layer(layer, *(-number for number in added))
    assert repr(layer) == repr(former)
    assert layer.state_dict().keys() == former.state_dict().keys()
    assert torch.equal(layer(x), former(x))


def widen_and_stop(layer, outputs, inputs):
    with undoing_widths([layer]):
        resize_layer(layer, outputs, inputs)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("build", "x", "added"), LAYERS)
def test_an_error_takes_the_channels_back(build, x, added):
    layer = build()
    resize_layer(layer, *added)
    former = copy.deepcopy(layer)
    with pytest.raises(KeyboardInterrupt):
        widen_and_stop(layer, *added)
    assert repr(layer) == repr(former)
    assert read_added(layer).tolist() == list(added)
    for name, values in layer.state_dict().items():
        assert torch.equal(values, former.state_dict()[name])


def test_a_layer_with_channels_last_keeps_the_order_in_memory():
    layer = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    resize_layer(layer, 4, 4)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
