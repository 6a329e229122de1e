"""Each pair in the file has the numbers of its own quantizer, however modules and forwards are put together."""

import copy
import functools
import types

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from qdq import (
    ExportError,
    QuantDescriptor,
    StateError,
    calibrate_model,
    export_onnx,
    restore_modules,
    rewire_operations,
    swap_modules,
)
from qdq.check import OnnxModel
from qdq.evaluate import measure_tie_floor
from qdq.forward import call_model
from qdq.metrics import sqnr_db
from qdq.quantizer import named_quantizers

WIDTH = 16
EXACT_DB = 90.0  # float32 sums in another order, where no value lies next to a tie


def conv(size=3):
    return nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2)


class Chain(nn.Module):
    """Two layers whose ranges are far apart: one scale for both would be seen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()
        with torch.no_grad():
            self.second.weight.mul_(7)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Block(nn.Module):
    """A residual block: `identity` gets a quantizer of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.identity = (
            conv(),
            nn.BatchNorm2d(WIDTH),
            conv(),
            conv(1),
        )

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + self.identity(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.last = conv()

    def forward(self, x):
        return self.last(self.blocks(x))


class Yolo(nn.Module):
    """Convolution, BatchNorm and an activation that all blocks share; fused, the forward is set on the instance."""

    activation = nn.SiLU()

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = conv(), nn.BatchNorm2d(WIDTH), self.activation

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Stage(nn.Module):
    """Blocks inside a block, called through a list."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([Yolo(), Yolo()])
        self.out = Yolo()

    def forward(self, x):
        for block in self.inner:
            x = x + block(x)
        return self.out(x)


class Wrapped(nn.Module):
    """The convolution runs inside a region that switches something."""

    def __init__(self, region):
        super().__init__()
        self.before, self.inside, self.region = conv(), conv(), region
        with torch.no_grad():
            self.inside.weight.mul_(5)

    def forward(self, x):
        x = torch.relu(self.before(x))
        with self.region():
            x = torch.relu(self.inside(x.float()))
        return x


def yolo(*fused):
    model = nn.Sequential(Yolo(), Yolo(), Yolo())
    for index in fused:
        model[index].forward = model[index].forward_fuse
    return model


def fused_stage():
    stage = Stage()
    for block in [*stage.inner, stage.out]:
        block.forward = block.forward_fuse
    return nn.Sequential(stage, Yolo())


def tied(bind):
    """Two blocks share a convolution, and each forward is set on the instance."""
    model = nn.Sequential(Chain(), Chain(), Chain())
    model[1].second = model[0].first
    for block in model:
        block.forward = bind(block)
    return model


def bind_closure(block):
    forward = block.forward

    def call(x):
        return forward(x)

    return call


def bind_decorated(block):
    forward = block.forward

    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


def call_later(forward, x):
    return forward(x)


def bind_like_accelerate(block):
    """What its hooks leave on a module."""
    former = block.forward

    def call(module, *args, **kwargs):
        return former(*args, **kwargs)

    return functools.update_wrapper(functools.partial(call, block), former)


class TwoNames(nn.Module):
    """One layer under two names, and one list within two modules."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(), conv()])
        self.again = self.layers
        self.alias = self.layers[1]
        self.other = Chain()

    def forward(self, x):
        x = torch.relu(self.again[0](x))
        return self.other(torch.relu(self.alias(x)) + self.layers[1](x))


class OwnCall(Chain):
    def __call__(self, x):
        return super().__call__(x * 0.5)


class Checkpointed(Residual):
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Nested(nn.Module):
    """GraphModules inside a module, one of them a copy."""

    def __init__(self):
        super().__init__()
        self.body = torch.fx.symbolic_trace(Block().eval())
        self.copy = copy.deepcopy(self.body)
        with torch.no_grad():
            for parameter in self.copy.parameters():
                parameter.mul_(1.5)
        self.tail = nn.Sequential(torch.fx.symbolic_trace(Chain()))

    def forward(self, x):
        return self.tail(self.copy(self.body(x)))


class Outer(nn.Module):
    """Sums around a block that has sums too; all activations are one object."""

    def __init__(self):
        super().__init__()
        self.act, self.first, self.second, self.block = Yolo.activation, conv(), conv(), Stage()

    def forward(self, x):
        x = self.block(self.act(self.first(x)))
        return self.act(self.second(x)) + x


def equal_ranges():
    model = Chain()
    with torch.no_grad():
        model.second.weight.copy_(model.first.weight)
    return model


def regions():
    return nn.Sequential(
        Wrapped(functools.partial(torch.autocast, "cpu", enabled=False)),
        Wrapped(torch.enable_grad),
        Wrapped(torch.no_grad),
    )


def unfused_regions():
    """A shared activation too: torch counts some paths from another place."""
    model = nn.Sequential(regions(), yolo(0, 1))
    return model


MODELS = {
    "plain": Chain,
    "symbolic trace": lambda: torch.fx.symbolic_trace(Chain()),
    "residual symbolic trace": lambda: torch.fx.symbolic_trace(Residual()),
    "fx fuse": lambda: fuse(Residual().eval()),
    "feature extractor": lambda: create_feature_extractor(
        Residual().eval(), {"blocks.0": "low", "last": "high"}
    ),
    "copied graph": lambda: copy.deepcopy(torch.fx.symbolic_trace(Residual())),
    "nested graphs": Nested,
    "yolo": yolo,
    "yolo, one fused": lambda: yolo(1),
    "yolo, some fused": lambda: yolo(0, 2),
    "yolo, all fused": lambda: yolo(0, 1, 2),
    "yolo, fused stage": fused_stage,
    "tied, method": lambda: tied(lambda block: types.MethodType(type(block).forward, block)),
    "tied, closure": lambda: tied(bind_closure),
    "tied, decorator": lambda: tied(bind_decorated),
    "tied, partial": lambda: tied(lambda block: functools.partial(call_later, block.forward)),
    "tied, accelerate": lambda: tied(bind_like_accelerate),
    "regions": regions,
    "regions and shared activation": unfused_regions,
    "two names": TwoNames,
    "own call": OwnCall,
    "checkpoint": Checkpointed,
    "equal ranges": equal_ranges,
    "sums around sums": lambda: nn.Sequential(Outer(), Outer(), conv()),
    "compiled": lambda: torch.compile(Residual()),
}
PER_TENSOR = ("symbolic trace", "feature extractor", "yolo, some fused", "tied, method", "regions")


def prepare(model, x, weight_desc=None):
    """Swapped, rewired, calibrated."""
    model.eval()
    swap_modules(model, x, include="*", weight_desc=weight_desc)
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    return model


def scales_in(path):
    graph = onnx.load(path).graph
    return {
        value.name.removesuffix(".scale"): onnx.numpy_helper.to_array(value)
        for value in graph.initializer
        if value.name.endswith(".scale")
    }


def require_identity(model, x, path):
    """Every pair of the file is of the quantizer that its name says, and the file computes what torch computes."""
    report = export_onnx(model, x, path)
    quantizers = dict(named_quantizers(model))
    scales = scales_in(report.path)
    for name, scale in scales.items():
        np.testing.assert_array_equal(
            scale, quantizers[name].scale.numpy().reshape(scale.shape), err_msg=name
        )
    is_weight = {name: name.endswith("_weight_quantizer") for name in quantizers}
    assert {name for name in quantizers if is_weight[name]} == {
        name for name in scales if is_weight[name]
    }
    with torch.no_grad():
        result = call_model(model, x)
    expected = list(result.values()) if isinstance(result, dict) else [result]
    floors = measure_tie_floor(model, [x])
    floors = list(floors.values()) if isinstance(floors, dict) else [floors]
    outputs = OnnxModel(report.path)(x.numpy())
    for torch_output, file_output, floor in zip(expected, outputs, floors, strict=True):
        assert sqnr_db(torch_output.numpy(), file_output) >= min(floor, EXACT_DB) - 3
    return report, scales


@pytest.fixture
def x():
    return torch.randn(2, WIDTH, 8, 8)


@pytest.mark.parametrize(
    ("name", "weight_desc"),
    [(name, None) for name in MODELS] + [(name, QuantDescriptor()) for name in PER_TENSOR],
)
def test_each_pair_has_the_numbers_of_its_quantizer(name, weight_desc, x, tmp_path):
    require_identity(prepare(MODELS[name](), x, weight_desc), x, tmp_path / "model.onnx")


def test_the_quantizers_of_a_copy_of_a_rewired_graph(x, tmp_path):
    model = prepare(create_feature_extractor(Residual().eval(), {"last": "last"}), x)
    twin = copy.deepcopy(model).eval()  # torchvision makes a training graph of the copy
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    names = [name for name, _ in named_quantizers(model)]
    assert [name for name, _ in named_quantizers(twin)] == names
    assert sum("add" in name for name in names) == 2
    require_identity(twin, x, tmp_path / "model.onnx")


def test_a_rewired_graph_that_changes(x, tmp_path):
    model = prepare(create_feature_extractor(Residual().eval(), {"last": "last"}), x)
    with torch.no_grad():
        expected = model(x)["last"]
        model.train()  # writes its forward anew
        model.eval()
        assert torch.equal(model(x)["last"], expected)
    (last,) = (node for node in model.graph.nodes if node.target == "last")
    with model.graph.inserting_before(last):
        added = model.graph.call_function(torch.add, (last.args[0], 1.0))
    last.args = (added,)
    with pytest.raises(StateError, match="restore_modules"):
        model.recompile()
    restore_modules(model)
    model.recompile()
    assert not torch.equal(model(x)["last"], expected)


def test_every_lost_quantizer_is_named(x, tmp_path):
    class Forgetful(Residual):
        def forward(self, x):
            output = self.last(x)
            self.blocks(x)
            return output

    with pytest.raises(ExportError, match="quantizers ran and have no Q/DQ") as error:
        export_onnx(prepare(Forgetful(), x), x, tmp_path / "model.onnx")
    for name in (
        "blocks.0._add_quantizer",
        "blocks.1._add_quantizer",
        "blocks.1.identity._weight_quantizer",
    ):
        assert name in str(error.value)
    assert not list(tmp_path.iterdir())
