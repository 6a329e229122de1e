import copy

import pytest
import torch
from torch import nn

from qdq import DataError, StateError, calibrate_model, equalize_layers, fold_batchnorm, predict, swap_modules
from qdq.metrics import sqnr_db


def unbalance(convolution):
    """Channels of very different size, as BatchNorm leaves them."""
    factors = 10 ** torch.linspace(-2, 1, convolution.out_channels)
    with torch.no_grad():
        convolution.weight.mul_(factors.reshape(-1, 1, 1, 1))
        convolution.bias.mul_(factors)


class Chain(nn.Module):
    """A residual stage, a depthwise convolution, pooling, a classifier; one tensor behind a ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.branch(x)
        x = nn.functional.relu6(self.depthwise(x))
        x = nn.functional.max_pool2d(torch.relu(self.grouped(x)), 2)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    model = Chain().eval()
    for layer in (model.stem, model.branch, model.grouped):
        unbalance(layer)
    return model


def test_the_float_function_is_unchanged(chain):
    data = [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)]
    other = torch.randn(16, 3, 8, 8) * 3  # unseen, and larger
    model = chain.double()
    expected = model(other.double())
    report = equalize_layers(model, [batch.double() for batch in data])
    torch.testing.assert_close(model(other.double()), expected, rtol=1e-10, atol=1e-10)
    assert report.float_db > 100


def test_groups_follow_the_data_flow(chain):
    report = equalize_layers(chain, [torch.randn(4, 3, 8, 8)])
    reasons = {tensor.written_by: tensor.reason for tensor in report.tensors}
    assert set(reasons) == {("stem", "branch"), ("depthwise",), ("grouped",), ("head",)}
    assert "relu6 clamps it" in reasons["depthwise",]
    assert reasons["head",] == "it is an output of the model"
    (stage,) = [tensor for tensor in report.tensors if tensor.written_by == ("stem", "branch")]
    assert set(stage.read_by) == {"branch", "depthwise"}
    assert not stage.reason
    assert stage.predicted_db > 3
    assert "2 of 4 tensors equalized" in report.format_table()


def test_int8_is_nearer_afterwards(chain):
    data = [torch.randn(16, 3, 8, 8)]
    expected = predict(chain, data)
    plain = copy.deepcopy(chain)
    equalize_layers(chain, data)
    found = []
    for model in (plain, chain):
        swap_modules(model, data[0], include=["*"])
        calibrate_model(model, data, method="max")
        found.append(sqnr_db(expected, predict(model, data)))
    assert found[1] > found[0] + 1


def test_no_op_with_a_reason():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    before = copy.deepcopy(model.eval().state_dict())
    report = equalize_layers(model, [torch.randn(2, 3, 8, 8)])
    assert [tensor.reason for tensor in report.tensors] == [
        "silu does not commute with factors of its channels",
        "batch_norm does not commute with factors of its channels",
        "it is an output of the model",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["shared", "tied", "fork", "dead"])
def test_structures_that_need_care(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(16, 16, 1) for _ in range(3))
            if kind == "tied":
                self.three.weight = self.one.weight
            if kind == "dead":
                nn.init.zeros_(self.one.weight[3:6].data)
                nn.init.constant_(self.one.bias[3:6].data, -1)
            unbalance(self.two)

        def forward(self, x):
            x = torch.relu(self.one(x))
            y = torch.relu(self.two(x))
            y = self.two(y) if kind == "shared" else y
            y = torch.relu(self.three(y))
            return torch.cat([y, x], 1) if kind == "fork" else y

    model, data = Net().double().eval(), torch.randn(4, 16, 6, 6, dtype=torch.float64)
    expected = model(data * 2)
    report = equalize_layers(model, [data])
    torch.testing.assert_close(model(data * 2), expected, rtol=1e-10, atol=1e-10)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    done = {tensor.written_by for tensor in report.tensors if not tensor.reason}
    assert done <= {"shared": set(), "tied": set(), "fork": {("two",)}, "dead": {("one",), ("two",)}}[kind]


def test_residual_network_of_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    model = torchvision.models.resnet18(num_classes=16).eval()
    images = torch.randn(2, 3, 64, 64)
    fold_batchnorm(model, images)
    model.double()
    expected = model(images.double() * 2)
    report = equalize_layers(model, [images.double()])
    torch.testing.assert_close(model(images.double() * 2), expected, rtol=1e-8, atol=1e-8)
    stages = [tensor for tensor in report.tensors if len(tensor.written_by) > 1]
    assert ("conv1", "layer1.0.conv2", "layer1.1.conv2") in {tuple(sorted(stage.written_by)) for stage in stages}


def test_refusals(residual, images):
    with pytest.raises(DataError, match="no batch"):
        equalize_layers(residual, [])
    with pytest.raises(StateError, match="NaN"):
        equalize_layers(residual, [images * float("nan")])
    swap_modules(residual, images)
    with pytest.raises(StateError, match="before swap_modules"):
        equalize_layers(residual, [images])
