"""`duplicate_model_with_quant`: what it inserts, what it leaves, what it says."""

import copy
import logging

import pytest
import torch
from torch import nn

from qdq.systems import LinearQuant, NormalQuant, duplicate_model_with_quant, list_unquantized


class Halves(nn.Sequential):
    """A subclass that runs all its children, and more."""

    def forward(self, x):
        return super().forward(x) / 2 + x


class Loops(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x * 3


class Picks(nn.Sequential):
    """A subclass that an insertion would break."""

    def forward(self, x):
        return self[1](self[0](x)) + x


class Names(nn.Sequential):
    def __init__(self, layer):
        super().__init__()
        self.conv = layer

    def forward(self, x):
        return self.conv(x) + x


def make_layers():
    return nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 8)


def test_a_sequential_is_copied_and_its_layers_are_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Linear(8, 8))).eval()
    model.note = "of the user"
    keys = list(model._modules)
    quantized = duplicate_model_with_quant(model, 8, counter=1)
    assert quantized is not model and list(model._modules) == keys
    assert quantized[0] is model[0]
    assert quantized.note == model.note
    assert list(quantized._modules) == ["0", "0_linear_quant", "1", "2"]
    assert not quantized.training
    assert not any(module.training for module in quantized.modules())


def test_other_containers_change_in_place():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8))
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
            self.missing = None
            self.register_module("nothing", None)

    model = Network()
    assert duplicate_model_with_quant(model, 8) is model
    assert isinstance(model.body[1], LinearQuant)
    assert isinstance(model.parts[0][1], LinearQuant)
    assert model.nothing is None


def test_settings_reach_the_quantizers():
    model = nn.Sequential(nn.Linear(8, 8))
    quantizer = duplicate_model_with_quant(model, 5, 0.25, 3)[1]
    assert (quantizer.bits, quantizer.overflow_rate, quantizer.counter) == (5, 0.25, 3)
    assert (quantizer.name, quantizer.path) == ("0_quant", "0_linear_quant")
    assert isinstance(duplicate_model_with_quant(model, 5, type="tanh")[1], NormalQuant)


@pytest.mark.parametrize("kind", [Halves, Loops])
def test_a_subclass_keeps_its_class_and_its_forward(kind):
    model = kind(*make_layers())
    quantized = duplicate_model_with_quant(model, 16, counter=1)
    assert type(quantized) is kind
    assert list(quantized._modules) == ["0", "0_linear_quant", "1", "1_linear_quant"]
    images = torch.randn(2, 4, 8, 8)
    expected = model(images)
    assert torch.equal(quantized(images), expected)
    torch.testing.assert_close(quantized(images), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("model", [Picks(*make_layers()), Names(make_layers()[0])])
def test_a_subclass_that_picks_its_children_is_left_and_reported(model, caplog):
    images = torch.randn(2, 4, 8, 8)
    expected = model(images)
    keys = list(model._modules)
    quantized = duplicate_model_with_quant(model, 8)
    assert type(quantized) is type(model) and list(quantized._modules) == keys
    assert torch.equal(quantized(images), expected)
    assert f"{type(model).__name__} has a forward of its own" in caplog.text


def test_a_forward_of_the_instance_is_left():
    model = nn.Sequential(*make_layers())
    model.forward = lambda x: model[1](model[0](x))
    quantized = duplicate_model_with_quant(model, 8)
    assert list(quantized._modules) == ["0", "1"]


def test_a_shared_module_has_one_quantizer():
    layer = nn.Linear(8, 8)
    block = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer), block, block)
    quantized = duplicate_model_with_quant(model, 8, counter=4)
    quantizer = quantized.get_submodule("0_linear_quant")
    assert quantized.get_submodule("2_linear_quant") is quantizer
    assert quantized.get_submodule("3.0_linear_quant") is quantizer
    assert quantized.get_submodule("4") is quantized.get_submodule("5")
    quantized(torch.randn(2, 8))
    assert quantizer.counter == 1  # it counts calls of its own, not those of the model
    assert quantized.get_submodule("4.0_linear_quant").counter == 2


def test_calibrated_state_is_in_the_state_dict():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    quantized = duplicate_model_with_quant(model, 8, counter=1)
    values = torch.randn(5, 8)
    quantized(values)
    fresh = duplicate_model_with_quant(nn.Sequential(*copy.deepcopy(list(model))), 8)
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(values), quantized(values))


def test_on_a_device(device):
    model = nn.Sequential(nn.Linear(8, 8), nn.AvgPool2d(1)).to(device)
    quantized = duplicate_model_with_quant(model, 8, counter=1)
    assert {buffer.device.type for buffer in quantized.buffers()} == {device.type}
    values = torch.randn(1, 3, 8, device=device)
    quantized(values)
    assert quantized(values).device.type == device.type


def test_vgg(caplog):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    with torch.device("meta"):  # its linear layers are large
        model = torchvision.models.vgg11()
    model.features.to_empty(device="cpu")
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    model.classifier[0] = nn.Linear(512 * 7 * 7, 32)
    model.classifier[3] = nn.Linear(32, 32)
    model.classifier[6] = nn.Linear(32, 10)
    model.eval()
    quantized = duplicate_model_with_quant(model, 8, counter=1)
    quantizers = [name for name, module in quantized.named_modules() if hasattr(module, "counter")]
    assert len(quantizers) == 8 + 3  # convolutions and linear layers
    report = list_unquantized(quantized)
    assert [entry.name for entry in report.entries] == ["avgpool"]
    assert "1 AdaptiveAvgPool2d (avgpool)" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    expected = quantized(images)
    signal = expected.square().sum()
    noise = (quantized(images) - expected).square().sum()
    assert 10 * torch.log10(signal / noise) > 15


def test_resnet(caplog):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    model = torchvision.models.resnet18(num_classes=10).eval()
    duplicate_model_with_quant(model, 8)
    quantizers = [name for name, module in model.named_modules() if hasattr(module, "counter")]
    # Of all layers, only the shortcuts stand in a Sequential with other layers.
    assert quantizers == [
        f"layer{block}.0.downsample.{index}_linear_quant" for block in (2, 3, 4) for index in (0, 1)
    ]
    entries = list_unquantized(model).entries
    kinds = [entry.kind for entry in entries]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {
        "Conv2d": 17,
        "BatchNorm2d": 17,
        "Linear": 1,
        "AdaptiveAvgPool2d": 1,
        "add": 8,
    }
    assert "layer1.0.add" in {entry.name for entry in entries}
    assert caplog.records[0].levelno == logging.WARNING
    assert "8 add (layer1.0.add" in caplog.text


def test_nothing_to_report(caplog):
    duplicate_model_with_quant(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 8)
    assert caplog.text == ""


def test_a_model_that_has_quantizers():
    quantized = duplicate_model_with_quant(nn.Sequential(nn.Linear(3, 3)), 8)
    with pytest.raises(
        RuntimeError, match="has quantizers already: 0_linear_quant is a LinearQuant"
    ):
        duplicate_model_with_quant(quantized, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "cubic"}, "type is 'cubic'; it must be 'linear', 'minmax', 'log' or 'tanh'"),
        ({"bits": 0}, "bits is 0"),
        ({"overflow_rate": 1.0}, "overflow_rate is 1.0"),
        ({"counter": -1}, "counter is -1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=message):
        duplicate_model_with_quant(model, **({"bits": 8} | settings))
    assert len(model) == 1


def test_not_a_module():
    with pytest.raises(TypeError):
        duplicate_model_with_quant("resnet18", 8)
