"""Which parameters a pattern takes, and weights replaced by their quantized values."""

import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qdq.compat import nn as quant_nn
from qdq.compat import optim
from qdq.compat.optim.helper import (
    freeze_parameters,
    group_parameters,
    match_parameters,
    quant_weight_inplace,
)
from qdq.errors import QdqError


class Rounding(nn.Module):
    """In place of a quantizer: to eighths of the row's maximum; counts its calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        amax = x.abs().amax(1, keepdim=True)
        return torch.round(x / amax * 8) / 8 * amax


class Quantized(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self._weight_quantizer = Rounding()


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


def names_of(net, parameters):
    names = {id(param): name for name, param in net.named_parameters()}
    return [names[id(param)] for param in parameters]


def test_helper_is_reached_from_the_package():
    assert optim.helper.match_parameters is match_parameters


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["weight"], ["0.weight", "1.weight", "2.weight"]),
        (["^0"], ["0.weight", "0.bias"]),
        (["bias$", re.compile("^2")], ["0.bias", "1.bias", "2.weight"]),
        (["0", "weight"], ["0.weight", "0.bias", "1.weight", "2.weight"]),  # 0.weight once
        ([], []),
        ((pattern for pattern in ["^2"]), ["2.weight"]),
    ],
)
def test_match_parameters(net, patterns, names):
    assert names_of(net, match_parameters(net, patterns)) == names


def test_match_parameters_is_an_iterator(net):
    assert next(match_parameters(net, ["bias"])) is net[0].bias


def test_a_shared_parameter_comes_once(net):
    net.append(nn.Linear(3, 2))
    net[3].weight = net[2].weight
    assert names_of(net, match_parameters(net, ["weight"])) == ["0.weight", "1.weight", "2.weight"]


def test_a_pattern_that_matches_nothing_is_named(net, caplog):
    with caplog.at_level(logging.WARNING):
        freeze_parameters(net, ["bias", "layer9"])
    assert [(r.levelname, r.name) for r in caplog.records] == [
        ("WARNING", "qdq.compat.optim.helper")
    ]
    assert "'layer9'" in caplog.text


def test_freeze_parameters(net):
    freeze_parameters(net, [r"^1\.", "bias"])
    assert [name for name, param in net.named_parameters() if param.requires_grad] == [
        "0.weight",
        "2.weight",
    ]


def test_groups_feed_an_optimizer_again_and_again(net):
    groups = group_parameters(
        net,
        [["^0"], ["^1", "^2"]],
        lrs=[0.5, 0.25],
        momentums=(0.9, 0.8),
        weight_decays=np.array([0, 1e-2]),
    )
    assert [
        {key: value for key, value in group.items() if key != "params"} for group in groups
    ] == [
        {"lr": 0.5, "momentum": 0.9, "weight_decay": 0},
        {"lr": 0.25, "momentum": 0.8, "weight_decay": 1e-2},
    ]
    for _ in range(2):
        assert [names_of(net, group["params"]) for group in groups] == [
            ["0.weight", "0.bias"],
            ["1.weight", "1.bias", "2.weight"],
        ]
    before = [param.clone() for param in net.parameters()]
    sgd = torch.optim.SGD(groups, lr=0.1)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    sgd.step()
    rates = [0.5, 0.5, 0.25, 0.25, 0.25]
    decays = [0, 0, 1e-2, 1e-2, 1e-2]
    for param, start, rate, decay in zip(net.parameters(), before, rates, decays, strict=True):
        torch.testing.assert_close(param, start - rate * (1 + decay * start))


def test_options_left_out_are_not_in_the_groups(net):
    assert [set(group) for group in group_parameters(net, [["0"], ["2"]])] == [
        {"params"},
        {"params"},
    ]
    assert set(group_parameters(net, [["0"]], momentums=[0.9])[0]) == {"params", "momentum"}


@pytest.mark.parametrize("patterns_list", ["a", ["a"], [], (["a"],), [["a"], "b"], None])
def test_groups_want_lists_of_lists(net, patterns_list):
    with pytest.raises(TypeError, match="must be list of list of patterns") as error:
        group_parameters(net, patterns_list)
    assert isinstance(error.value, QdqError)


@pytest.mark.parametrize("argument", ["lrs", "momentums", "weight_decays"])
@pytest.mark.parametrize("values", [[0.1], [], [1, 2, 3], 0.1, "ab"])
def test_groups_want_one_value_each(net, argument, values):
    with pytest.raises(
        TypeError, match=re.escape(f"len({argument}) must match len(patterns_list)")
    ) as error:
        group_parameters(net, [["0"], ["2"]], **{argument: values})
    assert isinstance(error.value, QdqError)


@pytest.mark.parametrize(
    ("patterns", "kind", "words"),
    [
        ("weight", TypeError, "patterns is 'weight'"),
        (None, TypeError, "patterns is None"),
        ([3], TypeError, "pattern 3 is a int"),
        (["("], ValueError, r"pattern '\(' is not a regular expression"),
    ],
)
def test_wrong_patterns(net, patterns, kind, words):
    for call in (match_parameters, freeze_parameters):
        with pytest.raises(kind, match=words) as error:
            call(net, patterns)
        assert isinstance(error.value, QdqError)


def test_wrong_model():
    for call in (lambda: match_parameters("net", ["a"]), lambda: quant_weight_inplace({})):
        with pytest.raises(TypeError, match="not a module") as error:
            call()
        assert isinstance(error.value, QdqError)


def test_weights_become_their_quantized_values():
    net = nn.Sequential(Quantized(4, 3), nn.Linear(3, 3), Quantized(3, 2))
    weights = [layer.weight for layer in net]
    floats = [weight.detach().clone() for weight in weights]
    biases = [layer.bias.detach().clone() for layer in net]
    quant_weight_inplace(net)
    assert [layer.weight for layer in net] == weights  # the same objects, an optimizer keeps them
    assert torch.equal(weights[1], floats[1])
    for place in (0, 2):
        codes = weights[place] / floats[place].abs().amax(1, keepdim=True) * 8
        torch.testing.assert_close(codes, codes.round())
        torch.testing.assert_close(
            weights[place], floats[place], atol=floats[place].abs().max().item() / 16, rtol=0
        )
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(net, biases, strict=True))
    assert all(weight.requires_grad and weight.is_leaf for weight in weights)


def test_half_precision_and_a_quantizer_of_none():
    net = nn.Sequential(Quantized(4, 3).half(), Quantized(4, 3))
    net[1]._weight_quantizer = None
    before = net[1].weight.detach().clone()
    quant_weight_inplace(net)
    assert net[0].weight.dtype == torch.float16
    assert torch.equal(net[1].weight, before)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_lstm_weights_are_quantized_together(layers, bidirectional):
    lstm = nn.LSTM(3, 4, num_layers=layers, bidirectional=bidirectional)
    steps = layers * (1 + bidirectional)
    lstm._weight_quantizers = nn.ModuleList(Rounding() for _ in range(steps))
    floats = {name: weight.detach().clone() for name, weight in lstm.named_parameters()}
    quant_weight_inplace(lstm)
    order = ["l0", "l0_reverse", "l1", "l1_reverse"] if bidirectional else ["l0"]
    for step, quantizer in zip(order, lstm._weight_quantizers, strict=True):
        ih, hh = floats[f"weight_ih_{step}"], floats[f"weight_hh_{step}"]
        assert quantizer.seen == [(16, ih.shape[1] + 4)]
        amax = torch.maximum(ih.abs().amax(1), hh.abs().amax(1))[:, None]
        assert torch.equal(
            getattr(lstm, f"weight_ih_{step}"), torch.round(ih / amax * 8) / 8 * amax
        )
        assert torch.equal(
            getattr(lstm, f"weight_hh_{step}"), torch.round(hh / amax * 8) / 8 * amax
        )
        assert torch.equal(getattr(lstm, f"bias_ih_{step}"), floats[f"bias_ih_{step}"])


def test_quantized_modules_of_the_package_compute_the_same_afterwards(caplog):
    calls = {
        quant_nn.QuantConv2d(3, 4, 3): (torch.randn(2, 3, 5, 5),),
        quant_nn.QuantConvTranspose1d(3, 4, 2): (torch.randn(2, 3, 5),),
        quant_nn.QuantLinear(3, 4): (torch.randn(2, 3),),
        quant_nn.QuantAvgPool2d(2): (torch.randn(2, 3, 4, 4),),
        quant_nn.QuantLSTM(3, 4, 2, bidirectional=True): (torch.randn(5, 2, 3),),
        quant_nn.QuantLSTMCell(3, 4): (torch.randn(2, 3),),
    }
    with torch.no_grad():
        for module, inputs in calls.items():
            before, result = {n: p.clone() for n, p in module.named_parameters()}, module(*inputs)
            quant_weight_inplace(module)
            changed = {
                name
                for name, param in module.named_parameters()
                if not torch.equal(param, before[name])
            }
            assert changed == {name for name in before if "weight" in name}
            for quantizer in getattr(
                module, "_weight_quantizers", [getattr(module, "_weight_quantizer", None)]
            ):
                if quantizer is not None:
                    quantizer.disable()
            # Quantized in the forward, or once and for all.
            torch.testing.assert_close(module(*inputs), result)
    assert caplog.records == []


def test_lstm_cell():
    cell = nn.LSTMCell(3, 4)
    cell._weight_quantizer = Rounding()
    both = torch.cat([cell.weight_ih, cell.weight_hh], 1).detach()
    quant_weight_inplace(cell)
    assert torch.equal(torch.cat([cell.weight_ih, cell.weight_hh], 1), Rounding()(both))


def test_weights_that_are_not_stored_are_named_and_left(caplog):
    pruned = prune.identity(Quantized(3, 2), "weight")
    strange = nn.Module()
    strange._weight_quantizers = nn.ModuleList([Rounding()])
    net = nn.ModuleDict({"pruned": pruned, "strange": strange, "fine": Quantized(3, 2)})
    start = pruned.weight_orig.detach().clone()
    with caplog.at_level(logging.WARNING):
        quant_weight_inplace(net)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["pruned", "strange"]
    assert torch.equal(pruned.weight_orig, start)
    assert net["fine"]._weight_quantizer.seen == [(2, 3)]
