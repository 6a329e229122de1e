"""Units of a small residual network whose quantizers are known by name."""

import pytest
import torch
from residual_block import Block
from torch import nn

from qdq import (
    ArgumentError,
    StateError,
    analyze_layers,
    calibrate_model,
    check_onnx,
    export_onnx,
    rewire_operations,
    swap_modules,
)
from qdq.quantizer import disable_quantization
from qdq.units import find_all_quantizers, find_units, group_units, match_precisions, name_block

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, two residual blocks, a pooling that is called as a function, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        for block in self.blocks:
            y = block(y)
        y = nn.functional.avg_pool2d(y, 6)
        return self.head(y.flatten(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    swap_modules(model, X)
    rewire_operations(model, X)
    calibrate_model(model, [X], method="max")
    return model


LAYERS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]


def names_of(unit):
    return sorted(str(quantizer.name) for quantizer in unit.quantizers)


def test_a_shortcut_belongs_to_the_convolution_before_the_add(net):
    units = {unit.name: unit for unit in find_units(net, X)}
    assert list(units) == [*LAYERS, "avg_pool2d"]
    assert units["blocks.1.conv2"].calls == ("blocks.1.add",)
    assert names_of(units["blocks.1.conv2"]) == [
        "blocks.1._add_quantizer",
        "blocks.1.conv2._input_quantizer",
        "blocks.1.conv2._weight_quantizer",
    ]
    assert units["blocks.1.conv1"].calls == ()
    assert names_of(units["avg_pool2d"]) == ["_avg_pool2d_quantizer"]


def test_every_quantizer_is_in_one_unit(net):
    quantizers = [quantizer for unit in find_units(net, X) for quantizer in unit.quantizers]
    assert len(quantizers) == len(set(quantizers)) == 2 * len(LAYERS) + 2 + 1


def test_quantizers_that_are_off_are_in_no_unit(net):
    with disable_quantization(net.blocks[0].conv2):
        units = {unit.name: unit for unit in find_units(net, X)}
        assert "blocks.0.conv2" not in units
        assert names_of(units["blocks.0.add"]) == ["blocks.0._add_quantizer"]
        quantizers = find_all_quantizers(net, X)
    assert len(quantizers["blocks.0.conv2"]) == 3


def test_no_unit():
    with pytest.raises(StateError, match="no layer of the model is quantized"):
        find_units(nn.Conv2d(16, 16, 3), X)
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    swap_modules(model)
    with pytest.raises(StateError, match=r"0\._input_quantizer has no amax"):
        find_units(model, X)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("stem", "stem"),
        ("layer1.0.conv1", "layer1.0"),
        ("blocks.3.attn.0.proj", "blocks.3"),
        ("encoder.layers.encoder_layer_11.mlp.0", "encoder.layers.encoder_layer_11"),
        ("layer1.conv", "layer1.conv"),
        ("0", "0"),
    ],
)
def test_the_block_of_a_layer(name, block):
    assert name_block(name) == block


def members_of(units):
    return {unit.name: unit.layers for unit in units}


def test_groups_hold_all_quantizers_of_their_units(net):
    units = find_units(net, X)
    for groups in ("block", "shared", ["blocks"]):
        grouped = group_units(net, units, groups)
        quantizers = [quantizer for unit in grouped for quantizer in unit.quantizers]
        assert set(quantizers) == {quantizer for unit in units for quantizer in unit.quantizers}
        assert len(quantizers) == len(set(quantizers))


def test_units_by_block(net):
    assert members_of(group_units(net, find_units(net, X), "block")) == {
        "stem": ("stem",),
        "blocks.0": ("blocks.0.conv1", "blocks.0.conv2"),
        "blocks.1": ("blocks.1.conv1", "blocks.1.conv2"),
        "head": ("head",),
        "avg_pool2d": ("avg_pool2d",),
    }


def test_units_by_pattern(net):
    units = find_units(net, X)
    assert members_of(group_units(net, units, [nn.Linear, "*.conv2"])) == {
        "stem": ("stem",),
        "blocks.0.conv1": ("blocks.0.conv1",),
        "group *.conv2": ("blocks.0.conv2", "blocks.1.conv2"),
        "blocks.1.conv1": ("blocks.1.conv1",),
        f"group {nn.Linear}": ("head",),
        "avg_pool2d": ("avg_pool2d",),
    }
    assert group_units(net, units, None) == units


def test_units_by_shared_range(net):
    leaders = {}
    for unit in find_units(net, X):
        leaders.setdefault(id(unit.quantizers[0].leader), []).append(unit.name)
    grouped = group_units(net, find_units(net, X), "shared")
    assert [unit.layers for unit in grouped] == [tuple(names) for names in leaders.values()]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("blocks", "known are block, shared"),
        (["nothing"], "matches no quantized layer"),
        (["blocks.*", "blocks.0"], "only layers of the groups before it"),
    ],
)
def test_groups_that_cannot_be_made(net, groups, message):
    with pytest.raises(ArgumentError, match=message):
        group_units(net, find_units(net, X), groups)


def test_a_name_counts_before_patterns(net):
    precisions = {"blocks.*": "float", "blocks.0.conv1": "int8"}
    assert match_precisions(net, LAYERS, precisions) == {
        "blocks.0.conv1": "int8",
        "blocks.0.conv2": "float",
        "blocks.1.conv1": "float",
        "blocks.1.conv2": "float",
    }


def test_precisions_that_cannot_be_meant(net):
    with pytest.raises(ArgumentError, match=r"'\*\.conv1' and 'blocks\.0' say float and int8 for"):
        match_precisions(net, LAYERS, {"*.conv1": "float", "blocks.0": "int8"})
    with pytest.raises(ArgumentError, match="nothing quantized here has this name"):
        match_precisions(net, LAYERS, {"tail": "float"})
    assert match_precisions(net, LAYERS[1:], {"stem": "float"}) == {}
    with pytest.raises(ArgumentError, match="the plan sets 'stem' to int8"):
        match_precisions(net, LAYERS[1:], {"stem": "int8"})


class Joined(nn.Module):
    """An add behind activations, which has quantizers for the layer that reads the sum (R-ADD-4)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.last(x + torch.relu(self.second(x))))
        return self.head(x.mean((2, 3)))


def test_an_add_that_only_float_layers_read_is_switched_off(tmp_path):
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    pinned = {"last": "float", "first": "int8", "second": "int8", "head": "int8"}
    analysis = analyze_layers(model, [x], pinned=pinned)
    assert analysis.idle == ("add",)
    assert analysis.plan.precisions["add"] == "float"
    assert not any(model.get_submodule(f"_add_input{side}_quantizer").is_enabled for side in (0, 1))
    assert check_onnx(export_onnx(model, x, tmp_path / "model.onnx").path).problems == ()


def test_an_add_that_an_int8_layer_reads_stays():
    model, x = Joined().eval(), torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    analysis = analyze_layers(model, [x], pinned={"first": "float"})
    assert analysis.idle == ()
    assert model._add_input0_quantizer.is_enabled
