"""Quantized layers against published outputs, and against integers in numpy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import read_cases
from torch import nn
from torch.nn import functional

from qdq.distiller import (
    BatchMatmul,
    ClipMode,
    Concat,
    EltwiseAdd,
    EltwiseMult,
    FPWrapper,
    LayerSettings,
    LayerStatistics,
    LinearQuantMode,
    Matmul,
    PostTrainLinearQuantizer,
    RangeLinearEmbeddingWrapper,
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantMatmulWrapper,
    RangeLinearQuantParamLayerWrapper,
    TensorRecord,
    collect_quant_stats,
    parse_clip,
    parse_mode,
)
from qdq.distiller.layers.metadata import read_metadata
from qdq.distiller.settings.input_settings import InputSettings
from qdq.distiller.statistics.statistics_file import read_statistics
from qdq.errors import ArgumentError, ArgumentTypeError, QdqError

OPERATIONS = {
    "concat": (RangeLinearQuantConcatWrapper, lambda case: Concat(case["dim"])),
    "eltwise_add": (RangeLinearQuantEltwiseAddWrapper, lambda case: EltwiseAdd()),
    "eltwise_mult": (RangeLinearQuantEltwiseMultWrapper, lambda case: EltwiseMult()),
}


def make_settings(case):
    return LayerSettings(
        bits_activations=case["bits_activations"],
        bits_weights=case.get("bits_weights"),
        mode=parse_mode(case["mode"]),
        per_channel_wts=case.get("per_channel_wts", False),
        clip_acts=parse_clip(case["clip_acts"]),
    )


def make_statistics(values):
    return None if values is None else read_statistics({"layer": values})["layer"]


def make_layer(case):
    weight = torch.tensor(case["weight"])
    if case["layer"] == "Conv2d":
        outputs, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs, outputs, kernel, padding=case["padding"], bias=case["bias"])
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.bias = nn.Parameter(torch.tensor(case["bias_values"]))
    layer.weight = nn.Parameter(weight)
    return layer


def check(output, case):
    torch.testing.assert_close(output, torch.tensor(case["expected_output"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", read_cases("distiller_param_layers"))
def test_published_outputs_of_layers(case):
    statistics = make_statistics(case.get("conv_stats") or case.get("stats"))
    layer = RangeLinearQuantParamLayerWrapper(
        make_layer(case), make_settings(case), statistics, bits_accum=case["bits_accum"]
    )
    check(layer.eval()(torch.tensor(case["input"])), case)
    with pytest.raises(RuntimeError, match="training mode"):
        layer.train()(torch.tensor(case["input"]))


@pytest.mark.parametrize("case", read_cases("distiller_multi_input_layers"))
def test_published_outputs_of_sums_products_and_concatenations(case):
    wrapper, make_module = OPERATIONS[case["op"]]
    layer = wrapper(make_module(case), make_settings(case), make_statistics(case["stats"]))
    check(layer.eval()(*[torch.tensor(values) for values in case["inputs"]]), case)


def solve(values, mode, bits=8):
    """Multiplier, zero point and codes of a range, in float64, as the specification has them."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if mode == "SYMMETRIC":
        return (2**bits - 1) / 2 / max(-low, high), 0.0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (2**bits - 1) / (high - low)
    return scale, float(np.rint(scale * low)), 0, 2**bits - 1


def integers_of(values, params):
    scale, zero_point, lowest, highest = params
    codes = np.clip(np.rint(scale * values.double().numpy() - zero_point), lowest, highest)
    return torch.from_numpy(codes + zero_point)


def record_of(values):
    low, high = float(values.min()), float(values.max())
    return TensorRecord(low, high, low, high, float(values.mean()), float(values.std()), 1.0)


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "grouped Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
    "Conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 9)),
}


def copy_with(layer, weight, bias):
    """The layer in float64 with other parameters."""
    other = copy.deepcopy(layer).double()
    other.weight = nn.Parameter(weight)
    if bias is not None:
        other.bias = nn.Parameter(bias)
    return other


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_equal_integer_arithmetic(make, mode):
    """One scale for the weight: integer sums in float64, requantized as section 9 of the specification says."""
    torch.manual_seed(0)
    layer, shape = make[0](), make[1]
    values = torch.randn(shape)
    with torch.no_grad():
        output = layer(values)
    statistics = LayerStatistics({0: record_of(values)}, record_of(output))
    settings = LayerSettings(mode=parse_mode(mode))
    wrapper = RangeLinearQuantParamLayerWrapper(copy.deepcopy(layer), settings, statistics).eval()

    params = [solve(tensor.detach(), mode) for tensor in (values, layer.weight, output)]
    (x_scale, *_), (w_scale, *_), (y_scale, y_zero, lowest, highest) = params
    bias = None
    if layer.bias is not None:
        bias = (layer.bias.detach().double() * x_scale * w_scale).round()
    weight = integers_of(layer.weight.detach(), params[1])
    with torch.no_grad():
        sums = copy_with(layer, weight, bias)(integers_of(values, params[0]))
    codes = (sums * (y_scale / (x_scale * w_scale)) - y_zero).round().clamp(lowest, highest)
    difference = wrapper(values).double() * y_scale - (codes + y_zero)
    assert float(difference.abs().max()) < 1.01
    assert float((difference.abs() > 0.01).double().mean()) < 0.03  # ties in float32


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_SIGNED"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_weights_of_channels(make, mode):
    """With so many bits a scale in the wrong channel would show; with more, sums would exceed 32 bits."""
    torch.manual_seed(0)
    layer, shape = make[0](), make[1]
    axis = 1 if "Transpose" in type(layer).__name__ else 0
    with torch.no_grad():
        spread = [1] * layer.weight.dim()
        spread[axis] = -1
        layer.weight *= torch.logspace(-2, 2, layer.weight.shape[axis]).reshape(spread)
        values = torch.randn(shape)
        output = layer(values)
    statistics = LayerStatistics({0: record_of(values)}, record_of(output))
    settings = LayerSettings(14, 12, mode=parse_mode(mode), per_channel_wts=True)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, settings, statistics).eval()
    assert wrapper.w_scale.numel() == layer.weight.shape[axis]
    error = (wrapper(values) - output).abs().max()
    assert error < 2e-3 * output.abs().max()


def test_long_sums_are_exact():
    """Sums above 2^24: the codes are those of int64."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20_000, 3, bias=False)
    layer.weight = nn.Parameter(torch.rand(3, 20_000, generator=generator))
    values = torch.rand(4, 20_000, generator=generator)
    with torch.no_grad():
        output = layer(values)
    statistics = LayerStatistics({0: record_of(values)}, record_of(1.1 * output))
    settings = LayerSettings(24, 8, mode=parse_mode("ASYMMETRIC_UNSIGNED"))
    narrow = replace(settings, input_overrides={0: InputSettings(8, *INPUT)})
    wrapper = RangeLinearQuantParamLayerWrapper(layer, narrow, statistics).eval()
    codes = wrapper.weight_params.quantize(wrapper.read_weight()).long()
    inputs = wrapper.input_params[0].quantize(values).long()
    sums = inputs @ codes.T
    assert int(sums.max()) > 2**24
    quantized = wrapper(values).double()
    expected = sums.double() / float(wrapper.accum_scale)
    torch.testing.assert_close(quantized, expected, rtol=2e-7, atol=0)


INPUT = (LinearQuantMode.ASYMMETRIC_UNSIGNED, ClipMode.NONE, None)


def test_accumulators_are_clamped():
    layer = nn.Linear(8, 1)
    layer.weight = nn.Parameter(torch.ones(1, 8))
    layer.bias = nn.Parameter(torch.tensor([100.0]))
    statistics = LayerStatistics({0: TensorRecord(**ENDS)}, TensorRecord(**ENDS | {"max": 200.0}))
    settings = LayerSettings(16, 8, mode=parse_mode("ASYMMETRIC_UNSIGNED"))
    settings = replace(settings, input_overrides={0: InputSettings(8, *INPUT)})
    wrapper = RangeLinearQuantParamLayerWrapper(layer, settings, statistics, bits_accum=12).eval()
    output = wrapper(torch.ones(1, 8))
    # The largest sum is 2^11 - 1, at the scale 255 * 255; the bias has this code, too.
    torch.testing.assert_close(float(output), (2**11 - 1) / 255**2, rtol=0, atol=200 / 2**16)
    assert float(wrapper.wrapped_module.bias) == 2**11 - 1


EIGHT = LayerSettings(bits_activations=8, bits_weights=8)
ENDS = {"min": 0.0, "max": 1.0, "avg_min": 0.0, "avg_max": 1.0}


@pytest.mark.parametrize("bits", [2, 4])
def test_scales_are_approximated(bits):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    values = torch.randn(16, 8)
    with torch.no_grad():
        output = layer(values)
    statistics = LayerStatistics({0: record_of(values)}, record_of(output))
    settings = LayerSettings(scale_approx_mult_bits=bits)
    wrapper = RangeLinearQuantParamLayerWrapper(copy.deepcopy(layer), settings, statistics).eval()
    exact = RangeLinearQuantParamLayerWrapper(layer, LayerSettings(), statistics).eval()
    factor = float(exact.output_scale / (exact.input_params[0].scale * exact.w_scale))
    shift = np.floor(np.log2((2**bits - 1) / factor))
    ratio = np.floor(factor * 2**shift) / 2**shift / factor
    assert ratio < 0.99
    step = 1 / float(exact.output_scale)
    torch.testing.assert_close(wrapper(values), ratio * exact(values), rtol=0, atol=1.5 * step)


def make_statistics_of(output, *inputs):
    records = {index: record_of(values) for index, values in enumerate(inputs)}
    return LayerStatistics(records, record_of(output))


@pytest.mark.parametrize("kind", [Matmul, BatchMatmul])
@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
def test_matrix_products(kind, mode):
    torch.manual_seed(0)
    first, second = torch.randn(3, 5, 40), torch.rand(3, 40, 6)
    output = first @ second
    statistics = make_statistics_of(output, first, second)
    settings = LayerSettings(mode=parse_mode(mode))
    wrapper = RangeLinearQuantMatmulWrapper(kind(), settings, statistics).eval()
    params = [solve(tensor, mode) for tensor in (first, second, output)]
    y_scale, y_zero, lowest, highest = params[2]
    sums = integers_of(first, params[0]) @ integers_of(second, params[1])
    codes = (sums * (y_scale / (params[0][0] * params[1][0])) - y_zero).round()
    expected = (codes.clamp(lowest, highest) + y_zero) / y_scale
    torch.testing.assert_close(
        wrapper(first, second).double(), expected, rtol=0, atol=1.01 / y_scale
    )


def test_embedding():
    torch.manual_seed(0)
    layer = nn.Embedding(20, 6)
    table = layer.weight.detach().clone()
    wrapper = RangeLinearEmbeddingWrapper(layer, LayerSettings()).eval()
    rows = torch.tensor([[3, 4], [19, 0]])
    scale = 127.5 / float(table.abs().max())
    expected = (table.double() * scale).round().clamp(-128, 127) / scale
    output = wrapper(rows)
    torch.testing.assert_close(output.double(), expected[rows], rtol=1e-5, atol=1e-6)
    metadata = read_metadata(output)
    assert metadata.source is wrapper
    assert float(metadata.params.scale) == pytest.approx(scale)


def test_scales_travel_with_tensors():
    torch.manual_seed(0)
    values = torch.randn(4, 8)
    layers = [nn.Linear(8, 8) for _ in range(2)]
    plain = copy.deepcopy(layers[1])
    with torch.no_grad():
        between = layers[0](values)
        output = layers[1](between)
    first = RangeLinearQuantParamLayerWrapper(
        layers[0], LayerSettings(), make_statistics_of(between, values)
    ).eval()
    # The statistics of its input are of no use: the scale comes with the tensor.
    statistics = make_statistics_of(output, 0.1 * between)
    second = RangeLinearQuantParamLayerWrapper(layers[1], LayerSettings(), statistics).eval()
    direct = second(first(values))
    assert second.sources == {0: first}
    assert float((direct - output).abs().max()) < 0.05
    copied = first(values).clone()
    fresh = RangeLinearQuantParamLayerWrapper(copy.deepcopy(plain), LayerSettings(), statistics)
    assert torch.equal(second(copied), fresh.eval()(copied))
    assert float((second(copied) - output).abs().max()) > 0.05
    assert second.has_several_sources


def test_inputs_that_cannot_be_read():
    layer = RangeLinearQuantParamLayerWrapper(nn.Linear(4, 4), LayerSettings()).eval()
    with pytest.raises(ArgumentTypeError, match=r"input 0 is of type torch\.int64"):
        layer(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ArgumentError, match="not finite"):
        layer(torch.full((1, 4), float("nan")))


def test_wrappers_of_other_modules():
    statistics = make_statistics_of(torch.ones(2), torch.ones(2))
    for wrapper in (
        RangeLinearQuantConcatWrapper,
        RangeLinearQuantEltwiseAddWrapper,
        RangeLinearQuantEltwiseMultWrapper,
        RangeLinearQuantMatmulWrapper,
    ):
        with pytest.raises(ValueError, match="ReLU"):
            wrapper(nn.ReLU(), LayerSettings(), statistics)
    with pytest.raises(ValueError, match="ReLU"):
        RangeLinearQuantParamLayerWrapper(nn.ReLU(), LayerSettings(), statistics)
    with pytest.raises(ValueError, match="ReLU"):
        RangeLinearEmbeddingWrapper(nn.ReLU(), LayerSettings())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_statistics_for_several_inputs(operation):
    wrapper, make_module = OPERATIONS[operation]
    with pytest.raises(NotImplementedError, match="no dynamic mode") as error:
        wrapper(make_module({"dim": 1}), LayerSettings())
    assert isinstance(error.value, QdqError)


def test_weights_or_activations_alone():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    values = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        output = layer(values)
    statistics = make_statistics_of(output, values)
    weights = RangeLinearQuantParamLayerWrapper(
        copy.deepcopy(layer), LayerSettings(bits_activations=None, bits_weights=3), statistics
    ).eval()
    quantized = weights.weight_params.fake_quantize(layer.weight)
    expected = functional.conv2d(values, quantized, layer.bias)
    torch.testing.assert_close(weights(values), expected.detach())
    assert read_metadata(weights(values)) is None

    activations = RangeLinearQuantParamLayerWrapper(
        copy.deepcopy(layer), LayerSettings(bits_weights=None, bits_activations=4), statistics
    ).eval()
    with torch.no_grad():
        expected = layer(activations.input_params[0].fake_quantize(values))
    expected = activations.output_params.fake_quantize(expected)
    torch.testing.assert_close(activations(values), expected)
    assert torch.equal(activations.wrapped_module.weight, layer.weight)


def test_layers_in_float():
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(8, 8)
    half = FPWrapper(layer, 16).eval()
    output = half(values)
    assert output.dtype == torch.float32
    with torch.no_grad():
        expected = copy.deepcopy(layer).half()(values.half()).float()
    assert torch.equal(output, expected)
    assert layer.weight.dtype == torch.float32

    fake = RangeLinearFakeQuantWrapper(
        nn.Tanh(), LayerSettings(fpq_module=16), make_statistics_of(values.tanh(), values)
    ).eval()
    expected = fake.output_params.fake_quantize(values.half().tanh().float())
    torch.testing.assert_close(fake(values), expected)
    assert fake(values.long()).dtype == torch.float32


STATIC = LayerStatistics({0: TensorRecord(**ENDS), 1: TensorRecord(**ENDS)}, TensorRecord(**ENDS))
LAYERS = [
    lambda: RangeLinearQuantParamLayerWrapper(nn.Linear(3, 2), EIGHT, STATIC, name="fc"),
    lambda: RangeLinearQuantParamLayerWrapper(nn.Linear(3, 2), EIGHT, name="fc"),
    lambda: RangeLinearFakeQuantWrapper(nn.Tanh(), EIGHT, STATIC, name="fc"),
    lambda: RangeLinearFakeQuantWrapper(
        nn.ReLU(), replace(EIGHT, quantize_inputs=True), STATIC, name="fc"
    ),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", LAYERS)
def test_inputs_that_are_not_finite_are_refused(make, value):
    values = torch.tensor([[0.1, value, 0.2]])
    layer = make().eval()
    if isinstance(layer.wrapped_module, nn.Tanh) and value == float("inf"):
        assert layer(values).isfinite().all()  # tanh(Inf) is 1
        return
    with pytest.raises(
        ArgumentError,
        match=r"^fc, (input 0|input 0: statistics|output): 1 of 3 values are not finite",
    ):
        layer(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[3]])
def test_where_inputs_are_not_looked_at_they_become_nan(make, value, monkeypatch):
    """As on a GPU: they never become codes."""
    monkeypatch.setattr("qdq.systems.arithmetic._is_looked_at", lambda values: False)
    output = make().eval()(torch.tensor([[0.1, value, 0.2], [0.1, 0.3, 0.2]]))
    assert output[0].isnan().any()
    assert output[1].isfinite().all()


def test_a_layer_that_makes_infinite_values_is_named():
    layer = RangeLinearFakeQuantWrapper(nn.LogSoftmax(0), EIGHT, STATIC, name="log").eval()
    values = torch.tensor([-3e38, 3e38])
    with pytest.raises(ArgumentError, match=r"^log, output: 1 of 2 values are not finite"):
        layer(values)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_parameters_that_are_not_finite_are_refused(kind, bits):
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        getattr(linear, kind).view(-1)[1] = float("nan")
    settings = LayerSettings(bits_activations=8, bits_weights=bits)
    with pytest.raises(ArgumentError, match=rf"^fc, {kind}: 1 of \d values are not finite"):
        RangeLinearQuantParamLayerWrapper(linear, settings, STATIC, name="fc")


@pytest.mark.parametrize("is_static", [True, False])
def test_models_in_float64(is_static):
    ends = TensorRecord(-2.0, 2.0, -2.0, 2.0)
    statistics = LayerStatistics({0: ends}, ends)
    linear = nn.Linear(3, 2).double()
    settings = LayerSettings(bits_activations=8, bits_weights=8)
    values = torch.rand(5, 3, dtype=torch.float64) - 0.5
    exact = linear(values)
    layer = RangeLinearQuantParamLayerWrapper(linear, settings, statistics if is_static else None)
    output = layer.eval()(values)
    assert output.dtype is torch.float64
    torch.testing.assert_close(output, exact, atol=0.05, rtol=0)


def test_half_precision_models():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    values = torch.randn(4, 8)
    with torch.no_grad():
        output = layer(values)
    statistics = make_statistics_of(output, values)
    wrapper = RangeLinearQuantParamLayerWrapper(layer.half(), LayerSettings(), statistics).eval()
    quantized = wrapper(values.half())
    assert quantized.dtype == torch.float16
    assert float((quantized.float() - output).abs().max()) < 0.05


class Products(nn.Module):
    """One layer of each kind that computes products of integers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.turned = nn.ConvTranspose2d(32, 16, 2)
        self.linear = nn.Linear(9, 64)
        self.matmul = Matmul()

    def forward(self, x):
        rows = self.linear(self.turned(self.conv(x)))
        return self.matmul(rows, rows.transpose(-1, -2))


@pytest.mark.parametrize("is_static", [True, False])
def test_sums_of_integers_are_exact_under_autocast(is_static):
    torch.manual_seed(0)
    model, images = Products().eval(), torch.randn(2, 3, 8, 8)
    statistics = collect_quant_stats(model, [images]) if is_static else None
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics)
    quantizer.prepare_model(images)
    outputs = []
    for layer in quantizer.layers.values():
        layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    for is_half in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            quantizer.model(images)
    assert len(outputs) == 2 * (4 if is_static else 3)
    middle = len(outputs) // 2
    torch.testing.assert_close(outputs[middle:], outputs[:middle], rtol=0, atol=0)
