"""`to_tensorrt`: two layers of each system, exported where they fit, against the emulation; and the refusals."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qdq import build_engine, export_onnx, predict
from qdq.errors import ExportError, StateError, UnsupportedError
from qdq.systems import (
    BinaryBases,
    BinaryInput,
    BinaryWeight,
    IntegerNetwork,
    LinearQuant,
    QConv2d,
    calibrate_inputs,
    duplicate_model_with_quant,
    min_max_quantize,
    prepare_acoustic,
    prepare_uint8_training,
    project_ternary,
    quantize_parameters,
    to_tensorrt,
)
from qdq.systems.arithmetic import sign_of
from qdq.systems.grid import Grid, note_grid
from qdq.systems.layer import SystemQuantizer, convert_layer
from qdq.systems.powers import PowerLevels

needs_rtx = pytest.mark.trt
IMAGES = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False)
    ).eval()


def fixed_inputs(bits=8):
    """A calibrated quantizer in fixed point."""
    quantizer = LinearQuant("input", bits, counter=1)
    quantizer(4 * torch.randn(1000))
    return quantizer


def give_inputs(net, bits=8):
    """Quantize the inputs of both layers in fixed point."""
    for layer in (net[0], net[2]):
        convert_layer(layer, getattr(layer, "weight_system", None), fixed_inputs(bits))
    return net


def make_fixed_point(bits=8):
    net = make_net()
    quantize_parameters(net, bits)
    standing = nn.Sequential(*net)
    duplicated = duplicate_model_with_quant(standing, bits, counter=1)
    net = nn.Sequential(fixed_inputs(bits), *duplicated).eval()
    net(IMAGES)
    return net


def make_binary():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryWeight("w"), fixed_inputs())
    return net


def make_ternary():
    net = make_net()
    for layer in (net[0], net[2]):
        alpha, codes = project_ternary(layer.weight.detach())
        with torch.no_grad():
            layer.weight.copy_(alpha * codes)
        scale = alpha.flatten().float()
        note_grid(layer, "weight", Grid("ternary", scale, torch.zeros_like(scale), -1, 1))
    return give_inputs(net)


def make_powers(bits):
    net = make_net()
    for layer in (net[0], net[2]):
        levels = PowerLevels.of(layer.weight.detach(), bits)
        with torch.no_grad():
            layer.weight.copy_(levels.quantize(layer.weight))
        note_grid(layer, "weight", levels.describe(layer.weight.detach()))
    return give_inputs(net)


def make_uint8(symmetric):
    net = make_net()
    prepare_uint8_training(net, IMAGES, symmetric=symmetric)
    net.train()(IMAGES)
    return net.eval()


def make_integer(scheme, axis=None, groups=None):
    net = IntegerNetwork(*make_net())
    net.quantize(8, scheme=scheme, axis=axis, groups=groups)
    net.quantize_forward(IMAGES)
    net.freeze()
    return net


EXACT = {
    "fixed point": make_fixed_point,
    "fixed point, 6 bits": lambda: make_fixed_point(6),
    "binary": make_binary,
    "ternary": make_ternary,
    "powers of two, 4 bits": lambda: make_powers(4),
    "UINT8 training, symmetric": lambda: make_uint8(True),
    "integer, per layer": lambda: make_integer("symmetric"),
    "integer, per group": lambda: make_integer("symmetric", 0, 4),
    "integer, per channel": lambda: make_integer("symmetric", 0),
}


def run(net):
    with torch.no_grad():
        if isinstance(net, IntegerNetwork):
            return net.quantize_inference(IMAGES).numpy()
        return net(IMAGES).numpy()


def read_codes(path):
    """The int8 tensors of a file, by shape."""
    graph = onnx.load(path).graph
    arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    return [array for array in arrays if array.dtype == np.int8 and array.ndim == 4]


def largest_effect_of_one_code(net):
    """The change of an output if all codes of both inputs are one off."""
    first, second = net_layers(net)
    bound = 0.0
    for layer in (first, second):
        step = float(layer._input_quantizer.scale)
        gain = float(layer.weight.detach().abs().sum((1, 2, 3)).max())
        bound = (bound + step) * gain
    return bound


def net_layers(net):
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


@needs_rtx
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_exact_systems(make, tmp_path):
    net = make()
    expected = run(net)
    transfer = to_tensorrt(net)
    assert [layer.precision for layer in transfer.layers] == ["int8", "int8"]
    assert {tensor.verdict for layer in transfer.layers for tensor in layer.tensors} == {"exact"}
    path = tmp_path / "model.onnx"
    weights = [layer.weight.detach().clone() for layer in net_layers(net)]
    export_onnx(net, IMAGES[:2], path)

    codes = read_codes(path)
    for layer, weight in zip(net_layers(net), weights, strict=True):
        scale = layer._weight_quantizer.scale
        expected_codes = (weight.double() / scale.double()).round().numpy()
        np.testing.assert_allclose(expected_codes * scale.numpy(), weight.numpy(), rtol=1e-5)
        assert any(np.array_equal(array, expected_codes) for array in codes)
    outputs = predict(path, [IMAGES])
    difference = np.abs(outputs - expected)
    # Ties round half up here and half to even there, and the integer network quantizes its output, too.
    assert difference.max() <= largest_effect_of_one_code(net)
    assert np.median(difference) < 0.01 * np.abs(expected).max()
    report = build_engine(path, backend="rtx")
    assert not report.missing_int8
    assert sum(layer.int8 for layer in report.layers) == 2


def make_min_max():
    net = make_net()
    quantize_parameters(net, 8, quant_method="minmax")
    return give_inputs(net)


def make_acoustic(bits=8, static=True):
    net = make_net()
    prepare_acoustic(net, bits, batches=[IMAGES] if static else None)
    return net


def make_bnn():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryWeight("w", scaled=False), BinaryInput("x"))
    net[1] = nn.Identity()
    return net


def make_bases():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryBases("w", 3), fixed_inputs())
    return net


CONVERTED = {
    "min-max weights": (make_min_max, "zero point", 25),
    "affine": (lambda: make_integer("unsigned"), "zero point", 25),
    "acoustic, 8 bits": (make_acoustic, "zero point", 25),
    "UINT8 training": (lambda: make_uint8(False), "zero point", 25),
    "powers of two, 5 bits": (lambda: make_powers(5), "codes from", 25),
    "binary activations": (make_bnn, "no 1-bit gain", 60),
    "binary bases": (make_bases, "sum of 3 binary bases", 25),
}


@needs_rtx
@pytest.mark.parametrize(("make", "reason", "least_db"), CONVERTED.values(), ids=CONVERTED)
def test_converted_systems(make, reason, least_db, tmp_path):
    net = make()
    expected = run(net)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ExportError, match=reason) as refused:
        to_tensorrt(net)
    assert "convert=True" in refused.value.fix
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())

    transfer = to_tensorrt(net, convert=True)
    converted = []
    for layer in transfer.layers:
        converted += [tensor for tensor in layer.tensors if tensor.verdict == "convert"]
    assert converted
    assert all(tensor.after_db is None or tensor.after_db > 8 for tensor in converted)
    assert reason in transfer.format_table()
    path = tmp_path / "model.onnx"
    export_onnx(net, IMAGES[:2], path)
    outputs = predict(path, [IMAGES])
    error = np.square(outputs - expected).sum()
    assert 10 * np.log10(np.square(expected).sum() / max(error, 1e-30)) > least_db
    assert not build_engine(path, backend="rtx").missing_int8


class Dynamic(SystemQuantizer):
    """Min-max of each batch."""

    def forward(self, values):
        return min_max_quantize(values, 8)

    def describe(self, values):
        one = torch.ones(1)
        return Grid("min-max", one, 0 * one, 0, 255, "have a range that each batch changes")


def make_standing(kind):
    net = make_net()
    quantize_parameters(net, 8)
    return duplicate_model_with_quant(net, 8, type=kind).eval()


REFUSED = {
    "log": (lambda: make_standing("log"), "log"),
    "tanh": (lambda: make_standing("tanh"), "tanh"),
    "ranges of each batch": (lambda: make_standing("minmax"), "batch"),
    "12 bits": (lambda: make_fixed_point(12), "12 bits"),
    "acoustic, 16 bits": (lambda: make_acoustic(16), "16 bits"),
    "acoustic, dynamic": (lambda: make_acoustic(static=False), "batch"),
    "blocks of inputs": (lambda: make_integer("symmetric", 1), "input"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_systems(make, reason):
    net = make()
    modules = [type(module) for module in net.modules()]
    with pytest.raises(ExportError, match=reason) as refused:
        to_tensorrt(net, convert=True)
    assert "TensorRT int8" in refused.value.message
    assert [type(module) for module in net.modules()] == modules


def test_all_offenders_are_in_one_error():
    net = make_uint8(False)
    with pytest.raises(ExportError) as refused:
        to_tensorrt(net)
    lines = refused.value.message.splitlines()
    assert sum(line.startswith("0: ") for line in lines) == 2
    assert sum(line.startswith("2: ") for line in lines) == 2
    assert "TensorRT int8 needs zero point 0" in refused.value.message


def test_export_names_the_function(tmp_path):
    with pytest.raises(ExportError, match="another number system") as refused:
        export_onnx(make_binary(), IMAGES, tmp_path / "model.onnx")
    assert "to_tensorrt" in refused.value.fix
    assert not list(tmp_path.iterdir())


def test_an_uncalibrated_model_is_refused():
    net = make_binary()
    net[0].input_system = LinearQuant("x", 8)
    with pytest.raises(StateError):
        to_tensorrt(net)


def test_a_weight_that_has_changed_is_refused():
    net = make_ternary()
    with torch.no_grad():
        net[2].weight.add_(0.01)
    with pytest.raises(ExportError, match="2: ternary weights: have other values"):
        to_tensorrt(net, convert=True)


def test_a_binary_weight_without_an_input_quantizer_is_calibrated_later():
    net = make_binary()
    for layer in (net[0], net[2]):
        layer.input_system = None
    expected = [sign_of(layer.weight.detach()) for layer in net_layers(net)]
    transfer = to_tensorrt(net)
    assert "calibrate_inputs" in transfer.format_table()
    calibrate_inputs(net, [IMAGES], method="max")
    for layer, signs in zip(net_layers(net), expected, strict=True):
        assert torch.equal(layer.weight.sign(), signs)
        assert layer._input_quantizer.amax is not None
        steps = (layer._weight_quantizer(layer.weight) - layer.weight).detach()
        assert float(steps.abs().max()) < 1e-6


def test_a_quantizer_before_a_sum_stays():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_binary()
            self.first = fixed_inputs()
            self.last = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = self.first(self.body(x))
            return self.last(torch.relu(y)) + y.mean(1, keepdim=True)

    net = Block().eval()
    note_grid(net.last, "weight", Grid("x", torch.ones(1), torch.zeros(1), -1, 1))
    with torch.no_grad():
        net.last.weight.copy_(sign_of(net.last.weight))
    expected = run(net)
    transfer = to_tensorrt(net)
    assert [tensor.place for tensor in transfer.standing] == ["first"]
    np.testing.assert_allclose(run(net), expected, atol=1e-4)


def test_a_model_that_cannot_be_traced():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = fixed_inputs()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.quantizer(x)) if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match=r"torch\.fx cannot say"):
        to_tensorrt(Branch())


def test_layers_that_no_system_quantizes_stay_in_float():
    net = nn.Sequential(make_binary(), nn.Conv2d(16, 4, 1))
    transfer = to_tensorrt(net)
    assert transfer.layers[-1].precision == "float"
    assert "no number system" in transfer.layers[-1].note
    assert type(net[1]) is nn.Conv2d


def test_calibrating_what_is_missing_keeps_the_ranges_of_the_system():
    net = make_net()
    quantize_parameters(net, 8)
    net = duplicate_model_with_quant(net, 8, counter=1).eval()
    net(IMAGES)
    to_tensorrt(net)
    first, second = net_layers(net)
    known = second._input_quantizer.amax.clone()
    ranges = calibrate_inputs(net, [IMAGES[:2] * 0.1], method="max")
    assert [entry.name for entry in ranges] == ["0._input_quantizer"]
    assert first._input_quantizer.amax == (IMAGES[:2] * 0.1).abs().max()
    assert torch.equal(second._input_quantizer.amax, known)


def test_a_quantizer_that_still_counts_is_refused():
    net = nn.Sequential(LinearQuant("q", 4, counter=10), make_ternary()[0])
    net[0](IMAGES)
    with pytest.raises(StateError, match="counter is 9"):
        to_tensorrt(net)


def test_signs_that_are_drawn_in_training_are_not_exported():
    net = make_binary()
    net[0].weight_system = BinaryWeight("w", sampling="hard")
    expected = run(net.eval())
    to_tensorrt(net.train())
    assert net.training
    np.testing.assert_allclose(run(net.eval()), expected, atol=1e-5)


def test_a_quantizer_before_another_one_stays():
    net = make_binary()
    standing = fixed_inputs(3)
    net = nn.Sequential(net[0], standing, net[2]).eval()
    expected = run(net)
    transfer = to_tensorrt(net)
    assert [tensor.place for tensor in transfer.standing] == ["1"]
    assert np.median(np.abs(run(net) - expected)) < 1e-4


def test_one_weight_with_two_grids_is_refused():
    net = make_binary()
    plain = nn.Conv2d(3, 16, 3, bias=False)
    plain.weight = net[0].weight
    net.plain = plain
    with pytest.raises(ExportError, match="of another layer, too"):
        to_tensorrt(net)


def test_a_quantizer_that_is_used_twice_is_replaced_at_both_places(tmp_path):
    layer = make_ternary()[2]
    layer.input_system = None
    net = nn.Sequential(layer, nn.ReLU(), layer)
    net = duplicate_model_with_quant(net, 8, counter=2).eval()
    images = torch.randn(4, 16, 9, 9)
    net(images)
    to_tensorrt(net)
    calibrate_inputs(net, [images])
    export_onnx(net, images, tmp_path / "model.onnx")


def test_an_integer_layer_without_its_float_layer_is_refused():
    layer = QConv2d(nn.Conv2d(3, 4, 3), qi=True, qo=True, num_bits=8, scheme="symmetric")
    net = nn.Sequential(layer)
    net(IMAGES)
    layer.freeze()
    with pytest.raises(UnsupportedError, match="nowhere else in the model"):
        to_tensorrt(net)
    assert net[0] is layer


def test_a_sigmoid_from_a_table_is_exact_on_request_only():
    net = IntegerNetwork(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    net.quantize(8, scheme="symmetric")
    net.quantize_forward(torch.randn(20, 4))
    net.freeze()
    with pytest.raises(ExportError, match="sigmoid from a table"):
        to_tensorrt(net)


def test_an_integer_network_is_not_exported_as_float(tmp_path):
    with pytest.raises(ExportError, match="another number system"):
        export_onnx(make_integer("symmetric"), IMAGES, tmp_path / "model.onnx")


def test_a_transposed_convolution_is_listed():
    net = nn.Sequential(make_binary(), nn.ConvTranspose2d(16, 4, 2))
    transfer = to_tensorrt(net)
    assert transfer.layers[-1].precision == "float"
    assert "transposed" in transfer.layers[-1].note


def test_a_model_that_has_moved_is_judged_there(gpu):
    net = make_ternary().to(gpu)
    expected = net(IMAGES.to(gpu)).detach().cpu()
    transfer = to_tensorrt(net)
    assert [layer.precision for layer in transfer.layers] == ["int8", "int8"]
    outputs = net(IMAGES.to(gpu)).detach().cpu()
    assert torch.allclose(outputs, expected, atol=0.05)
