"""Which layers are quantized, and in which order."""

import pytest
import torch
from torch import nn

from qdq.errors import ArgumentError
from qdq.systems import select_layers


class Reversed(nn.Module):
    """Its layers run in another order than they are named."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.transposed = nn.ConvTranspose1d(1, 1, 1)

    def forward(self, x):
        x = self.second(self.second(self.first(x)))
        return self.last(self.transposed(x[:, None])[:, 0])


def test_the_first_and_the_last_layer_that_run_stay_in_float():
    selection = select_layers(Reversed(), torch.randn(2, 4))
    assert list(selection.layers) == ["second"]
    assert selection.float_layers == {
        "first": "the first layer that runs",
        "transposed": "no system has a ConvTranspose1d",
        "last": "the last layer that runs",
        "unused": "it does not run",
    }
    table = selection.format_table()
    assert "1 of 5 layers are quantized" in table
    assert "first: the first layer that runs" in table


def test_the_user_chooses_others():
    selection = select_layers(Reversed(), torch.randn(2, 4), ["sec*"])
    assert list(selection.layers) == ["first", "last"]
    assert selection.float_layers["second"] == "chosen"
    assert list(select_layers(Reversed(), torch.randn(2, 4), ()).layers) == [
        "first",
        "second",
        "last",
    ]


def test_a_model_with_no_layer_left_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match="no layer is left to quantize, 2 stay"):
        select_layers(model, torch.randn(2, 4))
    with pytest.raises(ArgumentError, match="no layer is left"):
        select_layers(nn.ReLU(), torch.randn(2, 4))
