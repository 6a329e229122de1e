"""The grids of replaced weights survive a file, beside a state dict that is that of the float model."""

import pytest
import torch
from small_task import make_net, train
from torch import nn

from qdq.errors import ArgumentError, ExportError
from qdq.systems import (
    binarize_model,
    pack_grids,
    quantize_parameters,
    replace_weights,
    to_tensorrt,
    unpack_grids,
)

POINTS = torch.randn(8, 16)


def make_binary(net):
    binarize_model(net, POINTS)
    replace_weights(net)


REPLACE = {
    "ternary": lambda net: train("ternary", net, rounds=1),
    "incremental": lambda net: train("incremental", net),
    "binary": make_binary,
    "fixed point": lambda net: quantize_parameters(net, 6),
    "min-max": lambda net: quantize_parameters(net, 8, quant_method="minmax"),
}


def describe(net):
    return to_tensorrt(net, convert=True).format_table()


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE)
def test_a_fresh_model_gets_the_grids_from_a_file(replace, tmp_path):
    net = make_net()
    names = list(net.state_dict())
    replace(net)
    torch.save({"state": net.state_dict(), "grids": pack_grids(net)}, tmp_path / "net.pt")

    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    assert list(saved["state"]) == names
    loaded = make_net()
    loaded.load_state_dict(saved["state"])
    forgotten = make_net()
    forgotten.load_state_dict(saved["state"])
    unpack_grids(loaded, saved["grids"])
    assert pack_grids(loaded).keys() == saved["grids"].keys()
    assert "call unpack_grids" in describe(forgotten)
    expected = describe(net)
    assert "3: int8" in expected
    assert describe(loaded) == expected
    assert torch.equal(loaded[3].weight, net[3].weight)
    assert torch.equal(loaded[3]._weight_quantizer.amax, net[3]._weight_quantizer.amax)


def test_other_weights_than_those_of_the_grids_are_refused():
    net = make_net()
    quantize_parameters(net, 6)
    loaded = make_net()
    unpack_grids(loaded, pack_grids(net))
    with pytest.raises(ExportError, match="3: fixed point weights: have other values"):
        to_tensorrt(loaded)


@pytest.mark.parametrize(
    ("grids", "text"),
    [
        ([1], "the grids are a list"),
        ({"conv.weight": {}}, "no conv.weight"),
        ({"3.amount": {}}, "no 3.amount"),
        ({"3.weight": {"scale": 1}}, "entry of 3.weight is no grid"),
        ({"3.weight": None}, "entry of 3.weight is no grid"),
    ],
)
def test_other_data_is_refused(grids, text):
    with pytest.raises(ArgumentError, match=text):
        unpack_grids(make_net(), grids)


def test_grids_of_other_channels_are_refused_and_none_is_kept():
    net = make_net()
    make_binary(net)
    packed = {"0.weight": pack_grids(net)["3.weight"], **pack_grids(net)}
    packed["0.weight"]["scale"] = torch.ones(1)
    packed["0.weight"]["zero_point"] = torch.zeros(1)
    other = nn.Sequential(*make_net())
    other[3] = nn.Linear(32, 5)
    with pytest.raises(ArgumentError, match=r"3.weight has 32 scales, the tensor 5 channels"):
        unpack_grids(other, {**packed, "3.weight": pack_grids(net)["3.weight"]})
    assert not pack_grids(other)
