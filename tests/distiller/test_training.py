"""The quantizers of training on whole models: what they change, what they refuse, what they export."""

import copy
import logging
from collections import OrderedDict

import onnxruntime
import pytest
import torch
from golden import read_cases
from torch import nn

import qdq
from qdq import systems
from qdq.distiller import (
    DorefaQuantizer,
    NCFQuantAwareTrainQuantizer,
    PACTQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    WRPNQuantizer,
)
from qdq.distiller.files import quantizer_classes
from qdq.distiller.files.quantizer_classes import list_keys
from qdq.errors import ArgumentError, ArgumentTypeError, ExportError, StateError, UnsupportedError
from qdq.metrics import sqnr_db
from qdq.systems.layer import SystemLayer

CLASSES = [
    QuantAwareTrainRangeLinearQuantizer,
    NCFQuantAwareTrainQuantizer,
    DorefaQuantizer,
    PACTQuantizer,
    WRPNQuantizer,
]
IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Net(nn.Module):
    """Three convolutions, a residual sum, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.relu3 = nn.ReLU6()
        self.fc = nn.Linear(16, 4)

    def forward(self, images):
        first = self.relu1(self.conv1(images))
        second = self.relu2(self.conv2(first))
        third = self.relu3(self.conv3(second) + first)
        return self.fc(third.mean((2, 3)))


def make_net():
    torch.manual_seed(0)
    return Net()


def make_quantizer(kind, net=None, **options):
    net = make_net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    options = {"bits_activations": 8, "bits_weights": 8} | options
    return kind(net, optimizer, **options)


def train(quantizer, num_steps=3):
    """Train as a user does, with a loop of his own."""
    model, optimizer = quantizer.model, quantizer.optimizer
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return model.eval()


def make_trained(kind, net=None, **options):
    quantizer = make_quantizer(kind, net, **options)
    quantizer.prepare_model(IMAGES)
    return train(quantizer)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_float_weights_train_and_stay_in_the_state_dict(kind):
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    quantizer = make_quantizer(kind, net, bits_activations=4, bits_weights=4)
    quantizer.prepare_model(IMAGES)
    assert quantizer.model is net
    state = net.state_dict()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor)
    train(quantizer)
    for name in ("conv1", "conv2", "conv3", "fc"):
        layer = net.get_submodule(name)
        assert isinstance(layer, SystemLayer)
        assert not torch.equal(layer.weight, before[f"{name}.weight"])
        assert len(layer.weight_system(layer.weight).unique()) <= 2**4
    for name in ("relu1", "relu2", "relu3"):
        wrapper = net.get_submodule(name)
        assert type(wrapper.wrapped_module) in (nn.ReLU, nn.ReLU6)
    assert quantizer.left_float.entries == ()


def test_the_golden_classes_are_all_there():
    names = {case["class_"] for case in read_cases("distiller_yaml") if "class_" in case}
    assert names == set(quantizer_classes.CLASSES)
    assert names == {kind.__name__ for kind in CLASSES} | {quantizer_classes.POST_TRAINING}


def test_the_golden_keys_of_ncf_are_those_without_the_input():
    keys = [
        list_keys(kind)
        for kind in (QuantAwareTrainRangeLinearQuantizer, NCFQuantAwareTrainQuantizer)
    ]
    assert set(keys[0]) - set(keys[1]) == {"quantize_inputs"}
    trained = make_trained(NCFQuantAwareTrainQuantizer)
    expected = make_trained(QuantAwareTrainRangeLinearQuantizer, quantize_inputs=False)
    assert torch.equal(trained(IMAGES), expected(IMAGES))
    assert trained.conv1.input_system is None


@pytest.mark.parametrize("kind", CLASSES)
def test_golden_errors(kind):
    """'train_with_fp_copy without optimizer' is a ValueError, 'prepare_model twice' a RuntimeError."""
    golden = {case["when"]: case["error"] for case in read_cases("distiller_errors")}
    assert golden["train_with_fp_copy without optimizer"] == "ValueError"
    assert golden["prepare_model twice"] == "RuntimeError"
    with pytest.raises(ValueError, match="has no optimizer"):
        kind(make_net(), None, bits_activations=8, bits_weights=8)
    quantizer = make_quantizer(kind)
    quantizer.prepare_model(IMAGES)
    with pytest.raises(RuntimeError, match="quantized already"):
        quantizer.prepare_model(IMAGES)
    with pytest.raises(StateError, match="quantized already"):
        make_quantizer(kind, quantizer.model)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"bits_weights": 33}, ArgumentError, "bits_weights is 33"),
        ({"bits_activations": "8"}, ArgumentError, "bits_activations is"),
        ({"mode": "SYM"}, ValueError, "known are SYMMETRIC"),
        ({"mode": 3}, TypeError, "expected is a name"),
        ({"ema_decay": 1.0}, ArgumentError, "ema_decay is 1"),
        ({"ema_decay": None}, ArgumentError, "ema_decay is null"),
        ({"ema_decay": "slow"}, ArgumentError, "ema_decay is 'slow'; expected a number"),
        ({"quantize_inputs": "yes"}, ArgumentError, "quantize_inputs is 'yes'; expected true"),
        ({"freeze_bn_delay": -1}, ArgumentError, "freeze_bn_delay is -1"),
        ({"num_bits_inputs": 40}, ArgumentError, "num_bits_inputs: bits_activations is 40"),
    ],
)
def test_invalid_values_are_refused(options, error, reason):
    with pytest.raises(error, match=reason):
        make_quantizer(QuantAwareTrainRangeLinearQuantizer, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"act_clip_init_val": 0.0},
        {"act_clip_init_val": None},
        {"act_clip_init_val": "high"},
        {"act_clip_decay": -1.0},
        {"act_clip_decay": [1]},
        {"bits_bias": -1},
    ],
)
def test_invalid_values_of_pact_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        make_quantizer(PACTQuantizer, **options)


def test_text_of_a_file_that_is_a_number_is_one():
    """YAML 1.1 has 2e-4 as text."""
    quantizer = make_quantizer(PACTQuantizer, act_clip_decay="2e-4", act_clip_init_val="8")
    quantizer.prepare_model(IMAGES)
    assert quantizer.optimizer.param_groups[-1]["weight_decay"] == 2e-4
    assert quantizer.model.relu1.fake_q.clip_val.item() == 8
    trained = make_trained(QuantAwareTrainRangeLinearQuantizer, ema_decay="9e-1")
    assert trained.relu1.fake_q.decay == 0.9


@pytest.mark.parametrize("kind", CLASSES)
def test_a_quantizer_that_quantizes_nothing_is_refused(kind):
    quantizer = make_quantizer(kind, bits_activations=32, bits_weights=None)
    with pytest.raises(ArgumentError, match="quantizes nothing"):
        quantizer.prepare_model(IMAGES)
    assert type(quantizer.model.conv1) is nn.Conv2d


def test_a_wrapped_model_is_refused():
    net = nn.DataParallel(make_net())
    with pytest.raises(UnsupportedError, match="wrapped in DataParallel"):
        make_quantizer(DorefaQuantizer, net)


def test_overrides_choose_bits():
    overrides = OrderedDict(
        {
            "conv1": {"bits_weights": None},
            "relu.": {"bits_activations": 2},
            "fc": {"bits_weights": 32, "bits_bias": 8},
            "conv[0-9]": {"bits_weights": 3},
        }
    )
    quantizer = make_quantizer(DorefaQuantizer, overrides=overrides)
    quantizer.prepare_model(IMAGES)
    net = quantizer.model
    assert type(net.conv1) is nn.Conv2d
    assert net.conv2.weight_system.num_bits == 3
    assert type(net.fc) is nn.Linear
    assert net.relu2.fake_q.num_bits == 2
    names = [entry.name for entry in quantizer.left_float.entries]
    assert names == ["conv1", "fc"]


def test_a_key_that_training_does_not_know_is_refused_and_nothing_changes():
    overrides = OrderedDict({"conv1": {"clip_acts": "AVG"}})
    quantizer = make_quantizer(WRPNQuantizer, overrides=overrides)
    with pytest.raises(ArgumentTypeError, match="bits_activations, bits_weights, bits_bias"):
        quantizer.prepare_model(IMAGES)
    assert type(quantizer.model.conv1) is nn.Conv2d


def test_layers_that_training_does_not_quantize_are_listed():
    net = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 1))
    quantizer = make_quantizer(DorefaQuantizer, net)
    quantizer.prepare_model()
    assert [entry.name for entry in quantizer.left_float.entries] == ["0"]
    assert "does not quantize a ConvTranspose2d" in quantizer.left_float.format_table()


class Activations(nn.Module):
    """Activations of which training takes the first alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first, self.act, self.gate = nn.ReLU(), nn.Hardswish(), nn.GELU()

    def forward(self, images):
        return torch.relu(self.gate(self.act(self.first(self.conv(images)))))


@pytest.mark.parametrize("kind", CLASSES)
def test_activations_that_stay_float_are_listed_and_logged(kind, caplog):
    quantizer = make_quantizer(kind, Activations())
    quantizer.prepare_model(IMAGES)
    found = {entry.name: entry.kind for entry in quantizer.left_float.entries}
    assert found == {"act": "Hardswish", "gate": "GELU", "relu": "relu"}
    logged = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("Hardswish (act): training quantizes the outputs of ReLU" in line for line in logged)
    assert any("1 relu (relu): a function call" in line for line in logged)


def test_without_a_dummy_input_modules_alone_are_listed():
    quantizer = make_quantizer(DorefaQuantizer, Activations(), bits_activations=None)
    quantizer.prepare_model()
    reasons = {entry.name: entry.reason for entry in quantizer.left_float.entries}
    assert reasons.keys() == {"first", "act", "gate"}
    assert reasons["first"] == "its output has no bits"


def test_a_shared_relu_shares_its_quantizer():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net.append(net[1])
    quantizer = make_quantizer(PACTQuantizer, net)
    quantizer.prepare_model()
    assert net[1] is net[3]
    assert len(quantizer.optimizer.param_groups) == 2


def test_biases_have_buffers_in_the_range_linear_scheme_alone():
    net = make_trained(QuantAwareTrainRangeLinearQuantizer)
    state = net.state_dict()
    assert state["conv1.bias_system.bias_scale"] != 1
    assert state["conv1.bias_system.bias_zero_point"] == 0
    assert make_trained(DorefaQuantizer).conv1.bias_system is None
    assert make_trained(DorefaQuantizer, bits_bias=4).conv1.bias_system is not None


def test_scales_per_channel():
    net = make_trained(QuantAwareTrainRangeLinearQuantizer, per_channel_wts=True)
    assert net.conv1.weight_system.weight_scale.shape == (16, 1, 1, 1)
    assert net.fc.weight_system.weight_scale.shape == (4, 1)


def test_the_input_of_the_network_is_quantized_in_the_layer_that_reads_it():
    net = make_trained(QuantAwareTrainRangeLinearQuantizer, num_bits_inputs=3)
    assert net.conv1.input_system.num_bits == 3
    assert net.conv2.input_system is None
    float_input = make_trained(QuantAwareTrainRangeLinearQuantizer, quantize_inputs=False)
    assert float_input.conv1.input_system is None
    with pytest.raises(ArgumentError, match=r"is read by 0, which is no layer"):
        make_quantizer(
            QuantAwareTrainRangeLinearQuantizer,
            nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        ).prepare_model(IMAGES)


def test_two_layers_that_read_the_input_share_its_range():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, values):
            flat = values.flatten(1)
            return self.left(flat) + self.right(flat)

    quantizer = make_quantizer(QuantAwareTrainRangeLinearQuantizer, Two())
    quantizer.prepare_model()
    assert quantizer.model.left.input_system is quantizer.model.right.input_system
    assert quantizer.model.left.input_system is not None


def test_the_learned_ends_have_their_own_decay():
    quantizer = make_quantizer(PACTQuantizer, act_clip_decay=0.1)
    quantizer.prepare_model()
    weights, ends = quantizer.optimizer.param_groups
    assert (weights["weight_decay"], ends["weight_decay"]) == (1e-4, 0.1)
    assert len(ends["params"]) == 3
    net = train(quantizer)
    assert 0 < net.relu1.fake_q.clip_val < 8
    default = make_quantizer(PACTQuantizer)
    default.prepare_model()
    assert default.optimizer.param_groups[1]["weight_decay"] == 1e-4


def find_verdicts(transfer):
    verdicts = {}
    for layer in transfer.layers:
        for tensor in layer.tensors:
            verdicts.setdefault(tensor.place, set()).add(tensor.verdict)
    return verdicts


EXPORTS = [
    (QuantAwareTrainRangeLinearQuantizer, 8, {"weight": {"exact"}, "input": {"exact"}}),
    (QuantAwareTrainRangeLinearQuantizer, 4, {"weight": {"exact"}, "input": {"exact"}}),
    (DorefaQuantizer, 7, {"weight": {"exact"}, "input": {"exact"}}),
    (DorefaQuantizer, 3, {"weight": {"exact"}, "input": {"exact"}}),
    (DorefaQuantizer, 1, {"weight": {"exact"}, "input": {"exact"}}),
    (DorefaQuantizer, 8, {"weight": {"convert"}, "input": {"convert"}}),
    (PACTQuantizer, 7, {"weight": {"exact"}, "input": {"exact"}}),
    (PACTQuantizer, 8, {"weight": {"convert"}, "input": {"convert"}}),
    (WRPNQuantizer, 7, {"weight": {"exact"}, "input": {"exact"}}),
    (WRPNQuantizer, 8, {"weight": {"exact"}, "input": {"convert"}}),
]


@pytest.mark.parametrize(("kind", "num_bits", "expected"), EXPORTS)
def test_what_the_export_says(kind, num_bits, expected):
    net = make_trained(kind, bits_activations=num_bits, bits_weights=num_bits)
    is_converted = "convert" in str(expected)
    if is_converted:
        with pytest.raises(ExportError, match="allow conversion"):
            systems.to_tensorrt(copy.deepcopy(net))
    assert find_verdicts(systems.to_tensorrt(net, convert=is_converted)) == expected


def test_asymmetric_ranges_are_converted():
    mode = {"activations": "ASYMMETRIC_SIGNED", "weights": "ASYMMETRIC_UNSIGNED"}
    # The input of the network may happen to have its zero in the middle.
    net = make_trained(QuantAwareTrainRangeLinearQuantizer, mode=mode, quantize_inputs=False)
    transfer = systems.to_tensorrt(net, convert=True)
    assert find_verdicts(transfer) == {"weight": {"convert"}, "input": {"convert"}}


def run_file(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@pytest.mark.parametrize(
    ("kind", "num_bits"), [case[:2] for case in EXPORTS if "convert" not in str(case[2])]
)
def test_the_exported_file_computes_the_same(kind, num_bits, tmp_path):
    """Values far outside the ranges show the clamps."""
    options = {"bits_activations": num_bits, "bits_weights": num_bits}
    net = make_trained(kind, overrides=OrderedDict({"fc": {"bits_weights": None}}), **options)
    images = IMAGES * torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1)
    with torch.no_grad():
        expected = net(images).numpy()
    systems.to_tensorrt(net)
    systems.calibrate_inputs(net, [IMAGES * 10])
    if kind is not QuantAwareTrainRangeLinearQuantizer:
        net.conv1._input_quantizer.disable()  # the scheme keeps the input of the network in float
    with torch.no_grad():
        result = net(images).numpy()
    # Half to even on a product and on a quotient may differ at exact ties: one code in few places.
    assert sqnr_db(expected, result) > 60
    if kind is QuantAwareTrainRangeLinearQuantizer:
        qdq.export_onnx(net, (images,), tmp_path / "net.onnx")
        assert sqnr_db(expected, run_file(tmp_path / "net.onnx", images)) > 30


@pytest.mark.parametrize("kind", [DorefaQuantizer, PACTQuantizer])
def test_a_converted_activation_keeps_its_relu(kind):
    net = make_trained(kind)
    images = IMAGES * 3
    with torch.no_grad():
        expected = net(images)
    systems.to_tensorrt(net, convert=True)
    systems.calibrate_inputs(net, [images])
    with torch.no_grad():
        result = net(images)
    assert sqnr_db(expected.numpy(), result.numpy()) > 25


@pytest.mark.parametrize("kind", CLASSES)
def test_preparing_is_logged(kind, caplog):
    quantizer = make_quantizer(kind)
    with caplog.at_level(logging.INFO, logger="qdq"):
        quantizer.prepare_model(IMAGES)
    line = f"Preparing model for quantization using {kind.__name__}"
    assert caplog.messages.count(line) == 1


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"conv2": {"bits_activations": 4}}, "bits_activations has no effect: training quantizes"),
        ({"relu1": {"bits_weights": 4}}, "bits_weights has no effect: the layer has no weight"),
        ({"conv2": {"bits_weights": None, "bits_bias": 8}}, "bits_bias has no effect: the layer"),
        ({"conv1": {"bits_bias": 8}}, "bits_bias has no effect: the layer has no bias"),
        ({"conv2": {"bits_weights": 4, "bits_activations": None, "bits_bias": 8}}, None),
        ({"conv2|relu1": {"bits_weights": 4, "bits_activations": 4}}, None),
        ({"relu1": {"bits_activations": 4, "bits_weights": 0}}, None),
    ],
)
def test_bits_of_overrides_without_effect_are_named(overrides, expected, kind, caplog):
    net = make_net()
    net.conv1.bias = None
    with caplog.at_level(logging.WARNING, logger="qdq"):
        make_quantizer(kind, net, overrides=OrderedDict(overrides)).prepare_model()
    lines = [line for line in caplog.messages if line.startswith("override ")]
    assert len(lines) == (expected is not None)
    for line in lines:
        assert expected in line
