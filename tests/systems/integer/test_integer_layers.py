"""Integer-only inference of one layer: golden values, numpy int64, phases, states."""

import copy

import numpy as np
import pytest
import torch
from golden import read_cases
from integer_reference import convolve, pad_codes, requantize, to_array
from torch import nn

from qdq.errors import ArgumentTypeError, QdqError, StateError
from qdq.systems import IntegerNetwork, QConv2d, QConvBNReLU, QLinear, QParam, QReLU, QSigmoid
from qdq.systems.affine import find_codes
from qdq.systems.integer.arithmetic import find_multiplier, quantize_bias, shift_right
from qdq.systems.integer.restore import read_parameters

GRANULARITIES = {
    "layer": {},
    "group": {"axis": 0, "groups": 2},
    "channel": {"axis": 0},
    "inputs": {"axis": 1, "groups": 2},
}


def fill(batchnorm):
    """Trained statistics and factors, one of them negative."""
    for tensor in (batchnorm.weight, batchnorm.bias, batchnorm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(batchnorm.running_var, 0.5, 2)
    return batchnorm


def make_golden(case):
    weight = torch.tensor(case["weight"])
    if "Linear" in case["config"]:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        padding = int("padding=(1, 1)" in case["config"])
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=padding)
    layer.weight.data = weight
    layer.bias.data = torch.tensor(case["bias"])
    if case["module"] != "QConvBNReLU":
        return {"QConv2d": QConv2d, "QLinear": QLinear}[case["module"]](layer)
    batchnorm = nn.BatchNorm2d(len(weight), eps=case["bn"]["eps"])
    batchnorm.weight.data = torch.tensor(case["bn"]["weight"])
    batchnorm.bias.data = torch.tensor(case["bn"]["bias"])
    batchnorm.running_mean = torch.tensor(case["bn"]["mean"])
    batchnorm.running_var = torch.tensor(case["bn"]["var"])
    return QConvBNReLU(layer, batchnorm)


@pytest.mark.parametrize(
    "case", read_cases("jermmy_integer_inference"), ids=lambda case: case["module"]
)
def test_golden_layers(case):
    def assert_near(result, key):
        torch.testing.assert_close(result, torch.tensor(case[key]), rtol=1e-4, atol=1e-5)

    layer = make_golden(case).eval()
    x = torch.tensor(case["input"])
    with torch.no_grad():
        assert_near(layer(x), "calibration_output")
    for name in ("qi", "qw", "qo"):
        qparam = getattr(layer, name)
        assert float(qparam.scale) == pytest.approx(case[name]["scale"], rel=1e-4)
        assert float(qparam.zero_point) == case[name]["zero_point"]
    layer.freeze()
    assert float(layer.M) == pytest.approx(case["M"], rel=1e-4)
    assert layer.layer.weight.tolist() == case["frozen_weight"]
    assert layer.layer.bias.tolist() == case["frozen_bias"]
    codes = layer.qi.quantize_tensor(x)
    assert codes.tolist() == case["input_codes"]
    result = layer.quantize_inference(codes)
    assert result.tolist() == case["output_codes"]
    assert_near(layer.qo.dequantize_tensor(result), "output")
    assert torch.equal(layer.quantize_inference(codes.float()), result)  # codes of users are floats


def check_against_numpy(layer, x, device="cpu"):
    """Calibrate, freeze, and compare codes with numpy int64 and with the fake-quantized layer.

    Args:
        layer: A layer that is not calibrated.
        x: Its input.
        device: Where the layer runs.
    """
    layer.to(device).eval()
    x = x.to(device)
    with torch.no_grad():
        layer(x)
        fake = copy.deepcopy(layer)
        layer.freeze()
        codes = layer.qi.quantize_tensor(x)
        result = layer.quantize_inference(codes)
        assert result.dtype == torch.int32
        values = layer.qi.dequantize_tensor(codes)
        expected = fake.qo.quantize_tensor(fake(values))
        assert (result - expected).abs().max() <= 1

    float_layer = layer.layer
    weight = to_array(float_layer.weight)
    bias = to_array(float_layer.bias) if float_layer.bias is not None else np.zeros(len(weight))
    is_convolution = weight.ndim == 4
    shape = (1, -1, 1, 1) if is_convolution else (1, -1)

    def accumulate(taps):
        centred = to_array(codes) - float(layer.qi.zero_point)
        if not is_convolution:
            return centred.astype(np.int64) @ taps.astype(np.int64).T
        padded = pad_codes(to_array(codes), float_layer.padding, float(layer.qi.zero_point))
        padded = padded - float(layer.qi.zero_point)
        return convolve(padded, taps, float_layer.stride, float_layer.dilation, float_layer.groups)

    scale = to_array(layer.qw.scale)
    factor = float(layer.qi.scale) / float(layer.qo.scale)
    if layer.qw.axis == 1:
        blocks = np.array_split(np.arange(weight.shape[1]), len(scale))
        scaled = 0
        for block, block_scale in zip(blocks, scale, strict=True):
            taps = np.zeros_like(weight)
            taps[:, block] = weight[:, block]
            sums = accumulate(taps).astype(float)
            if block_scale == scale.max():
                sums += bias.reshape(shape)
            scaled = scaled + sums * block_scale * factor
        ratio = 1.0
    else:
        scaled = accumulate(weight) + bias.astype(np.int64).reshape(shape)
        assert np.abs(scaled).max() < 2**31
        ratio = scale * factor
        if layer.qw.axis == 0:
            ratio = np.repeat(ratio, len(weight) // len(scale)).reshape(shape)
    lowest, highest = find_codes(layer.num_bits, layer.scheme)
    zero_point = float(layer.qo.zero_point)
    expected, is_tie = requantize(scaled, ratio, zero_point, lowest, highest)
    if isinstance(layer, QConvBNReLU):
        expected = np.maximum(expected, zero_point)
    difference = np.abs(to_array(result) - expected)
    assert difference[~is_tie].max() == 0
    assert difference.max() <= 1
    assert is_tie.mean() < 0.01


@pytest.mark.parametrize("scheme", ["unsigned", "signed", "symmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "batchnorm"])
def test_codes_are_those_of_numpy_int64(kind, granularity, scheme):
    options = GRANULARITIES[granularity] | {"scheme": scheme}
    x = torch.randn(3, 4, 9, 8)
    if kind == "linear":
        layer, x = QLinear(nn.Linear(12, 6), **options), torch.randn(20, 12)
    elif kind == "conv":
        layer = QConv2d(nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1)), **options)
    elif kind == "grouped":
        layer = QConv2d(nn.Conv2d(4, 6, 3, groups=2, bias=False), **options)
    else:
        layer = QConvBNReLU(
            nn.Conv2d(4, 6, 3, padding=1, bias=False), fill(nn.BatchNorm2d(6)), **options
        )
    check_against_numpy(layer, x)


@pytest.mark.parametrize("num_bits", [2, 4, 7])
def test_fewer_bits(num_bits):
    check_against_numpy(QLinear(nn.Linear(12, 6), num_bits=num_bits), torch.randn(20, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_on_a_gpu(granularity, gpu):
    options = GRANULARITIES[granularity]
    layer = QConv2d(nn.Conv2d(4, 6, 3, padding=1), **options)
    check_against_numpy(layer, torch.randn(3, 4, 9, 8), gpu)


def test_sums_are_int32_and_exact_where_float32_is_not():
    layer = QLinear(nn.Linear(4096, 2))
    layer.fc_module.weight.data = torch.rand(2, 4096) + 0.5
    x = torch.rand(3, 4096) + 0.5
    with torch.no_grad():
        layer(x)
    layer.freeze()
    types = []
    operate = layer.operate
    layer.operate = lambda x, weight, bias: (
        types.append((x.dtype, weight.dtype)) or operate(x, weight, bias)
    )
    codes = layer.qi.quantize_tensor(x)
    centred = codes - layer.qi.zero_point.int()
    sums = layer.accumulate(centred)
    assert types == [(torch.int32, torch.int32)]
    weight = layer.fc_module.weight
    exact = centred.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    exact += layer.fc_module.bias.numpy()
    assert np.array_equal(sums[0].numpy(), exact)
    assert exact.min() > 2**24
    rounded = centred.float() @ weight.t().float() + layer.fc_module.bias.float()
    assert not np.array_equal(rounded.numpy().astype(np.int64), exact)


def test_sums_beyond_int32_are_computed_in_float64_and_reported(caplog):
    layer = QLinear(nn.Linear(64, 3), num_bits=16)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)
    layer.freeze()
    assert "may exceed int32" in caplog.text
    result = layer.qo.dequantize_tensor(layer.quantize_inference(layer.qi.quantize_tensor(x)))
    assert (result - expected).abs().max() <= 1.01 * layer.qo.scale


def test_a_bias_that_does_not_fit_saturates_and_is_reported(caplog):
    bias = torch.tensor([1.0, 3e9, -5e9])
    codes = quantize_bias(bias, torch.tensor(1.0), "QLinear of fc")
    assert codes.tolist() == [1, 2**31 - 1, -(2**31)]
    assert "QLinear of fc: 2 of 3 bias codes do not fit int32 and saturate" in caplog.text


def test_padding_is_real_zero():
    layer = QConv2d(nn.Conv2d(1, 1, 3, padding=1))
    x = torch.rand(2, 1, 4, 4) + 3  # without 0 in the range, a padded code would be wrong
    check_against_numpy(layer, x)
    assert float(layer.qi.min) == 0


def test_other_padding_modes_work_too():
    layer = QConv2d(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        expected = layer(x)
    layer.freeze()
    result = layer.qo.dequantize_tensor(layer.quantize_inference(layer.qi.quantize_tensor(x)))
    assert (result - expected).abs().max() <= 1.01 * layer.qo.scale


def test_the_multiplier_is_an_integer_and_a_shift():
    ratio = torch.tensor([0.0027869157, 0.5, 1.0, 3.7, 1000.0, 1 - 2.0**-40], dtype=torch.float64)
    multiplier, shift = find_multiplier(ratio)
    assert shift.tolist() == [8, 0, -1, -2, -10, 0]
    assert ((multiplier >= 2**30) & (multiplier < 2**31)).all()
    torch.testing.assert_close(
        torch.ldexp(multiplier.double(), -31 - shift), ratio, rtol=2**-31, atol=0
    )
    sums = torch.randint(-(2**20), 2**20, (1000, 6))
    result = shift_right(sums * multiplier, 31 + shift)
    exact = sums.double() * ratio
    is_tie = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert torch.equal(result[~is_tie], exact.round().long()[~is_tie])


def test_training_folds_the_statistics_of_the_batch():
    layer = QConvBNReLU(nn.Conv2d(2, 3, 3), fill(nn.BatchNorm2d(3))).train()
    reference = copy.deepcopy(layer.bn_module)
    x = torch.randn(16, 2, 8, 8)
    result = layer(x)
    expected = torch.relu(reference(layer.conv_module(x)))
    assert (result - expected).abs().max() < 0.1
    torch.testing.assert_close(
        layer.bn_module.running_var, reference.running_var, rtol=1e-2, atol=0
    )
    result.sum().backward()
    assert layer.conv_module.weight.grad is not None and layer.bn_module.weight.grad is not None


def calibrated(**options):
    layer = QLinear(nn.Linear(4, 3), **options)
    with torch.no_grad():
        layer(torch.randn(10, 4))
    return layer


def test_phases_in_the_wrong_order_are_refused():
    layer = calibrated()
    with pytest.raises(StateError, match=r"QLinear of Linear\(.*quantize_inference before freeze"):
        layer.quantize_inference(torch.zeros(1, 4, dtype=torch.int32))
    layer.freeze()
    with pytest.raises(RuntimeError, match="forward after freeze"):
        layer(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="freeze after freeze"):
        layer.freeze()
    with pytest.raises(ValueError, match="takes codes, and got numbers that are no integers"):
        layer.quantize_inference(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="qi has no range"):
        QLinear(nn.Linear(4, 3)).freeze()


@pytest.mark.parametrize("name", ["qi", "qo"])
def test_a_range_has_one_owner(name):
    other = calibrated()
    layer = calibrated()
    with pytest.raises(ValueError, match=f"{name} has been provided in init function"):
        layer.freeze(**{name: other.qo})
    layer = calibrated(**{name: False})
    with pytest.raises(ValueError, match=f"{name} is not existed, should be provided"):
        layer.freeze()
    assert not layer.is_frozen and not hasattr(layer, name)
    layer.freeze(**{name: other.qo})
    assert getattr(layer, name) is other.qo


def test_a_layer_is_frozen_by_one_module():
    layer = nn.Linear(4, 3)
    first, second = QLinear(layer), QLinear(layer)
    with torch.no_grad():
        first(torch.randn(10, 4))
        second(torch.randn(10, 4))
    first.freeze()
    with pytest.raises(StateError, match="holds codes already"):
        second.freeze()


@pytest.mark.parametrize("qi", [True, False])
@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.empty(0, 4), r"the input of shape \(0, 4\) is empty"),
        (torch.full((1, 4), torch.nan), "4 of 4 values are not finite"),
        (torch.full((1, 4), torch.inf), "4 of 4 values are not finite, the first is inf"),
        (torch.zeros(1, 4).int(), r"the input is of type torch.int32; only float"),
        ([1.0], "the input is a list"),
    ],
)
def test_a_bad_batch_is_refused(qi, x, text):
    layer = QLinear(nn.Linear(4, 3), qi=qi)
    with pytest.raises(ValueError, match=rf"QLinear of Linear\(.*, qi: {text}") as caught:
        layer(x)
    assert isinstance(caught.value, QdqError)
    assert not layer.qo.is_calibrated


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"QLinear of Linear\(.*weight: 2 groups do not divide the 3"
    ):
        QLinear(nn.Linear(4, 3), axis=0, groups=2)(torch.randn(2, 4))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_state_is_saved_and_loaded(is_frozen):
    def make():
        conv = nn.Conv2d(2, 3, 3, bias=False)
        return QConvBNReLU(conv, fill(nn.BatchNorm2d(3)), qi=False, axis=0).eval()

    source, layer, loaded = QConv2d(nn.Conv2d(1, 2, 1)), make(), make()
    x = torch.randn(2, 1, 6, 6)
    with torch.no_grad():
        layer(source(x))
    if is_frozen:
        layer.freeze(qi=source.qo)
    loaded.load_state_dict(layer.state_dict())
    if not is_frozen:
        layer.freeze(qi=source.qo)
        loaded.freeze(qi=source.qo)
    codes = source.qo.quantize_tensor(torch.randn(2, 2, 6, 6))
    expected = layer.quantize_inference(codes)
    for other in (loaded, copy.deepcopy(layer)):
        assert torch.equal(other.quantize_inference(codes), expected)
    assert loaded.M.dtype == torch.float64
    assert loaded.conv_module.weight.dtype == torch.int32


def test_an_open_state_is_loaded_into_a_frozen_layer():
    layer = calibrated()
    state = copy.deepcopy(layer.state_dict())
    layer.freeze()
    layer.load_state_dict(state)
    assert layer.fc_module.weight.requires_grad
    with torch.no_grad():
        layer(torch.randn(2, 4))


def test_the_grids_of_a_layer():
    layer = calibrated(axis=0, scheme="symmetric")
    before = layer.grids()
    layer.freeze()
    after = layer.grids()
    for name in ("input", "weight", "output"):
        assert torch.equal(before[name].scale, after[name].scale)
        assert (after[name].lowest, after[name].highest) == (-128, 127)
    assert after["weight"].scale.shape == (3,)
    weight, bias = read_parameters(layer)
    codes = weight / after["weight"].scale[:, None]
    assert torch.equal(codes.round(), layer.fc_module.weight.float())
    assert bias.dtype == torch.float32
    layer = calibrated(axis=1, groups=2)
    assert "along its inputs" in layer.grids()["weight"].obstacle


BAD_CODES = [
    (torch.tensor([[0, 1, 2, 256]]), r"numbers from 0 to 256; its input has codes from 0 to 255"),
    (torch.tensor([[-1, 1, 2, 3]], dtype=torch.int8), "numbers from -1 to 3"),
    (torch.tensor([[2**40, 1, 2, 3]]), f"numbers from 1 to {2**40}"),
    (torch.full((1, 4), torch.inf), "numbers from inf to inf"),
    (torch.full((1, 4), 1e30), "numbers from 1000000015047466219876688855040"),
    (torch.tensor([[0.0, 1.0, 0.37, 2.0]]), "numbers that are no integers, such as 0.37"),
    (torch.full((1, 4), torch.nan), "numbers that are no integers, such as nan"),
    (torch.ones(1, 4, dtype=torch.bool), r"takes codes, and got torch.bool"),
    (torch.ones(1, 4, dtype=torch.complex64), r"takes codes, and got torch.complex64"),
    (torch.empty(0, 4, dtype=torch.int32), r"the input of shape \(0, 4\) is empty"),
    ([1, 2, 3, 4], "the input is a list"),
]


@pytest.mark.parametrize(("x", "text"), BAD_CODES)
def test_what_is_no_code_is_refused(x, text):
    layer = calibrated()
    layer.freeze()
    relu, sigmoid = QReLU(), QSigmoid(qi=False)
    relu.freeze(layer.qi)
    sigmoid(torch.linspace(-4, 4, 10))
    sigmoid.freeze(layer.qi)
    for frozen, label in (
        (layer, r"QLinear of Linear\(.*"),
        (relu, "QReLU"),
        (sigmoid, "QSigmoid"),
    ):
        with pytest.raises(ValueError, match=f"^{label}: .*{text}") as caught:
            frozen.quantize_inference(x)
        assert isinstance(caught.value, QdqError)


def test_freeze_changes_nothing_unless_all_is_there():
    source = calibrated()
    layer = QLinear(nn.Linear(4, 3), qi=False, qo=False)
    for error, qi, qo, text in (
        (StateError, source.qi, source.qo, "weight: it has no range yet"),
        (ValueError, source.qi, None, "qo is not existed"),
        (TypeError, source.qi, 0.5, "qo is a float"),
        (ValueError, source.qi, calibrated(axis=0).qw, "qo has ranges along axis 0"),
        (StateError, QParam(), source.qo, "qi has no range"),
    ):
        with pytest.raises(error, match=rf"QLinear of Linear\(.*{text}"):
            layer.freeze(qi, qo)
        assert not (layer.is_frozen or hasattr(layer, "qi") or hasattr(layer, "qo"))
        assert layer.fc_module.weight.is_floating_point()
    layer(torch.randn(2, 4))
    layer.freeze(source.qi, source.qo)
    assert layer.is_frozen


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_not_finite_are_not_frozen(name):
    layer = calibrated()
    nn.init.constant_(getattr(layer.fc_module, name), torch.nan)
    with pytest.raises(ValueError, match=rf"QLinear of Linear\(.*, {name}: .* not finite"):
        layer.freeze()
    assert not layer.is_frozen


def test_layers_that_are_frozen_in_another_order_are_told_so():
    layer, relu, following = calibrated(), QReLU(), calibrated(qi=False)
    with pytest.raises(StateError, match="QReLU: it has no qi before freeze"):
        following.freeze(qi=relu.qi)
    assert not hasattr(relu, "qi") and not hasattr(relu, "other")
    relu.freeze(layer.qo)
    following.freeze(qi=relu.qi)
    assert copy.deepcopy(following).qi.is_calibrated


def test_a_batchnorm_that_cannot_be_folded_is_refused():
    conv = nn.Conv2d(1, 2, 3)
    with pytest.raises(ValueError, match=r"QConvBNReLU of Conv2d\(.*no running statistics"):
        QConvBNReLU(conv, nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"BatchNorm2d\(3,.* has 3 channels, the convolution .* 2"):
        QConvBNReLU(conv, nn.BatchNorm2d(3))
    layer = QConvBNReLU(conv, nn.BatchNorm2d(2))
    layer.bn_module.running_mean = None
    with pytest.raises(ValueError, match="no running statistics"):
        layer(torch.randn(2, 1, 4, 4))
    network = IntegerNetwork(conv, nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU())
    with pytest.raises(ValueError, match="no running statistics"):
        network.quantize()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QConv2d(nn.Linear(2, 2)), "QConv2d: it was given a Linear, not a Conv2d"),
        (lambda: QConv2d(nn.Conv1d(1, 1, 1)), "given a Conv1d"),
        (lambda: QLinear(nn.Conv2d(1, 1, 1)), "QLinear: it was given a Conv2d, not a Linear"),
        (lambda: QLinear(None), "given a NoneType"),
        (lambda: QConvBNReLU(nn.Conv2d(1, 2, 1), nn.BatchNorm1d(2)), "given a BatchNorm1d"),
    ],
)
def test_layers_of_another_kind_are_refused(make, text):
    with pytest.raises(ArgumentTypeError, match=text):
        make()
