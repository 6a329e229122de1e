"""`modularize`: names of the new modules, the same outputs, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq.distiller import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul, modularize
from qdq.errors import UnsupportedError

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.relu(self.bn(self.conv1(x)))
        y = self.conv2(y) * self.gain
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 3)

    def forward(self, x, scale=2):
        x = self.layer1(x)
        x = torch.cat([F.leaky_relu(x, 0.2), F.relu6(x), torch.add(x, x)], dim=1)
        rows = x.shape[0] * scale // scale
        x = x.mean((2, 3)).reshape(rows, -1) * 0.5
        return self.head(F.gelu(x, approximate="tanh"))


def make_net():
    torch.manual_seed(0)
    return Net().eval()


def new_modules(model, traced):
    known = dict(model.named_modules())
    return {name: module for name, module in traced.named_modules() if name not in known}


def test_calls_become_modules_with_readable_names():
    model = make_net()
    traced = modularize(model, IMAGES)
    modules = new_modules(model, traced)
    assert {name: type(module) for name, module in modules.items()} == {
        "layer1.0.mul": EltwiseMult,
        "layer1.0.add": EltwiseAdd,
        "layer1.0.relu_1": nn.ReLU,
        "layer1.1.mul": EltwiseMult,
        "layer1.1.add": EltwiseAdd,
        "layer1.1.relu_1": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "relu6": nn.ReLU6,
        "add": EltwiseAdd,
        "cat": Concat,
        "gelu": nn.GELU,
    }
    assert traced.leaky_relu.negative_slope == 0.2
    assert traced.gelu.approximate == "tanh"
    assert traced.cat.dim == 1
    assert torch.equal(traced(IMAGES), model(IMAGES))


def test_layers_are_shared_and_keep_their_names():
    model = make_net()
    traced = modularize(model, IMAGES)
    assert traced.layer1.get_submodule("0").conv1 is model.layer1[0].conv1
    assert traced.state_dict().keys() == model.state_dict().keys()


def test_the_model_keeps_its_mode():
    model = make_net().train()
    traced = modularize(model, IMAGES)
    assert all(module.training for module in (*model.modules(), *traced.modules()))
    assert not any(module.training for module in modularize(model.eval(), IMAGES).modules())


def test_matrix_products():
    class Products(nn.Module):
        def forward(self, x):
            rows = x.flatten(2)
            scores = torch.bmm(rows, rows.transpose(1, 2))
            return (scores @ rows).matmul(rows.transpose(1, 2))

    model = Products()
    traced = modularize(model, IMAGES)
    kinds = {name: type(module) for name, module in new_modules(model, traced).items()}
    assert kinds == {"bmm": BatchMatmul, "matmul": Matmul, "matmul_1": Matmul}


def test_calls_that_no_module_does():
    class Others(nn.Module):
        def forward(self, x):
            x = torch.add(x, x, alpha=2) + 1
            return F.relu(x.clamp(-1, 1)) * x.dim()

    model = Others()
    traced = modularize(model, IMAGES)
    assert list(new_modules(model, traced)) == ["relu"]
    assert torch.equal(traced(IMAGES), model(IMAGES))


def test_names_that_are_taken():
    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = nn.Conv2d(4, 4, 1)
            self.register_buffer("mul", torch.ones(4, 1, 1))

        def forward(self, x):
            return self.add(x) * self.mul + x

    model = Taken().eval()
    traced = modularize(model, IMAGES)
    assert list(new_modules(model, traced)) == ["mul_1", "add_1"]
    assert torch.equal(traced(IMAGES), model(IMAGES))


def test_keyword_arguments():
    model = make_net()
    traced = modularize(model, {"x": IMAGES, "scale": 3})
    assert torch.equal(traced(IMAGES), model(IMAGES))


def test_layers_with_children_stay_whole():
    class Padded(nn.Conv2d):
        def __init__(self):
            super().__init__(4, 4, 3)
            self.pad = nn.ZeroPad2d(1)

        def forward(self, x):
            return super().forward(self.pad(x))

    model = nn.Sequential(Padded()).eval()
    traced = modularize(model, IMAGES)
    assert isinstance(traced.get_submodule("0"), Padded)


def test_models_that_cannot_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match=r"torch\.fx cannot trace the model.*EltwiseAdd"):
        modularize(Branching(), IMAGES)


def test_other_outputs_are_refused():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return x + x * Counting.calls

    with pytest.raises(UnsupportedError, match="other outputs"):
        modularize(Counting(), IMAGES)
