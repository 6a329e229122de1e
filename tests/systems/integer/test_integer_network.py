"""Networks of integer layers: the names and the flow of users, a chain trained on digits, the way back to float."""

import copy
import inspect
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import read_cases
from integer_reference import to_array
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qdq import systems
from qdq.errors import ArgumentError, QdqError, StateError
from qdq.systems import (
    IntegerNetwork,
    QConv2d,
    QConvBNReLU,
    QLinear,
    QMaxPooling2d,
    QModule,
    QParam,
    QReLU,
    holding_ranges,
    restore_float,
)
from qdq.systems.grid import find_grid

RECIPE = runpy.run_path(str(Path(__file__).parents[3] / "recipes" / "integer_only.py"))
NAMES = read_cases("jermmy_names")


def names_of(key):
    return next(case[key] for case in NAMES if key in case)


class Net(nn.Module):
    """As users write it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 40, 3, 1)
        self.conv2 = nn.Conv2d(40, 40, 3, 1, groups=20)
        self.fc = nn.Linear(5 * 5 * 40, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        return self.fc(x.view(-1, 5 * 5 * 40))

    def quantize(self, num_bits=8):
        self.qconv1 = QConv2d(self.conv1, qi=True, qo=True, num_bits=num_bits)
        self.qrelu1 = QReLU()
        self.qmaxpool2d_1 = QMaxPooling2d(kernel_size=2, stride=2, padding=0)
        self.qconv2 = QConv2d(self.conv2, qi=False, qo=True, num_bits=num_bits)
        self.qrelu2 = QReLU()
        self.qmaxpool2d_2 = QMaxPooling2d(kernel_size=2, stride=2, padding=0)
        self.qfc = QLinear(self.fc, qi=False, qo=True, num_bits=num_bits)

    def quantize_forward(self, x):
        x = self.qmaxpool2d_1(self.qrelu1(self.qconv1(x)))
        x = self.qmaxpool2d_2(self.qrelu2(self.qconv2(x)))
        return self.qfc(x.view(-1, 5 * 5 * 40))

    def freeze(self):
        self.qconv1.freeze()
        self.qrelu1.freeze(self.qconv1.qo)
        self.qmaxpool2d_1.freeze(self.qconv1.qo)
        self.qconv2.freeze(qi=self.qconv1.qo)
        self.qrelu2.freeze(self.qconv2.qo)
        self.qmaxpool2d_2.freeze(self.qconv2.qo)
        self.qfc.freeze(qi=self.qconv2.qo)

    def quantize_inference(self, x):
        qx = self.qconv1.qi.quantize_tensor(x)
        for layer in (self.qconv1, self.qrelu1, self.qmaxpool2d_1):
            qx = layer.quantize_inference(qx)
        for layer in (self.qconv2, self.qrelu2, self.qmaxpool2d_2):
            qx = layer.quantize_inference(qx)
        qx = self.qfc.quantize_inference(qx.view(-1, 5 * 5 * 40))
        return self.qfc.qo.dequantize_tensor(qx)


class NetBN(nn.Module):
    """As users write it; only the layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 40, 3, 1), nn.BatchNorm2d(40)
        self.conv2, self.bn2 = nn.Conv2d(40, 40, 3, 1), nn.BatchNorm2d(40)
        self.fc = nn.Linear(5 * 5 * 40, 10)

    def quantize(self, num_bits=8):
        self.qconv1 = QConvBNReLU(self.conv1, self.bn1, qi=True, qo=True, num_bits=num_bits)
        self.qmaxpool2d_1 = QMaxPooling2d(kernel_size=2, stride=2, padding=0)
        self.qconv2 = QConvBNReLU(self.conv2, self.bn2, qi=False, qo=True, num_bits=num_bits)
        self.qmaxpool2d_2 = QMaxPooling2d(kernel_size=2, stride=2, padding=0)
        self.qfc = QLinear(self.fc, qi=False, qo=True, num_bits=num_bits)


def make_user_net(images):
    net = Net().eval()
    net.quantize()
    with torch.no_grad():
        net.quantize_forward(images)
    return net


@pytest.mark.parametrize("network", [Net, NetBN])
def test_state_dict_keys(network):
    net = network()
    net.quantize(8)
    assert sorted(net.state_dict()) == sorted(names_of(f"state_dict_keys_{network.__name__}"))


def test_methods_of_users_exist():
    methods = [name for name in names_of("methods") if name.startswith("QParam.")]
    assert all(hasattr(QParam, name.partition(".")[2]) for name in methods)
    for name in ("forward", "freeze", "quantize_inference"):
        assert hasattr(QConv2d, name)
    for name in ("quantize", "quantize_forward", "freeze", "quantize_inference"):
        assert hasattr(IntegerNetwork, name)
    with pytest.raises(NotImplementedError):
        QModule().quantize_inference(torch.zeros(1))


def test_the_flow_of_users():
    """Calibrate, save before freeze, freeze, infer; then load into a new network, and copy."""
    images = torch.rand(4, 1, 28, 28)
    net = make_user_net(images)
    state = copy.deepcopy(net.state_dict())
    with holding_ranges(net), torch.no_grad():
        expected = net.quantize_forward(images)
    net.freeze()
    result = net.quantize_inference(images)
    assert ((result - expected) / net.qfc.qo.scale).abs().max() <= 3.01  # one code a layer
    loaded = Net()
    loaded.quantize()
    loaded.load_state_dict(state)
    loaded.freeze()
    frozen = Net()
    frozen.quantize()
    frozen.load_state_dict(net.state_dict())
    for other in (loaded, frozen, copy.deepcopy(net)):
        assert torch.equal(other.quantize_inference(images), result)
    with pytest.raises(RuntimeError, match="freeze after freeze"):
        net.freeze()


@pytest.fixture(scope="module")
def digits():
    digits = load_digits()
    return torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target)


@pytest.fixture(scope="module")
def float_net(digits):
    images, labels = digits
    torch.manual_seed(0)
    net = RECIPE["make_network"]()
    batches = DataLoader(TensorDataset(images[::2], labels[::2]), 64, shuffle=True)
    RECIPE["train"](net, batches, 15)
    return net


@pytest.mark.parametrize("granularity", ["layer", "group", "channel"])
@torch.no_grad()
def test_digits_in_integers(granularity, digits, float_net):
    """Within 0.3 point of float, and in every layer within one code of the fake-quantized network."""
    images, labels = digits[0][1::2], digits[1][1::2]
    net = copy.deepcopy(float_net)
    RECIPE["quantize"](net, digits[0][::2], 8, granularity, "unsigned")
    fake = copy.deepcopy(net)
    net.freeze()
    outputs = net.quantize_inference(images)
    accuracy = RECIPE["measure_accuracy"](outputs, labels)
    assert accuracy == pytest.approx(RECIPE["measure_accuracy"](float_net(images), labels), abs=0.3)

    codes = net.qlayers[0].qi.quantize_tensor(images)
    qparam = net.qlayers[0].qi
    with holding_ranges(fake):
        for integer_layer, fake_layer in zip(net.qlayers, fake.qlayers, strict=True):
            values = fake_layer(qparam.dequantize_tensor(codes))
            is_layer = isinstance(integer_layer, QModule)
            codes = integer_layer.quantize_inference(codes) if is_layer else integer_layer(codes)
            if is_layer and integer_layer.qo.is_calibrated:
                qparam = integer_layer.qo
            assert (codes - qparam.quantize_tensor(values)).abs().max() <= 1
    assert torch.equal(qparam.dequantize_tensor(codes), outputs)


@torch.no_grad()
def test_the_linear_layer_of_digits_sums_as_numpy(digits, float_net):
    net = copy.deepcopy(float_net)
    RECIPE["quantize"](net, digits[0][::2], 8, "channel", "unsigned")
    net.freeze()
    last = net.qlayers[-1]
    codes = torch.randint(0, 256, (50, 512), dtype=torch.int32)
    sums = last.accumulate(codes - last.qi.zero_point.int())[0]
    weight = to_array(last.fc_module.weight).astype(np.int64)
    centred = to_array(codes).astype(np.int64) - int(last.qi.zero_point)
    expected = centred @ weight.T + to_array(last.fc_module.bias).astype(np.int64)
    assert np.array_equal(sums.numpy(), expected)


@torch.no_grad()
def test_a_network_in_symmetric_codes_returns_to_float_exactly(digits, float_net):
    images = digits[0][1::2]
    net = copy.deepcopy(float_net)
    net.quantize(8, scheme="symmetric", axis=0)
    net.quantize_forward(digits[0][::2])
    net.freeze()
    expected = net.quantize_inference(images)
    step = net.qlayers[-1].qo.scale
    layers = restore_float(net)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert not any(isinstance(module, (QModule, nn.BatchNorm2d)) for module in net.modules())

    def quantize_input(layer, inputs):
        grid = find_grid(layer, "input")
        return (inputs[0] / grid.scale).round().clamp(grid.lowest, grid.highest) * grid.scale

    for layer in layers:
        grid = find_grid(layer, "weight")
        assert (grid.lowest, grid.highest, grid.obstacle) == (-128, 127, "")
        assert not grid.zero_point.any()
        layer.register_forward_pre_hook(quantize_input)
    difference = (net(images) - expected).abs() / step
    inside = expected.abs() < 127 * step  # the output is not quantized, nor clipped
    assert difference[inside].max() <= 1.6


def test_a_network_that_is_not_frozen_stays():
    net = IntegerNetwork(nn.Linear(4, 2))
    with pytest.raises(StateError, match="no integer layer"):
        restore_float(net)
    net.quantize()
    with pytest.raises(StateError, match="not frozen"):
        restore_float(net)
    with pytest.raises(StateError, match="quantize_inference before freeze"):
        net.quantize_inference(torch.randn(1, 4))
    with pytest.raises(StateError, match="not quantized"):
        IntegerNetwork(nn.Linear(4, 2)).freeze()


def test_chains_that_no_integer_network_computes_are_refused():
    with pytest.raises(ArgumentError, match=r"MaxPool2d\(.*ceil_mode=True.* has no integer form"):
        IntegerNetwork(nn.MaxPool2d(2, ceil_mode=True)).quantize()
    with pytest.raises(ArgumentError, match=r"MaxPool2d\(.*dilation=2.* has no integer form"):
        IntegerNetwork(nn.MaxPool2d(2, dilation=2)).quantize()
    with pytest.raises(ArgumentError, match=r"return_indices=True has no integer form"):
        IntegerNetwork(nn.MaxPool2d(2, return_indices=True)).quantize()
    layer = nn.Linear(4, 4)
    with pytest.raises(ArgumentError, match=r"Linear\(.* occurs twice"):
        IntegerNetwork(layer, nn.ReLU(), layer).quantize()
    for layers in ([], [nn.Flatten()]):
        with pytest.raises(ArgumentError, match=f"none of its {len(layers)} layers"):
            IntegerNetwork(*layers).quantize()
    net = IntegerNetwork(layer)
    net.quantize()
    net.quantize_forward(torch.randn(1, 4))
    net.freeze()
    with pytest.raises(StateError, match="quantize after freeze"):
        net.quantize()


def test_layers_without_an_integer_form_are_refused():
    with pytest.raises(ArgumentError, match=r"GELU.* has no integer form"):
        IntegerNetwork(nn.Linear(4, 2), nn.GELU()).quantize()
    with pytest.raises(ArgumentError, match=r"BatchNorm2d.* has no ReLU after it"):
        IntegerNetwork(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sigmoid()).quantize()


@torch.no_grad()
def test_a_sigmoid_and_a_first_pooling():
    net = IntegerNetwork(
        nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(16, 4), nn.Sigmoid()
    ).eval()
    net.quantize()
    x = torch.randn(50, 1, 8, 8)
    net.quantize_forward(x)
    net.freeze()
    assert (net.quantize_inference(x) - net.qlayers[-1].qo.max).max() <= 0.01
    loaded = IntegerNetwork(*copy.deepcopy(net.layers))
    loaded.layers[3] = nn.Linear(16, 4)
    loaded.quantize()
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded.quantize_inference(x), net.quantize_inference(x))
    float_net = copy.deepcopy(net)
    restore_float(float_net)
    assert (net.quantize_inference(x) - float_net(x)).abs().max() < 0.05


def test_held_ranges_stay():
    net = IntegerNetwork(nn.Linear(4, 2))
    net.quantize()
    net.quantize_forward(torch.ones(1, 4))
    with holding_ranges(net):
        net.quantize_forward(9 * torch.ones(1, 4))
    assert float(net.qlayers[0].qi.max) == 1
    net.quantize_forward(9 * torch.ones(1, 4))
    assert float(net.qlayers[0].qi.max) == 9


def test_training_moves_the_weights():
    """QAT as users write it: a loop over `quantize_forward`."""
    net = IntegerNetwork(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    net.quantize()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, labels = torch.randn(64, 1, 4, 4), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.quantize_forward(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    net.eval().freeze()
    assert net.quantize_inference(x).shape == (64, 2)


def test_the_recipe(tmp_path, capsys):
    RECIPE["integer_only"](bits=6, epochs=1, scheme="symmetric", output=tmp_path / "model.onnx")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["float", lines[0].split()[1]],
        ["per", "layer"],
        ["per", "group"],
        ["per", "channel"],
    ]
    assert lines[4] == "3 of 3 layers in int8"
    assert sum("exact" in line for line in lines) == 6
    assert lines[-1].startswith(str(tmp_path / "model.onnx"))
    with pytest.raises(ArgumentError, match="bits is 20"):
        RECIPE["integer_only"](bits=20, epochs=1)


def test_forward_after_freeze_is_refused():
    net = IntegerNetwork(nn.Linear(4, 2), nn.ReLU())
    net.quantize()
    x = torch.randn(3, 4)
    net.quantize_forward(x)
    expected = net(x)
    net.freeze()
    for call, text in (
        (net, "IntegerNetwork: forward after freeze.*call quantize_inference"),
        (net.quantize_forward, r"QLinear of Linear\(.*: forward after freeze"),
        (lambda _: net.freeze(), r"QLinear of Linear\(.*: freeze after freeze"),
    ):
        with pytest.raises(RuntimeError, match=text) as caught:
            call(x)
        assert isinstance(caught.value, QdqError)
    assert net.is_frozen
    restore_float(net)
    assert not net.is_frozen
    assert (net(x) - expected).abs().max() < 0.1


def test_a_network_is_frozen_as_a_whole_or_not_at_all():
    """A batch of another size stops the calibration in the middle."""
    net = IntegerNetwork(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    net.quantize()
    with pytest.raises(RuntimeError, match="shapes"):
        net.quantize_forward(torch.randn(1, 1, 5, 5))
    with pytest.raises(StateError, match=r"QLinear of Linear\(.*: qo has no range"):
        net.freeze()
    assert not net.is_frozen
    net.quantize_forward(torch.randn(1, 1, 4, 4))
    net.freeze()
    assert net.quantize_inference(torch.randn(1, 1, 4, 4)).shape == (1, 2)


def test_the_input_of_a_frozen_network_is_checked():
    net = IntegerNetwork(nn.Linear(4, 2))
    net.quantize()
    net.quantize_forward(torch.randn(3, 4))
    net.freeze()
    for x, text in (
        (torch.full((1, 4), torch.nan), "4 of 4 values are not finite"),
        (torch.empty(0, 4), "is empty"),
        (torch.zeros(1, 4, dtype=torch.int32), r"type torch.int32; only float tensors"),
    ):
        with pytest.raises(ValueError, match=rf"QLinear of Linear\(.*, qi: .*{text}"):
            net.quantize_inference(x)


def read_parameters_of(text):
    """Name -> default, or "" without one, of "conv_module, qi=True"."""
    parameters = {}
    for part in text.split(", "):
        name, _, default = part.partition("=")
        parameters[name] = default
    return parameters


@pytest.mark.parametrize(("name", "text"), names_of("constructors").items())
def test_constructors_of_users(name, text):
    parameters = inspect.signature(getattr(systems, name)).parameters
    expected = read_parameters_of(text)
    taken = {key: parameter for key, parameter in parameters.items() if key in expected}
    assert list(taken) == list(expected)
    for key, default in expected.items():
        assert not default or str(taken[key].default) == default
    positional = [
        key for key, parameter in parameters.items() if parameter.kind != parameter.KEYWORD_ONLY
    ]
    assert [key for key in positional if key != "options"][: len(expected)] == list(expected)


def test_methods_of_users():
    homes = {"QParam": systems.QParam, "Net": systems.IntegerNetwork}
    for method in names_of("methods"):
        path, _, arguments = method.partition("(")
        home, _, name = path.rpartition(".")
        function = getattr(homes.get(home, systems.QConv2d), name)
        for argument in filter(None, arguments.rstrip(")").split(", ")):
            key, _, default = argument.partition("=")
            parameter = inspect.signature(function).parameters[key]
            assert not default or str(parameter.default) == default


def test_errors_of_users():
    assert len(names_of("errors")) == 3
    x = torch.randn(2, 3)
    for name in ("qi", "qo"):
        other = {"qi": "qo", "qo": "qi"}[name]
        with_range = systems.QLinear(nn.Linear(3, 2))
        without = systems.QLinear(nn.Linear(3, 2), **{name: False})
        with_range(x)
        without(x)
        with pytest.raises(ValueError, match=f"{name} has been provided in init function"):
            with_range.freeze(**{name: getattr(with_range, name)})
        with pytest.raises(ValueError, match=f"{name} is not existed"):
            without.freeze()
        assert not with_range.is_frozen
        without.freeze(**{name: getattr(with_range, other)})
        assert without.is_frozen
