"""`PostTrainLinearQuantizer`: what becomes of a model, names that one may set, and refusals."""

import builtins
import copy
import logging
import re
from collections import OrderedDict

import pytest
import torch
from golden import read_cases
from torch import nn

from qdq.distiller import (
    ClipMode,
    EltwiseAdd,
    EltwiseMult,
    FPWrapper,
    Matmul,
    PostTrainLinearQuantizer,
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantParamLayerWrapper,
    collect_quant_stats,
    convert_model_to_distiller_lstm,
)
from qdq.errors import ArgumentError, ArgumentTypeError, QdqError, StateError

ROWS = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))
ERRORS = {case["when"]: getattr(builtins, case["error"]) for case in read_cases("distiller_errors")}


class Halves(nn.Module):
    """The network of the published names: linear, BatchNorm, chunk, two activations, a functional addition."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 40)
        self.bn = nn.BatchNorm1d(40)
        self.act1, self.act2 = nn.Tanh(), nn.Sigmoid()

    def forward(self, x):
        first, second = self.bn(self.linear(x)).chunk(2, dim=1)
        return self.act1(first) + self.act2(second)


class Residual(nn.Module):
    """Convolutions with BatchNorm, ReLU and an addition, pooling and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.add = EltwiseAdd()
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.add(self.conv2(x), x))
        return self.fc(self.drop(self.pool(x).flatten(1)))


def make_residual():
    torch.manual_seed(0)
    model = Residual()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    return model.eval()


def quantize(model, batch, **options):
    model.eval()
    options.setdefault("model_activation_stats", collect_quant_stats(model, [batch]))
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), **options)
    quantizer.prepare_model(batch[:2])
    return quantizer


def snr_db(expected, values):
    return float(10 * torch.log10(expected.square().sum() / (expected - values).square().sum()))


NAMES = {next(iter(case)): case for case in read_cases("distiller_quant_param_names")}


def test_all_published_names_are_tested():
    tested = {"model", "call", "rule", "clipping_names", "rnn_names"}
    assert NAMES.keys() == tested
    assert len(read_cases("distiller_quant_param_names")) == 1 + len(tested)  # two calls


def test_published_names():
    expected = NAMES["model"]["linear_quant_params"]
    quantizer = quantize(Halves(), ROWS, save_fp_weights=True)
    assert sorted(quantizer.linear_quant_params) == expected
    names = {name.rpartition(".")[2] for name in quantizer.clipping_params}
    assert sorted(names) == NAMES["clipping_names"]["clipping_names"]


def test_weights_have_published_names_if_they_are_kept():
    names = re.findall(r"\bw_\w+", NAMES["rule"]["rule"])
    assert names == ["w_scale", "w_zero_point"]
    expected = NAMES["model"]["linear_quant_params"]
    of_weights = {f"linear.{name}" for name in names}
    assert of_weights < set(expected)
    without = quantize(Halves(), ROWS)
    assert set(without.linear_quant_params) == set(expected) - of_weights


class Recurrent(nn.Module):
    """A network with an LSTM inside."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(20, 16)

    def forward(self, x):
        return self.rnn(x)[0]


def test_published_names_of_an_lstm():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(embedding=nn.Embedding(41, 20), rnn=Recurrent()))
    words = torch.randint(0, 41, (6, 3), generator=torch.Generator().manual_seed(0))
    quantizer = quantize(convert_model_to_distiller_lstm(model), words, save_fp_weights=True)
    for number, name in enumerate(NAMES["rnn_names"]["rnn_names"], 1):
        quantizer.set_linear_quant_param(name, number)
        assert quantizer.linear_quant_params[name] == number


def call_as_published(quantizer, case):
    """Call the method of a case with the names and values that it has."""
    method, _, arguments = case["call"].partition("(")
    pairs = re.findall(r"([\w.]+)[,:] ([\d.]+)", arguments)
    values = {name: float(value) for name, value in pairs}
    if method == "set_linear_quant_param":
        ((name, value),) = values.items()
        quantizer.set_linear_quant_param(name, value)
    else:
        getattr(quantizer, method)(values)
    return values


def test_published_effects_of_setting_parameters():
    cases = [case for case in read_cases("distiller_quant_param_names") if "call" in case]
    quantizer = quantize(Halves(), ROWS, save_fp_weights=True)
    layers = quantizer.layers
    assert not any(layer.force_readjust for layer in layers.values())
    for case in cases:
        values = call_as_published(quantizer, case)
        for name, value in values.items():
            assert quantizer.linear_quant_params[name] == value
            assert getattr(layers[name.partition(".")[0]], name.partition(".")[2]) == value
        for name in re.findall(r"(\w+)\.force_readjust", case["then"]):
            assert layers[name].force_readjust
    assert [len(call_as_published(quantizer, case)) for case in cases] == [1, 2]
    assert "linear.force_readjust" in cases[0]["then"] and "act1.force_readjust" in cases[0]["then"]
    quantizer.model(ROWS)
    assert not any(layer.force_readjust for layer in layers.values())


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_it_is_near_the_float_model(mode, per_channel):
    model = make_residual()
    quantizer = quantize(model, IMAGES, mode=mode, per_channel_wts=per_channel)
    kinds = {name: type(layer) for name, layer in quantizer.layers.items()}
    assert kinds == {
        "conv1": RangeLinearQuantParamLayerWrapper,
        "conv2": RangeLinearQuantParamLayerWrapper,
        "add": RangeLinearQuantEltwiseAddWrapper,
        "pool": RangeLinearFakeQuantWrapper,
        "fc": RangeLinearQuantParamLayerWrapper,
    }
    with torch.no_grad():
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 30
    assert quantizer.left_float.entries == ()
    assert int(quantizer.layers["conv1"].num_forwards) == 1


def test_relus_are_applied_by_the_layer_before():
    quantizer = quantize(make_residual(), IMAGES)
    model = quantizer.model
    outputs = []
    for name in ("conv1", "add"):
        quantizer.layers[name].register_forward_hook(lambda *call: outputs.append(call[2]))
    model(IMAGES)
    assert len(outputs) == 2
    assert all(bool((output >= 0).all()) for output in outputs)
    assert quantizer.resolution.settings["conv1"].clip_half_range
    assert not quantizer.resolution.settings["conv2"].clip_half_range
    values = torch.tensor([-1.0, 1.0])
    assert model.relu1(values) is values


def test_a_relu_that_runs_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv2(self.relu(self.conv1(x))))

    torch.manual_seed(0)
    model = Twice().eval()
    quantizer = quantize(model, IMAGES)
    assert isinstance(quantizer.layers["relu"], RangeLinearFakeQuantWrapper)
    with torch.no_grad():
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 20  # both runs have one range


def test_function_calls_are_reported():
    quantizer = quantize(Halves(), ROWS)
    assert [entry.name for entry in quantizer.left_float.entries] == ["add"]


def test_dynamic_leaves_the_rest_in_float(caplog):
    model = make_residual()
    with caplog.at_level(logging.WARNING):
        quantizer = quantize(model, IMAGES, model_activation_stats=None)
    assert list(quantizer.layers) == ["conv1", "conv2", "fc"]
    assert "dynamic" in caplog.text
    assert {entry.name for entry in quantizer.left_float.entries} == {
        "relu1",
        "add",
        "relu2",
        "pool",
    }
    assert quantizer.linear_quant_params == {}
    with torch.no_grad():
        for scale in (1, 100):  # each batch has its own range
            assert snr_db(model(scale * IMAGES), quantizer.model(scale * IMAGES)) > 30


def test_a_new_weight_scale_quantizes_the_float_weight_again():
    quantizer = quantize(make_residual(), IMAGES, save_fp_weights=True)
    layer = quantizer.layers["conv2"]
    scale = 2 * float(layer.w_scale)
    quantizer.set_linear_quant_param("conv2.w_scale", scale)
    quantizer.model(IMAGES)
    expected = (layer.float_weight * scale).round().clamp(-128, 127)
    assert torch.equal(layer.wrapped_module.weight, expected)


@pytest.mark.parametrize("mode", ["SYMMETRIC", "SYMMETRIC_RESTRICTED", "ASYMMETRIC_SIGNED"])
def test_clipping_is_the_inverse_of_scales(mode):
    options = {"mode": mode, "save_fp_weights": True, "per_channel_wts": True}
    quantizer = quantize(make_residual(), IMAGES, **options)
    former = {name: values.clone() for name, values in quantizer.linear_quant_params.items()}
    ranges = quantizer.clipping_params
    quantizer.update_linear_quant_params(ranges)
    for name, values in quantizer.linear_quant_params.items():
        torch.testing.assert_close(values, former[name], rtol=1e-5, atol=1e-5)
    record = quantizer.model_activation_stats["conv2"].output
    ends = ranges["conv2.output_clipping"]
    expected = max(-record.min, record.max) if ends.dim() == 0 else record.max - record.min
    width = ends if ends.dim() == 0 else ends[1] - ends[0]
    torch.testing.assert_close(float(width), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("conv1.scale", 1.0, "is no parameter"),
        ("nothing.output_scale", 1.0, "is no parameter"),
        ("conv1.w_scale", 1.0, "is no parameter"),
        ("conv1.output_scale", 0.0, "above 0"),
        ("conv1.output_scale", -1.0, "above 0"),
        ("conv1.output_zero_point", float("nan"), "finite"),
        ("conv1.output_scale", torch.ones(3), "shape"),
        ("conv1.output_clipping", -1.0, "at least 0"),
        ("conv1.output_scale", None, "a NoneType"),
        ("conv1.output_scale", "a", "a str"),
        ("conv1.output_clipping", [None], "a list"),
        (None, 1.0, "is no parameter"),
    ],
)
def test_parameters_that_cannot_be_set(name, value, text):
    quantizer = quantize(make_residual(), IMAGES)
    former = {key: values.clone() for key, values in quantizer.linear_quant_params.items()}
    with pytest.raises(ERRORS["set_linear_quant_param with unknown name"], match=text) as error:
        quantizer.set_linear_quant_param(name, value)
    assert isinstance(error.value, QdqError)
    for key, values in quantizer.linear_quant_params.items():
        assert torch.equal(values, former[key])


def test_a_quantized_model_is_not_quantized_again():
    quantizer = quantize(make_residual(), IMAGES)
    with pytest.raises(ERRORS["prepare_model twice"], match="quantized already"):
        quantizer.prepare_model(IMAGES)
    expected = ERRORS["quantize-eval of a model that already is post-train quantized"]
    with pytest.raises(expected, match="quantized already"):
        PostTrainLinearQuantizer(quantizer.model)


@pytest.mark.parametrize(
    ("options", "when"),
    [
        ({"overrides": {}}, "overrides is a plain dict"),
        ({"overrides": OrderedDict(conv1={"acts": 8})}, "override key 'acts','wts' or 'bias'"),
        ({"overrides": OrderedDict(conv1={"bit": 8})}, "unknown override argument"),
        ({"clip_acts": "N_STD"}, "N_STD without clip_n_stds"),
        ({"clip_acts": "N_STD", "clip_n_stds": -1.0}, "n_stds <= 0"),
        ({"mode": "SYM"}, "mode or clip string unknown"),
        ({"clip_acts": "MEAN"}, "mode or clip string unknown"),
        ({"mode": 1}, "mode of another type"),
        ({"model_activation_stats": "no such file.yaml"}, "statistics file does not exist"),
        ({"model_activation_stats": 3}, "statistics neither str nor dict"),
        (
            {
                "clip_acts": "N_STD",
                "clip_n_stds": 2.0,
                "per_channel_wts": True,
                "also_clip_weights": True,
            },
            "N_STD with per-channel weights",
        ),
    ],
)
def test_published_errors(options, when):
    model = make_residual()
    with torch.no_grad():
        expected = model(IMAGES)
    options = {"model_activation_stats": collect_quant_stats(model, [IMAGES])} | options
    with pytest.raises(ERRORS[when]) as error:
        PostTrainLinearQuantizer(model, **options).prepare_model(IMAGES)
    assert isinstance(error.value, QdqError)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected)


def test_statistics_of_another_model():
    model = make_residual()
    statistics = collect_quant_stats(model, [IMAGES])
    del statistics["conv2"], statistics["add"]
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics)
    with pytest.raises(ArgumentError, match="no entry for 2 layers: conv2, add"):
        quantizer.prepare_model(IMAGES)
    assert isinstance(model.bn1, nn.BatchNorm2d)


def test_statistics_without_deviations():
    model = make_residual()
    statistics = collect_quant_stats(model, [IMAGES])
    statistics["fc"].output = type(statistics["fc"].output)(-1.0, 1.0, -1.0, 1.0, 0.0)
    quantizer = PostTrainLinearQuantizer(
        model, clip_acts="GAUSS", model_activation_stats=statistics
    )
    with torch.no_grad():
        expected = model(IMAGES)
    with pytest.raises(ArgumentError, match="fc, output"):
        quantizer.prepare_model(IMAGES)
    with torch.no_grad():  # BatchNorm may be folded
        torch.testing.assert_close(model(IMAGES), expected)


def test_overrides_of_layers():
    overrides = OrderedDict(
        conv1={"bits_activations": None, "bits_weights": None},
        conv2={"fpq_module": 16},
        add={"fake": True, "clip_acts": "AVG"},
        pool={"make_identity": True},
        fc={"bits_weights": 4, "bits_activations": 6},
    )
    model = make_residual()
    model.pool = nn.AvgPool2d(1)
    model.fc = nn.Linear(800, 5)
    quantizer = quantize(model, IMAGES, overrides=overrides)
    assert list(quantizer.layers) == ["relu1", "add", "fc"]
    assert isinstance(quantizer.model.conv2, FPWrapper)
    assert quantizer.model.conv2.wrapped_module.weight.dtype == torch.float16
    assert isinstance(quantizer.layers["add"], RangeLinearFakeQuantWrapper)
    assert quantizer.layers["add"].settings.clip_acts is ClipMode.AVG
    assert type(quantizer.model.pool) is nn.Identity
    assert quantizer.layers["fc"].wrapped_module.weight.abs().max() <= 8
    reasons = {entry.name: entry.reason for entry in quantizer.left_float.entries}
    assert "null" in reasons["conv1"]
    assert "float16" in reasons["conv2"]
    with torch.no_grad():
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 15


def test_half_range_without_a_relu_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        quantize(make_residual(), IMAGES, overrides=OrderedDict(fc={"clip_half_range": True}))
    assert "clip_half_range has no effect" in caplog.text
    assert "fc" in caplog.text


def test_the_state_dict_rebuilds_the_model():
    model = make_residual()
    quantizer = quantize(model, IMAGES, per_channel_wts=True, save_fp_weights=True)
    quantizer.set_linear_quant_param("conv1.output_scale", 20.0)
    expected = quantizer.model(IMAGES)
    state = quantizer.model.state_dict()
    keys = {key.removeprefix("conv1.") for key in state if key.startswith("conv1.")}
    assert keys == {
        "num_forwards",
        "output_scale",
        "output_zero_point",
        "w_scale",
        "w_zero_point",
        "accum_scale",
        "fp_bias",
        "float_weight",
        "wrapped_module.weight",
        "wrapped_module.bias",
    }
    torch.manual_seed(5)
    other = Residual()
    rebuilt = quantize(other, IMAGES, per_channel_wts=True, save_fp_weights=True)
    rebuilt.model.load_state_dict(state)
    inputs = rebuilt.layers["conv1"].input_params[0], quantizer.layers["conv1"].input_params[0]
    assert inputs[0].scale == inputs[1].scale
    output = rebuilt.model(IMAGES)
    # The input of the classifier comes from a function, and has the range of its own statistics.
    rebuilt.layers["fc"].input_params = quantizer.layers["fc"].input_params
    assert torch.equal(rebuilt.model(IMAGES), expected)
    assert output.shape == expected.shape


class Padded(nn.Conv2d):
    """A convolution with its own forward and a module for its padding."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.padding_layer = nn.ZeroPad2d(1)

    def forward(self, x):
        return super().forward(self.padding_layer(x))


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
def test_convolutions_with_children_are_whole_layers(mode):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=Padded(3, 8, 3), relu=nn.ReLU())).eval()
    quantizer = quantize(model, IMAGES, mode=mode)
    assert list(quantizer.layers) == ["conv"]
    with torch.no_grad():
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 35


def test_shared_layers_and_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(10, 10)
            self.alias = self.first
            self.tied = nn.Linear(10, 10)
            self.tied.weight = self.first.weight

        def forward(self, x):
            return self.tied(self.alias(torch.relu(self.first(x))))

    torch.manual_seed(0)
    model = Shared().eval()
    quantizer = quantize(model, ROWS)
    assert list(quantizer.layers) == ["first", "tied"]
    assert quantizer.model.first is quantizer.model.alias
    with torch.no_grad():
        assert snr_db(model(ROWS), quantizer.model(ROWS)) > 25


def test_a_layer_that_does_not_run_is_said():
    model = make_residual()
    model.aux = nn.Linear(3, 3)
    quantizer = quantize(model, IMAGES)
    assert type(quantizer.model.aux) is nn.Linear
    assert [entry.name for entry in quantizer.left_float.entries] == ["aux"]


def test_an_input_with_a_scale_and_settings():
    overrides = OrderedDict(conv2={"input_overrides": {0: {"from_output": True}}})
    model = make_residual()
    statistics = collect_quant_stats(model, [IMAGES])
    quantizer = PostTrainLinearQuantizer(
        model, overrides=overrides, model_activation_stats=statistics
    )
    with torch.no_grad():
        expected = model(IMAGES)
    with pytest.raises(ERRORS["input with metadata and user input_overrides"], match="conv1"):
        quantizer.prepare_model(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected)
    assert type(model.conv2) is nn.Conv2d


def test_an_input_without_a_scale():
    expected = ERRORS["input without metadata, no override, no fallback"]
    with pytest.raises(expected, match="conv1, input 0"):
        quantize(make_residual(), IMAGES, inputs_quant_auto_fallback=False)
    overrides = OrderedDict(
        conv1={"input_overrides": {0: {"bits_activations": 4}}},
        fc={"input_overrides": {0: {"from_output": True}}},
    )
    quantizer = quantize(
        make_residual(), IMAGES, inputs_quant_auto_fallback=False, overrides=overrides
    )
    assert quantizer.layers["conv1"].input_params[0].num_bits == 4
    assert quantizer.layers["fc"].input_params[0].num_bits == 8


def test_a_wrapped_model():
    model = make_residual()
    statistics = collect_quant_stats(model, [IMAGES])
    plain = quantize(model, IMAGES, model_activation_stats=statistics)
    wrapper = nn.Module()
    wrapper.module = copy.deepcopy(model)
    quantizer = PostTrainLinearQuantizer(wrapper, model_activation_stats=statistics)
    quantizer.prepare_model(IMAGES)
    assert list(quantizer.layers) == list(plain.layers)
    assert torch.equal(wrapper.module(IMAGES), plain.model(IMAGES))


def test_training_mode_is_refused():
    quantizer = quantize(make_residual(), IMAGES)
    with pytest.raises(StateError, match="training mode"):
        quantizer.model.train()(IMAGES)


def test_products_of_a_gate():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.squeeze = nn.Conv2d(8, 8, 1)
            self.sigmoid = nn.Sigmoid()
            self.mul = EltwiseMult()

        def forward(self, x):
            x = self.conv(x)
            return self.mul(self.sigmoid(self.squeeze(x)), x)

    torch.manual_seed(0)
    model = Gate().eval()
    quantizer = quantize(model, IMAGES, mode="ASYMMETRIC_UNSIGNED", clip_acts="NONE")
    assert quantizer.layers["mul"].sources[1] is quantizer.layers["conv"]
    with torch.no_grad():
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 30


@pytest.mark.parametrize("inference", [False, True])
def test_values_that_change_in_place_are_quantized_again(inference):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.conv1(x)
            x += 20 * x.detach().clone()
            return self.conv2(x)

    torch.manual_seed(0)
    model = InPlace().eval()
    quantizer = quantize(model, IMAGES)
    with torch.inference_mode(inference), torch.no_grad():
        # With the scale of the first layer, all values beyond its range would have its largest code.
        assert snr_db(model(IMAGES), quantizer.model(IMAGES)) > 30
    assert quantizer.layers["conv2"].sources == {0: None}
    assert not quantizer.layers["conv2"].has_several_sources


def test_a_layer_alone():
    quantizer = PostTrainLinearQuantizer(nn.Linear(10, 4).eval())
    with pytest.raises(ArgumentError, match="no layers inside"):
        quantizer.prepare_model(ROWS)


@pytest.mark.parametrize(
    ("bits", "bits_accum", "is_clamped"), [(8, 32, False), (16, 32, True), (8, 16, True)]
)
def test_sums_beyond_the_accumulator_are_named(bits, bits_accum, is_clamped, caplog):
    """The largest sum follows from the float model, in float64: |w x| times both scales."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40, bias=False), nn.Tanh())
    weight = model[0].weight.detach().double()
    highest = (2**bits - 1) / 2
    scales = highest**2 / (weight.abs().max() * ROWS.double().abs().max())
    largest = float((ROWS.double() @ weight.T).abs().max() * scales)
    quantizer = PostTrainLinearQuantizer(
        model, bits, bits, bits_accum, model_activation_stats=collect_quant_stats(model, [ROWS])
    )
    quantizer.prepare_model(ROWS)
    lines = [record.message for record in caplog.records if "accumulator" in record.message]
    assert (largest >= 2 ** (bits_accum - 1)) == is_clamped == bool(lines)
    for line in lines:
        assert f"the accumulator of {bits_accum} bits" in line and f"0 ({largest:.3g})" in line


def test_a_bias_beyond_the_accumulator_is_named(caplog):
    """A channel of tiny weights has a large scale, and its bias no code of 32 bits."""
    model = nn.Sequential(nn.Linear(10, 2), nn.Tanh())
    with torch.no_grad():
        model[0].weight[1] *= 1e-9
        model[0].bias[:] = 1
    statistics = collect_quant_stats(model, [ROWS])
    options = {"model_activation_stats": statistics, "per_channel_wts": True}
    PostTrainLinearQuantizer(model, **options).prepare_model(ROWS)
    assert any("accumulator of 32 bits" in record.message for record in caplog.records)


class Products(nn.Module):
    """A linear layer, products of elements and a matrix product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 16, bias=False)
        self.mult, self.matmul, self.add = EltwiseMult(), Matmul(), EltwiseAdd()

    def forward(self, x):
        return self.add(self.linear(x), self.matmul(x, x.T)) + self.mult(x, x).sum()


@pytest.mark.parametrize("is_static", [True, False])
def test_sums_that_are_clamped_are_said_once(is_static, caplog):
    torch.manual_seed(0)
    model = Products().eval()
    statistics = collect_quant_stats(model, [ROWS]) if is_static else None
    quantizer = PostTrainLinearQuantizer(model, bits_accum=12, model_activation_stats=statistics)
    quantizer.prepare_model(ROWS)
    names = ("matmul", "mult") if is_static else ("linear",)
    integers = {name: [] for name in names}
    for name, outputs in integers.items():
        float_layer = quantizer.layers[name].wrapped_module
        float_layer.register_forward_hook(
            lambda *call, outputs=outputs: outputs.append(call[2].clone())
        )
    caplog.clear()
    for _ in range(2):
        quantizer.model(ROWS)
    lines = [line for line in caplog.messages if "are beyond the accumulator of 12 bits" in line]
    for line, (name, (sums, _)) in zip(sorted(lines), integers.items(), strict=True):
        num_beyond = int((sums > 2047).sum() + (sums < -2048).sum())
        assert line.startswith(f"{name}: {num_beyond} of {sums.numel()} sums ")


def test_codes_of_a_bias_that_are_clamped_are_said(caplog):
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].bias[:] = torch.tensor([1e4, -1e4, 1, 0])
    quantizer = PostTrainLinearQuantizer(model, bits_accum=20)
    quantizer.prepare_model(ROWS)
    quantizer.model(ROWS)
    assert sum("0: 2 of 4 codes of the bias are beyond" in line for line in caplog.messages) == 1


class Keywords(nn.Module):
    """Layers that get their inputs by name."""

    def __init__(self, by_name):
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4)
        self.shape = nn.Tanh()
        self.by_name = by_name

    def forward(self, x):
        if not self.by_name:
            return self.shape(self.last(self.relu(self.first(x))))
        return self.shape(input=self.last(input=self.relu(input=self.first(input=x))))


@pytest.mark.parametrize("is_static", [True, False])
def test_layers_that_are_called_by_name_are_quantized_as_by_position(is_static):
    outputs = []
    for by_name in (False, True):
        torch.manual_seed(0)
        model = Keywords(by_name)
        statistics = collect_quant_stats(model, [ROWS]) if is_static else None
        quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics)
        quantizer.prepare_model(ROWS)
        outputs.append(model.eval()(ROWS))
        if is_static:
            assert {name: list(record.inputs) for name, record in statistics.items()} == {
                name: [0] for name in ("first", "relu", "last", "shape")
            }
    assert torch.equal(*outputs)


def test_an_unknown_keyword_is_refused_with_the_name_of_the_layer():
    model = Keywords(by_name=False)
    statistics = collect_quant_stats(model, [ROWS])
    PostTrainLinearQuantizer(model, model_activation_stats=statistics).prepare_model(ROWS)
    model.eval()
    with pytest.raises(ArgumentTypeError, match="first, a Linear, is called with other arguments"):
        model.first(e=ROWS)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"conv1": {"input_overrides": {3: {"bits_activations": 4}}}}, "and no input 3"),
        ({"relu1": {"bits_activations": 4}}, "the layer before applies this ReLU"),
        ({"add": {"bits_weights": 4}}, "EltwiseAdd has no weight that is quantized"),
        ({"conv2": {"bits_bias": 8}}, "bias have the 32 bits of the sums"),
        ({"conv1": {"clip_half_range": False}}, "a ReLU follows"),
        (
            {"fc": {"fake": True, "input_overrides": {0: {"bits_activations": 4}}}},
            "fc computes in float",
        ),
        ({"conv1": {"input_overrides": {0: {"bits_activations": 4}}}}, None),
        ({"relu.*|conv2|add": {"bits_weights": 4, "bits_bias": 32}}, None),
        ({"add": {"bits_weights": None, "bits_activations": None}}, None),
    ],
)
def test_settings_of_overrides_without_effect_are_named(overrides, expected, caplog):
    torch.manual_seed(0)
    model = Residual().eval()
    statistics = collect_quant_stats(model, [IMAGES])
    quantizer = PostTrainLinearQuantizer(
        model, overrides=OrderedDict(overrides), model_activation_stats=statistics
    )
    quantizer.prepare_model(IMAGES)
    (pattern,) = overrides
    lines = [line for line in caplog.messages if line.startswith(f"override '{pattern}'")]
    assert len(lines) == (expected is not None)
    for line in lines:
        assert expected in line and "has no effect" in line


def test_preparing_is_logged_for_users_of_the_class(caplog):
    (golden,) = [
        case["format"]
        for case in read_cases("distiller_logs_files")
        if case.get("format", "").startswith("Preparing model")
    ]
    with caplog.at_level(logging.INFO, logger="qdq"):
        PostTrainLinearQuantizer(make_residual()).prepare_model(IMAGES)
    assert caplog.messages.count(golden) == 1
