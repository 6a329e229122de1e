"""`to_tensorrt`: what it refuses and what it leaves. `test_verdict_values` compares the values."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from verdict_nets import (
    IMAGES,
    fixed_inputs,
    make_acoustic,
    make_binary,
    make_bnn,
    make_fixed_point,
    make_integer,
    make_net,
    make_parameters,
    make_powers,
    make_standing,
    make_ternary,
    make_uint8,
    net_layers,
)

from qdq import calibrate_model, export_onnx
from qdq.errors import ExportError, UnsupportedError
from qdq.systems import (
    BinaryWeight,
    IntegerNetwork,
    LinearQuant,
    QConv2d,
    UInt8Weight,
    calibrate_inputs,
    convert_layer,
    duplicate_model_with_quant,
    quantize_parameters,
    select_layers,
    to_tensorrt,
)
from qdq.systems.arithmetic import sign_of
from qdq.systems.grid import Grid, note_grid


def run(net):
    with torch.no_grad():
        return net(IMAGES).numpy()


def give_one_bit(net):
    """Activations of one bit, whose scale is the mean of each batch."""
    quantize_parameters(net, 8)
    standing = nn.Sequential(*duplicate_model_with_quant(net, 1, counter=1)).eval()
    standing(IMAGES)
    return standing


REFUSED = {
    "log": (lambda: make_standing("log"), "log"),
    "tanh": (lambda: make_standing("tanh"), "tanh"),
    "ranges of each batch": (lambda: make_standing("minmax"), "calibrate_inputs"),
    "one bit of each batch": (lambda: give_one_bit(make_net()), "batch"),
    "12 bits": (lambda: make_fixed_point(12), "12 bits"),
    "acoustic, 16 bits": (lambda: make_acoustic(16), "16 bits"),
    "acoustic, dynamic": (lambda: make_acoustic(ranges="moving"), "calibrate_inputs"),
    "affine, 12 bits": (lambda: make_integer("symmetric", bits=12), "12 bits"),
    "affine with a zero point, 9 bits": (lambda: make_integer("unsigned", bits=9), "9 bits"),
    "powers of two, 9 bits": (lambda: make_powers(9), "9 bits"),
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


def test_a_weight_that_is_not_finite_is_refused():
    for net in (make_binary(), make_parameters("minmax", 8), make_ternary()):
        with torch.no_grad():
            net[2].weight[0, 0, 0, 0] = torch.nan
        with pytest.raises(ExportError, match=r"2: .* weights.*: 1 of 2304 values are not finite"):
            to_tensorrt(net, convert=True)


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
    with pytest.raises(ExportError, match="0: LinearQuant inputs: not calibrated"):
        to_tensorrt(net)


def test_all_uncalibrated_quantizers_are_named_with_the_other_offenders():
    net = make_uint8(False)
    net[0].input_system = LinearQuant("x", 8)
    last = nn.Conv2d(16, 4, 1)
    quantize_parameters(last, 8)
    standing = nn.Sequential(net, LinearQuant("y", 8), last, LinearQuant("z", 8))
    with pytest.raises(ExportError) as refused:
        to_tensorrt(standing)
    lines = refused.value.message.splitlines()[1:]
    names = [line.partition(":")[0] for line in lines]
    assert names == ["0.0", "0.0", "0.2", "0.2", "2", "3"]
    assert sum("not calibrated" in line for line in lines) == 3
    assert sum("zero point" in line.partition(";")[0] for line in lines) == 2


def test_an_uncalibrated_quantizer_before_a_float_layer_is_refused():
    net = nn.Sequential(LinearQuant("y", 8), nn.Conv2d(3, 4, 1))
    with pytest.raises(ExportError, match="0: LinearQuant values: not calibrated"):
        to_tensorrt(net)


def test_a_network_that_is_not_frozen_is_refused_with_its_layers():
    net = IntegerNetwork(*make_net())
    net.quantize(8)
    net.quantize_forward(IMAGES)
    with pytest.raises(ExportError, match="not frozen") as refused:
        to_tensorrt(net)
    assert refused.value.message.count("layers.") == 2


class Flat(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        torch.manual_seed(0)
        self.quant = LinearQuant("q", 8, counter=1)
        self.fc = nn.Linear(300, 2)
        self.flatten = flatten

    def forward(self, x):
        return self.fc(self.flatten(self.quant(x)))


FLATTENINGS = {
    "size(0)": lambda x: x.view(x.size(0), -1),
    "shape[0]": lambda x: x.reshape(x.shape[0], -1),
    "size()[0]": lambda x: x.view(x.size()[0], x.size(1) * x.size(2) * x.size(3)),
    "numel()": lambda x: x.view(-1, x.numel() // x.shape[0]),
}


@pytest.mark.parametrize("flatten", FLATTENINGS.values(), ids=FLATTENINGS)
def test_reshaping_to_read_sizes_keeps_the_grid(flatten):
    net = Flat(flatten).eval()
    quantize_parameters(net, 8)
    net(IMAGES)
    expected = run(net)
    sf = net.quant.sf
    transfer = to_tensorrt(net)
    assert [tensor.place for tensor in transfer.layers[0].tensors] == ["weight", "input"]
    assert not transfer.standing
    assert float(net.fc._input_quantizer.amax) == 127 * 2.0**-sf
    np.testing.assert_allclose(run(net), expected, atol=1e-5)


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


def test_messages_name_the_call_that_keeps_exact_ranges(tmp_path, caplog):
    net = make_binary()
    net[0].input_system = None
    to_tensorrt(net)
    known = net[2]._input_quantizer.amax.clone()
    with pytest.raises(ExportError, match="no amax") as refused:
        export_onnx(net, IMAGES, tmp_path / "model.onnx")
    assert "call qdq.systems.calibrate_inputs, or" in refused.value.fix
    calibrate_inputs(net, [IMAGES])
    assert not caplog.records
    assert torch.equal(net[2]._input_quantizer.amax, known)
    calibrate_model(net, [IMAGES])
    assert "replaces 4 ranges" in caplog.text
    assert "qdq.systems.calibrate_inputs keeps them" in caplog.text


def test_the_first_and_the_last_layer_may_have_8_bits_of_another_system():
    net = make_net().append(nn.ReLU()).append(nn.Conv2d(16, 4, 1))
    selection = select_layers(net, IMAGES)
    assert list(selection.float_layers) == ["0", "4"] and list(selection.layers) == ["2"]
    convert_layer(net[2], BinaryWeight("2"), LinearQuant("2", 4, counter=1))
    for name in selection.float_layers:
        layer = net.get_submodule(name)
        convert_layer(layer, UInt8Weight(name, symmetric=True), LinearQuant(name, 8, counter=1))
    run(net)
    expected = run(net)
    transfer = to_tensorrt(net)
    assert [layer.precision for layer in transfer.layers] == ["int8"] * 3
    systems = [layer.tensors[0].system for layer in transfer.layers]
    assert systems == ["UINT8 training", "binary", "UINT8 training"]
    np.testing.assert_allclose(run(net), expected, atol=1e-4 * np.abs(expected).max())


def test_a_quantizer_that_still_counts_is_refused():
    net = nn.Sequential(LinearQuant("q", 4, counter=10), make_ternary()[0])
    net[0](IMAGES)
    with pytest.raises(ExportError, match="counter is 9"):
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


def count_layers(transfer):
    return [(layer.name, layer.precision, layer.note) for layer in transfer.layers]


@pytest.mark.parametrize("make", [make_ternary, make_fixed_point, make_bnn, make_binary])
def test_a_second_call_changes_nothing_and_knows_the_ranges(make):
    net = make()
    to_tensorrt(net, convert=True)
    expected, modules = run(net), list(net.modules())
    transfer = to_tensorrt(net)
    assert [layer.precision for layer in transfer.layers] == ["int8", "int8"]
    assert [layer.note for layer in transfer.layers] == ["", ""]
    assert transfer.standing == ()
    assert list(net.modules()) == modules
    assert np.array_equal(run(net), expected)


def test_a_second_call_takes_what_was_added_and_says_what_has_no_range():
    net = make_ternary()
    to_tensorrt(net)
    net.append(convert_layer(nn.Conv2d(16, 4, 1), BinaryWeight("3")))
    for _ in range(2):
        transfer = to_tensorrt(net)
        assert [layer.precision for layer in transfer.layers] == ["int8"] * 3
        assert [bool(layer.note) for layer in transfer.layers] == [False, False, True]
        assert "calibrate_inputs" in transfer.layers[-1].note
    calibrate_inputs(net, [IMAGES])
    assert to_tensorrt(net).layers[-1].note == ""


def test_layers_that_cannot_be_swapped_are_in_the_one_error_and_nothing_changes():
    net = make_ternary()
    for layer in (net[0], net[2]):
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    net.append(make_uint8(False)[2])
    modules = [(type(module), module) for module in net.modules()]
    with pytest.raises(ExportError) as refused:
        to_tensorrt(net)
    lines = refused.value.message.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["0", "2", "3", "3"]
    assert all("its weight is computed" in line for line in lines[:2])
    assert [(type(module), module) for module in net.modules()] == modules


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layer = convert_layer(nn.Linear(16, 16), BinaryWeight("layer"))

    def forward(self, tokens):
        words = self.embedding(tokens)
        return self.layer(self.attention(words, words, words)[0])


def test_layers_that_no_system_has_are_listed():
    net = Attention().eval()
    quantize_parameters(net, 8)  # also what attention reads
    transfer = to_tensorrt(net)
    assert count_layers(transfer) == [
        ("embedding", "float", "no number system has a Embedding"),
        ("attention", "float", "no number system has a MultiheadAttention"),
        ("attention.out_proj", "float", "MultiheadAttention reads its weight and does not call it"),
        ("layer", "int8", transfer.layers[-1].note),
    ]
    assert type(net.attention.out_proj) is type(nn.MultiheadAttention(16, 2).out_proj)


def test_a_layer_that_is_not_initialized_stays():
    net = nn.Sequential(nn.LazyLinear(3))
    assert "not initialized" in to_tensorrt(net).layers[0].note


def test_a_model_that_is_one_layer():
    layer = convert_layer(nn.Linear(4, 4), BinaryWeight("layer"), fixed_inputs())
    values = torch.randn(3, 4)
    expected = layer(values)
    assert count_layers(to_tensorrt(layer)) == [("", "int8", "")]
    torch.testing.assert_close(layer(values), expected)
