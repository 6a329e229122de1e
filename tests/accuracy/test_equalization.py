import copy

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq import (
    DataError,
    StateError,
    calibrate_model,
    equalize_layers,
    fold_batchnorm,
    predict,
    swap_modules,
)
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
    unseen = torch.randn(16, 3, 8, 8) * 3  # larger
    model = chain.double()
    expected = model(unseen.double())
    report = equalize_layers(model, [batch.double() for batch in data])
    torch.testing.assert_close(model(unseen.double()), expected, rtol=1e-10, atol=1e-10)
    assert report.float_db > 100


def test_the_gpu_equalizes_what_the_cpu_does(chain, gpu):
    """TF32, which is on, would change the float outputs more than rounding may."""
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    twin = copy.deepcopy(chain).to(gpu)
    expected, report = equalize_layers(chain, data), equalize_layers(twin, data)
    assert [tensor.reason for tensor in report.tensors] == [
        tensor.reason for tensor in expected.tensors
    ]
    assert report.float_db == pytest.approx(expected.float_db, abs=5)  # an error of float rounding
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.cpu(), chain.get_parameter(name))


def test_waits_for_the_gpu_do_not_grow_with_the_batches(chain, gpu):
    num_waits = []
    for num_batches in (1, 4):
        data = [torch.randn(2, 3, 8, 8, device=gpu) for _ in range(num_batches)]
        model = copy.deepcopy(chain).to(gpu)
        with watch(gpu) as events:
            equalize_layers(model, data)
        num_waits.append(len(list_waits(events)))
    print(f"equalize_layers: {num_waits} waits for 1 and 4 batches")
    assert (
        num_waits[0] == num_waits[1] <= 24
    )  # of a chain of layers, and of the calibrations between


def test_dead_channels_are_not_scaled(chain):
    with torch.no_grad():
        chain.grouped.weight.zero_()
        chain.grouped.bias.zero_()
    report = equalize_layers(chain, [torch.randn(4, 3, 8, 8)])
    assert report.float_db > 100
    assert all(torch.isfinite(parameter).all() for parameter in chain.parameters())


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
    sqnrs = []
    for model in (plain, chain):
        swap_modules(model, data[0], include=["*"])
        calibrate_model(model, data, method="max")
        sqnrs.append(sqnr_db(expected, predict(model, data)))
    assert sqnrs[1] > sqnrs[0] + 1


def test_no_op_with_a_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.SiLU(),
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 4, 1),
    )
    parameters = copy.deepcopy(model.eval().state_dict())
    report = equalize_layers(model, [torch.randn(2, 3, 8, 8)])
    assert [tensor.reason for tensor in report.tensors] == [
        "silu does not commute with factors of its channels",
        "batch_norm does not commute with factors of its channels",
        "it is an output of the model",
    ]
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


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
    equalized = {tensor.written_by for tensor in report.tensors if not tensor.reason}
    assert (
        equalized
        <= {"shared": set(), "tied": set(), "fork": {("two",)}, "dead": {("one",), ("two",)}}[kind]
    )


class Reads(nn.Module):
    """A parameter of the second convolution has another reader, of which its own call knows nothing."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.second, self.third = (nn.Conv2d(16, 16, 1) for _ in range(3))
        if how == "bias":
            self.third.bias = self.second.bias
        if how == "memory":
            self.third.weight = nn.Parameter(self.second.weight.detach())
        unbalance(self.first)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        weight = self.second.weight[:, :, 0, 0]
        if self.how == "matmul":
            x = torch.relu(x.movedim(1, -1) @ weight).movedim(-1, 1)
        if self.how == "t":
            x = torch.relu(nn.functional.linear(x.movedim(1, -1), weight.t())).movedim(-1, 1)
        return self.third(x)


@pytest.mark.parametrize("how", ["bias", "memory", "matmul", "t"])
def test_parameters_with_another_reader_stay(how):
    model, data = Reads(how).double().eval(), torch.randn(4, 16, 6, 6, dtype=torch.float64)
    if how == "memory":
        model.third.weight.data = model.second.weight.data  # `double` has made two of it
    parameters, expected = copy.deepcopy(model.state_dict()), model(data)
    report = equalize_layers(model, [data])
    assert torch.equal(model(data), expected)
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    reasons = {tensor.written_by: tensor.reason for tensor in report.tensors}
    assert reasons[("first",)] == "a parameter of second is also used elsewhere"


class Hidden(nn.Module):
    """Reads a weight behind torch's back: no function call shows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(4)))
        unbalance(self.layers[0])
        unbalance(self.layers[2])

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x * (1 + np.abs(np.asarray(self.layers[0].weight.tolist())).max())


def test_what_moves_the_float_outputs_is_put_back():
    model, data = Hidden().double().eval(), torch.randn(4, 16, 6, 6, dtype=torch.float64)
    expected = model(data)
    report = equalize_layers(model, [data])
    torch.testing.assert_close(model(data), expected, rtol=1e-10, atol=1e-10)
    first, *further_tensors = report.tensors
    assert first.written_by == ("layers.0",)
    assert "undone" in first.reason and first.exponent == 0
    assert any(not tensor.reason for tensor in further_tensors)
    assert report.float_db > 100


def test_interrupt_puts_everything_back(chain, monkeypatch):
    parameters, calls = copy.deepcopy(chain.state_dict()), []

    def measure(*_):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("qdq.accuracy.equalization._sqnr", measure)
    monkeypatch.setattr("qdq.accuracy.equalization._measure_int8", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        equalize_layers(chain, [torch.randn(4, 3, 8, 8)])
    assert calls and type(chain.stem) is nn.Conv2d
    assert all(torch.equal(value, parameters[name]) for name, value in chain.state_dict().items())


def test_linear_layers_on_tokens():
    """Channels are the last axis there; a pooling between two of them runs over tokens and pools channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.AvgPool1d(2), nn.Linear(16, 16)
    ).eval()
    with torch.no_grad():
        factors = 10 ** torch.linspace(-2, 1, 32)
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
    # As many tokens as channels.
    model, data = (
        model.double(),
        torch.randn(8, 32, 16, dtype=torch.float64),
    )
    expected = model(2 * data)
    report = equalize_layers(model, [data])
    torch.testing.assert_close(model(2 * data), expected, rtol=1e-10, atol=1e-10)
    assert [tensor.reason for tensor in report.tensors] == [
        "",
        "its layers have different channel axes",
        "it is an output of the model",
    ]
    assert report.after_db > report.before_db + 1


def test_the_reported_sqnr_is_that_of_int8(chain):
    data = torch.randn(16, 3, 8, 8)
    expected = chain(data).detach().numpy()
    original = copy.deepcopy(chain)
    report = equalize_layers(chain, [data])
    for model, reported in ((original, report.before_db), (chain, report.after_db)):
        assert not any("Quant" in type(module).__name__ for module in model.modules())
        swap_modules(model, data)
        calibrate_model(model, [data], method="max")
        assert reported == pytest.approx(sqnr_db(expected, predict(model, [data])), abs=1e-3)
    assert f"{report.before_db:.2f} to {report.after_db:.2f} dB" in report.format_table()


@pytest.mark.parametrize(
    ("layer", "data", "message"),
    [
        (nn.Linear(16, 16), torch.randn(16), "no axis of samples"),
        (nn.Conv2d(16, 16, 3), torch.randn(16, 8, 8), "no axis"),
    ],
)
def test_inputs_without_an_axis_of_samples_are_left_alone(layer, data, message):
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer)).eval()
    expected = model(data)
    report = equalize_layers(model, [data])
    assert all(message in tensor.reason for tensor in report.tensors)
    assert torch.equal(model(data), expected)


def test_empty_batches_are_skipped(chain):
    twin, data = copy.deepcopy(chain), torch.randn(4, 3, 8, 8)
    report = equalize_layers(chain, [data[:0], data])
    assert report.tensors == equalize_layers(twin, [data]).tensors
    with pytest.raises(DataError, match="all 2 batches are empty"):
        equalize_layers(chain, [data[:0], data[:0]])


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
    assert ("conv1", "layer1.0.conv2", "layer1.1.conv2") in {
        tuple(sorted(stage.written_by)) for stage in stages
    }


def test_refusals(residual, images):
    with pytest.raises(DataError, match="no batch"):
        equalize_layers(residual, [])
    with pytest.raises(StateError, match="NaN"):
        equalize_layers(residual, [images * float("nan")])
    swap_modules(residual, images)
    with pytest.raises(StateError, match="before swap_modules"):
        equalize_layers(residual, [images])


class Bottlenecks(nn.Module):
    """Two linear bottlenecks with a residual add, as in MobileNetV2; the means of the channels are large."""

    def __init__(self, padding):
        super().__init__()
        self.first = nn.Conv2d(16, 8, 1)
        self.widen = nn.Conv2d(8, 32, 1)
        self.narrow = nn.Conv2d(32, 8, 1)
        self.last = nn.Conv2d(8, 16, 3, padding=padding)
        with torch.no_grad():
            self.first.bias.copy_(torch.linspace(-20, 20, 8))
            self.narrow.bias.copy_(torch.linspace(30, -30, 8))
            self.widen.bias.sub_(self.widen.weight.flatten(1) @ self.first.bias)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.narrow(torch.relu(self.widen(x))))


def test_means_move_to_the_readers_of_linear_bottlenecks():
    model = Bottlenecks(padding=0).eval()
    images = torch.randn(8, 16, 6, 6)
    expected = model(images).detach()
    report = equalize_layers(model, [images])
    (tensor,) = [entry for entry in report.tensors if "first" in entry.written_by]
    assert tensor.is_centered
    assert tensor.written_by == ("first", "narrow")
    assert tensor.read_by == ("widen", "last")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    means = model.first(images).mean((0, 2, 3))
    assert means.abs().max() < 1e-3
    assert report.after_db > report.before_db + 6


@pytest.mark.parametrize("obstacle", ["padding", "relu", "alpha", "bias"])
def test_means_stay_where_a_shift_would_be_seen(obstacle, monkeypatch):
    model = Bottlenecks(padding=1 if obstacle == "padding" else 0).eval()
    if obstacle == "bias":
        model.last.bias = None
    forwards = {
        "relu": lambda x: model.last(model.first(x).relu()),
        "alpha": lambda x: model.last(torch.add(model.first(x), model.narrow(x.repeat(1, 2, 1, 1)), alpha=2)),
    }  # fmt: skip
    if obstacle in forwards:
        monkeypatch.setattr(model, "forward", forwards[obstacle])
    images = torch.randn(8, 16, 6, 6)
    expected = model(images).detach()
    report = equalize_layers(model, [images])
    assert not any(tensor.is_centered for tensor in report.tensors)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
