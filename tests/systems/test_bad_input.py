"""Every public name of `qdq.systems` refuses bad input in one way: with an error of qdq, as a value or a state.

A number or tensor of the wrong type may be caught as TypeError, too. An object of the wrong type is a TypeError.
"""

import pytest
import torch
from torch import nn

import qdq
from qdq import systems
from qdq.errors import ArgumentTypeError, QdqError

NAN = torch.tensor([1.0, float("nan")])
INF = torch.tensor([[1.0, float("inf")]])
EMPTY = torch.zeros(0, 3)
WHOLE = torch.tensor([[1, 2]])
BOOLS = torch.tensor([True])
GOOD = torch.randn(2, 3)
RANGE = torch.tensor(-1.0), torch.tensor(1.0)
OPTIONS = systems.RoundOptions()


def trained(values):
    quantizer = systems.UInt8Activation("layer")
    quantizer(GOOD)
    return quantizer.eval()(values)


def ranged(values):
    quantizer = systems.NormalQuant("layer", 8, systems.min_max_quantize)
    systems.calibrate_inputs(nn.Sequential(quantizer), [GOOD])
    return quantizer(values)


TENSOR_FUNCTIONS = {
    "compute_integral_part": systems.compute_integral_part,
    "linear_quantize": lambda x: systems.linear_quantize(x, 3, 8),
    "sign_quantize": systems.sign_quantize,
    "min_max_quantize": lambda x: systems.min_max_quantize(x, 8),
    "log_minmax_quantize": lambda x: systems.log_minmax_quantize(x, 8),
    "log_linear_quantize": lambda x: systems.log_linear_quantize(x, 3, 8),
    "compute_log_sf": lambda x: systems.compute_log_sf(x, 8),
    "tanh_quantize": lambda x: systems.tanh_quantize(x, 8),
    "acoustic_quantize": lambda x: systems.acoustic_quantize(x, *RANGE, 8),
    "acoustic_quantize, low": lambda x: systems.acoustic_quantize(GOOD, x, RANGE[1], 8),
    "acoustic_quantize, high": lambda x: systems.acoustic_quantize(GOOD, RANGE[0], x, 8),
    "fit_bases": lambda x: systems.fit_bases(x, 2),
    "project_ternary": systems.project_ternary,
    "sign_at_random": systems.sign_at_random,
    "PowerLevels": lambda x: systems.PowerLevels.of(x, 4),
    "PowerLevels.quantize": systems.PowerLevels(-3, 0).quantize,
    "xnor_dot": lambda x: systems.xnor_dot(x, x),
    "xnor_conv2d": lambda x: systems.xnor_conv2d(torch.randn(1, 1, 3, 3), x),
    "xnor_conv2d, values": lambda x: systems.xnor_conv2d(x, torch.randn(1, 1, 3, 3)),
    "BinaryBases": lambda x: systems.BinaryBases("layer", 2)(x),
    "BinaryWeight": lambda x: systems.BinaryWeight("layer")(x),
    "BinaryInput": lambda x: systems.BinaryInput("layer")(x),
    "AcousticWeight": lambda x: systems.AcousticWeight(name="layer")(x),
    "AcousticInput": lambda x: systems.AcousticInput(name="layer")(x),
    "UInt8Weight": lambda x: systems.UInt8Weight("layer")(x),
    "UInt8Activation": lambda x: systems.UInt8Activation("layer")(x),
    "UInt8Activation, trained": trained,
    "LinearQuant": lambda x: systems.LinearQuant("layer", 8)(x),
    "LinearQuant, calibrated": lambda x: systems.LinearQuant("layer", 8, 3, counter=0)(x),
    "LogQuant": lambda x: systems.LogQuant("layer", 8, 3, counter=0)(x),
    "NormalQuant": lambda x: systems.NormalQuant("layer", 8, systems.tanh_quantize)(x),
    "NormalQuant, with a range": ranged,
}


@pytest.mark.parametrize("name", TENSOR_FUNCTIONS)
@pytest.mark.parametrize(
    ("values", "text"),
    [
        (NAN, "not finite, the first is nan"),
        (INF, "not finite, the first is inf"),
        (EMPTY, r"of shape \(0, 3\) is empty"),
        (WHOLE, "torch.int64"),
        (BOOLS, "torch.bool"),
        ([1.0], "is a list"),
    ],
    ids=["nan", "inf", "empty", "integers", "bools", "list"],
)
def test_tensors(name, values, text):
    with pytest.raises(ValueError, match=text) as refused:
        TENSOR_FUNCTIONS[name](values)
    assert isinstance(refused.value, QdqError)
    assert refused.value.message.startswith((name.partition(".")[0], "layer: "))
    is_wrong_type = isinstance(values, list) or not values.is_floating_point()
    assert isinstance(refused.value, TypeError) == is_wrong_type


def square(batch, weight, **options):
    return lambda: systems.xnor_conv2d(torch.randn(batch), torch.randn(weight), **options)


def train(name, options=OPTIONS, **settings):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    return getattr(systems, name)(model, [GOOD], GOOD, options, **settings)


def pool_codes():
    layer = systems.QMaxPooling2d(3, 2, 1, qi=True, num_bits=8)
    layer(torch.randn(1, 1, 4, 4))
    layer.freeze()
    return layer.quantize_inference(torch.ones(4, dtype=torch.int32))


def convolve_codes():
    layer = systems.QConv2d(nn.Conv2d(3, 2, 3))
    layer(torch.randn(1, 3, 4, 4))
    layer.freeze()
    return layer.quantize_inference(torch.ones(1, 2, 4, 4, dtype=torch.int32))


def dequantize(codes):
    qparam = systems.QParam(label="layer")
    qparam.update(GOOD)
    return qparam.dequantize_tensor(codes)


def quantize_calibrated():
    model = nn.Sequential(nn.Linear(3, 3))
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [GOOD])
    return systems.quantize_parameters(model)


NUMBERS = {
    "float8": lambda: systems.linear_quantize(GOOD.to(torch.float8_e4m3fn), 3, 8),
    "sparse": lambda: systems.sign_quantize(GOOD.to_sparse()),
    "meta": lambda: systems.min_max_quantize(GOOD.to("meta"), 8),
    "meta in a layer": lambda: systems.BinaryWeight("layer")(GOOD.to("meta")),
    "parameters on meta": lambda: systems.quantize_parameters(nn.Linear(2, 2, device="meta")),
    "lazy parameters": lambda: systems.quantize_parameters(nn.LazyLinear(2)),
    "parameters of a calibrated model": quantize_calibrated,
    "ternary without options": lambda: train("train_ternary", options=None),
    "ternary with a dictionary": lambda: train("train_ternary", options={}),
    "incremental without options": lambda: train("train_incremental", options=None),
    "incremental with a dictionary": lambda: train("train_incremental", options={}),
    "a table of text": lambda: systems.QSigmoid(lut_size="a"),
    "a table of 2.5 points": lambda: systems.QSigmoid(lut_size=2.5),
    "padding above half the kernel": lambda: systems.QMaxPooling2d(padding=5),
    "padding of text": lambda: systems.QMaxPooling2d(padding="same"),
    "codes of other channels": convolve_codes,
    "values of other channels": lambda: systems.QConv2d(nn.Conv2d(3, 2, 3))(
        torch.randn(1, 2, 5, 5)
    ),
    "codes of a vector to pool": pool_codes,
    "codes in a list": lambda: dequantize([1, 2]),
    "codes that are NaN": lambda: dequantize(NAN),
    "a function as a layer": lambda: systems.IntegerNetwork(torch.relu),
    "bits 0": lambda: systems.acoustic_quantize(GOOD, *RANGE, 0),
    "bits 8.0": lambda: systems.acoustic_quantize(GOOD, *RANGE, 8.0),
    "ends in the wrong order": lambda: systems.acoustic_quantize(GOOD, *RANGE[::-1], 8),
    "two lower ends": lambda: systems.acoustic_quantize(GOOD, GOOD, RANGE[1], 8),
    "acoustic weight of 8.0 bits": lambda: systems.AcousticWeight(8.0),
    "acoustic weight of True bits": lambda: systems.AcousticWeight(True),
    "acoustic input of '8' bits": lambda: systems.AcousticInput("8"),
    "acoustic input of 12 bits": lambda: systems.AcousticInput(12),
    "acoustic model of 8.0 bits": lambda: systems.prepare_acoustic(nn.Linear(2, 2), 8.0),
    "no base": lambda: systems.BinaryBases("layer", 0),
    "1.5 bases": lambda: systems.BinaryBases("layer", 1.5),
    "2.0 bases to fit": lambda: systems.fit_bases(GOOD, 2.0),
    "a zero of 0": lambda: systems.BinaryWeight("layer", zero=0),
    "a zero of True": lambda: systems.BinaryInput("layer", zero=True),
    "unknown sampling": lambda: systems.BinaryInput("layer", sampling="soft"),
    "unknown sampling of a model": lambda: systems.binarize_model(
        nn.Sequential(nn.Linear(3, 3)), GOOD, sampling="soft", float_layers=()
    ),
    "no generator": lambda: systems.sign_at_random(GOOD, generator=3),
    "no sampling": lambda: systems.sign_at_random(GOOD, ""),
    "sf 0.5": lambda: systems.linear_quantize(GOOD, 0.5, 8),
    "sf 'a'": lambda: systems.log_linear_quantize(GOOD, "a", 8),
    "sf of NaN": lambda: systems.LinearQuant("layer", 8, sf=float("nan")),
    "bits of text": lambda: systems.linear_quantize(GOOD, 3, "8"),
    "bits 33": lambda: systems.compute_log_sf(GOOD, 33),
    "rate 1": lambda: systems.compute_integral_part(GOOD, 1),
    "rate of text": lambda: systems.compute_log_sf(GOOD, 8, "0"),
    "alpha 0": lambda: systems.linear_quantize(GOOD, 3, 1, alpha=0),
    "alpha -1": lambda: systems.log_minmax_quantize(GOOD, 1, alpha=-1.0),
    "alpha of text": lambda: systems.tanh_quantize(GOOD, 1, alpha="a"),
    "alpha of infinity": lambda: systems.sign_quantize(GOOD, float("inf")),
    "ternary alpha of text": lambda: systems.project_ternary(GOOD, alpha="a"),
    "ternary alpha of NaN": lambda: systems.project_ternary(GOOD, alpha=float("nan")),
    "power levels of 1 bit": lambda: systems.PowerLevels.of(GOOD, 1),
    "power levels in the wrong order": lambda: systems.PowerLevels(3, 0),
    "power levels that are no integers": lambda: systems.PowerLevels(-3.5, 0),
    "unknown calibration": lambda: systems.calibrate_inputs(nn.ReLU(), [GOOD], method="best?"),
    "decay 1": lambda: systems.UInt8Activation(decay=1.0),
    "decay of text": lambda: systems.UInt8Activation(decay="0"),
    "delay -1": lambda: systems.UInt8Activation(delay=-1),
    "delay 0.5": lambda: systems.prepare_uint8_training(nn.Linear(3, 3), GOOD, delay=0.5),
    "counter 1.5": lambda: systems.LogQuant("layer", 8, counter=1.5),
    "bits of a quantizer": lambda: systems.NormalQuant("layer", 8.0, systems.tanh_quantize),
    "parameters of 0 bits": lambda: systems.quantize_parameters(nn.Linear(2, 2), 0),
    "unknown method": lambda: systems.quantize_parameters(nn.Linear(2, 2), quant_method="cubic"),
    "unknown type": lambda: systems.duplicate_model_with_quant(nn.Sequential(), 8, type=None),
    "affine code of 0 bits": lambda: systems.find_codes(0),
    "affine code of 8.0 bits": lambda: systems.find_codes(8.0),
    "unknown scheme": lambda: systems.find_codes(8, "square"),
    "ends that are NaN": lambda: systems.solve_affine(NAN, NAN, 0, 255),
    "ends that are integers": lambda: systems.solve_affine(WHOLE, WHOLE, 0, 255),
    "one code": lambda: systems.solve_affine(*RANGE, 5, 5),
    "no round": lambda: train("train_ternary", rounds=0),
    "1.5 rounds": lambda: train("train_ternary", rounds=1.5),
    "rho of text": lambda: train("train_ternary", rho="a"),
    "growth of NaN": lambda: train("train_ternary", growth=float("nan")),
    "ternary alpha": lambda: train("train_ternary", alpha="a"),
    "a portion of text": lambda: train("train_incremental", portions=("a", 1.0)),
    "one portion": lambda: train("train_incremental", portions=0.5),
    "incremental of 4.0 bits": lambda: train("train_incremental", bits=4.0),
    "pairs of other length": lambda: systems.xnor_dot(torch.randn(2, 4), torch.randn(5)),
    "pairs that cannot be broadcast": lambda: systems.xnor_dot(
        torch.randn(2, 4), torch.randn(3, 4)
    ),
    "a number of no pairs": lambda: systems.xnor_dot(torch.tensor(1.0), torch.tensor(1.0)),
    "a mask of floats": lambda: systems.xnor_dot(GOOD, GOOD, torch.ones(3)),
    "a mask of other length": lambda: systems.xnor_dot(GOOD, GOOD, BOOLS),
    "wrong channels": square((1, 3, 5, 5), (4, 2, 3, 3)),
    "wrong groups": square((1, 6, 5, 5), (4, 3, 3, 3), groups=4),
    "an image without a batch": square((3, 5, 5), (4, 3, 3, 3)),
    "padding by name": square((1, 3, 5, 5), (4, 3, 3, 3), padding="same"),
    "no stride": square((1, 3, 5, 5), (4, 3, 3, 3), stride=0),
    "a kernel that is too large": square((1, 3, 2, 2), (4, 3, 3, 3)),
}


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
def test_numbers_and_choices(call):
    with pytest.raises((ValueError, RuntimeError, TypeError)) as refused:
        call()
    assert isinstance(refused.value, QdqError)
    assert refused.value.fix


MODELS = {
    "prepare_acoustic": systems.prepare_acoustic,
    "prepare_uint8_training": lambda x: systems.prepare_uint8_training(x, GOOD),
    "binarize_model": lambda x: systems.binarize_model(x, GOOD),
    "select_layers": lambda x: systems.select_layers(x, GOOD),
    "train_ternary": lambda x: systems.train_ternary(x, [GOOD], GOOD, OPTIONS),
    "train_incremental": lambda x: systems.train_incremental(x, [GOOD], GOOD, OPTIONS),
    "replace_weights": systems.replace_weights,
    "clipping_weights": lambda x: systems.clipping_weights(x).__enter__(),
    "moving_ranges": lambda x: systems.moving_ranges(x).__enter__(),
    "split_bases": systems.split_bases,
    "calibrate_inputs": lambda x: systems.calibrate_inputs(x, [GOOD]),
    "quantize_parameters": systems.quantize_parameters,
    "duplicate_model_with_quant": lambda x: systems.duplicate_model_with_quant(x, 8),
    "list_unquantized": systems.list_unquantized,
    "to_tensorrt": systems.to_tensorrt,
    "bias_codes": systems.bias_codes,
    "a schedule that is none": lambda x: systems.RoundOptions(schedule=x),
    "a function that is none": lambda x: systems.NormalQuant("layer", 8, x),
    "a quantizer that is none": lambda x: systems.convert_layer(nn.Linear(2, 2), x),
}


@pytest.mark.parametrize("call", MODELS.values(), ids=MODELS)
def test_objects_of_another_type(call):
    with pytest.raises(ArgumentTypeError):
        call("resnet18")


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(2, 2, 2), nn.ConvTranspose3d(2, 2, 2), nn.ReLU(), "layer"]
)
def test_a_layer_that_no_system_has(layer):
    with pytest.raises(RuntimeError, match=rf"no system has a {type(layer).__name__}") as refused:
        systems.convert_layer(layer, systems.BinaryWeight("layer"))
    assert isinstance(refused.value, QdqError)


def test_messages_name_the_layer():
    for call, name in [
        (convolve_codes, r"^QConv2d of .* shape \(1, 2, 4, 4\) does not fit"),
        (pool_codes, r"^QMaxPooling2d: the input of shape \(4,\) does not fit"),
        (lambda: dequantize(NAN), "^layer, codes: 1 of 2 values are not finite"),
        (lambda: systems.IntegerNetwork(torch.relu), "^IntegerNetwork: layer 0 is "),
    ]:
        with pytest.raises(QdqError, match=name):
            call()


def test_a_bad_running_range_names_its_layer():
    quantizer = systems.UInt8Activation("head.fc")
    quantizer(GOOD)
    quantizer.eval().running_min.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^head.fc, the range of its input: 1 of 2 values"):
        quantizer(GOOD)
    with pytest.raises(ValueError, match=r"^head.fc, the range of its input: 1 of 2 values"):
        quantizer.describe(None)


def test_integer_layers_are_named_by_their_path():
    model = nn.ModuleDict({"net": systems.IntegerNetwork(nn.Linear(3, 2), nn.Linear(2, 2))})
    model["net"].quantize()
    with pytest.raises(QdqError, match=r"^qlayers.0, QLinear of .*, qi: 1 of 2 values"):
        model["net"].quantize_forward(torch.tensor([[1.0, float("nan")]]))
    model["net"].quantize_forward(GOOD)
    model["net"].freeze()
    with pytest.raises(QdqError, match=r"^qlayers.0, QLinear of .*: forward"):
        model["net"].qlayers[0](GOOD)


def test_a_model_does_not_change_if_its_settings_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="delay is -1"):
        systems.prepare_uint8_training(model, torch.randn(1, 1, 2, 2), delay=-1)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
