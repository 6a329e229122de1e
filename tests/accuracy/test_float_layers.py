"""What the passes on the float model share."""

import pytest
import torch
from torch import nn

import qdq
from qdq.accuracy.float_layers import (
    ScalableLayers,
    list_unchanged,
    may_pad,
    pads_input,
    pads_zeros,
    require_float_model,
    returns_input,
    rounding_db,
    undoing_changes,
)
from qdq.forward import trace_forward


class PadsOddSizes(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0)))


@pytest.mark.parametrize(
    ("layer", "pads", "might"),
    [
        (nn.Conv2d(3, 4, 3), False, False),
        (nn.Conv2d(3, 4, 3, padding=(0, 1)), True, False),
        (nn.Conv2d(3, 4, 3, padding="same"), True, False),
        (nn.Conv2d(3, 4, 3, padding="valid"), False, False),
        (nn.Linear(3, 4), False, False),
        (PadsOddSizes(3, 4, 3), False, True),
        (PadsOddSizes(3, 4, 1), False, False),
    ],
)
def test_padding_of_layers(layer, pads, might):
    assert pads_input(layer) is pads
    assert may_pad(layer) is might


def test_calls_that_return_or_pad_their_input():
    class Calls(nn.Module):
        def forward(self, x):
            x = nn.functional.dropout(x, training=False)
            x = nn.functional.pad(x, (1, 1))
            x = nn.functional.pad(x, (1, 1), value=2.0)
            return nn.functional.pad(x, (1, 1, 1, 1), "reflect")

    dropout, zeros, twos, reflected = trace_forward(Calls(), torch.randn(2, 3, 4, 4)).operations
    assert returns_input(dropout) and not returns_input(zeros)
    assert [pads_zeros(call) for call in (zeros, twos, reflected)] == [True, False, False]


def test_a_parameter_that_is_used_elsewhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied()
    trace = trace_forward(model, torch.randn(2, 4))
    layers = ScalableLayers(model, trace)
    for operation in trace.operations:
        assert layers.find(operation) is model.get_submodule(operation.module)
        reason = layers.reason_against(operation, list(operation.inputs[:1]), 2)
        assert reason == f"a parameter of {operation.module} is also used elsewhere"


def test_a_swapped_model_is_refused_with_the_function():
    model = nn.Sequential(nn.Linear(4, 4))
    require_float_model(model, "equalize_layers")
    qdq.swap_modules(model, torch.randn(2, 4), include=["*"])
    with pytest.raises(qdq.StateError, match="call equalize_layers before swap_modules"):
        require_float_model(model, "equalize_layers")


def test_changes_are_undone_on_demand_and_after_an_error():
    layer = nn.Linear(2, 2)
    former = layer.weight.detach().clone()
    with undoing_changes([layer]) as undo:
        layer.weight.data.add_(1)
        undo()
        assert torch.equal(layer.weight, former)

    def interrupt():
        with undoing_changes([layer]):
            layer.weight.data.add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert torch.equal(layer.weight, former)
    with undoing_changes([layer]):
        layer.weight.data.add_(1)
    assert torch.equal(layer.weight, former + 1)


def test_reasons_are_counted():
    lines = list_unchanged([("no bias", "a"), ("", "b"), ("no bias", "c"), ("padded", "d")])
    assert lines == ["  2 (a ...): no bias", "  1 (d ...): padded"]


def test_rounding_of_the_coarsest_parameter():
    """A hundred times 2^-23 is 98.5 dB below the outputs; bfloat16 has 2^-7."""
    assert rounding_db(nn.Linear(2, 2)) == pytest.approx(98.5, abs=0.1)
    assert rounding_db(nn.Linear(2, 2).bfloat16()) == pytest.approx(2.1, abs=0.1)
