"""Quantized models through `to_tensorrt`: against the emulation where both round at the same places, and refusals."""

import copy
import logging
from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qdq import build_engine, check_onnx, export_onnx, predict
from qdq.distiller import (
    Concat,
    EltwiseAdd,
    FPWrapper,
    PostTrainLinearQuantizer,
    collect_quant_stats,
)
from qdq.errors import ExportError
from qdq.quantizer import named_quantizers
from qdq.systems import to_tensorrt

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions with BatchNorm and ReLU, an addition, a concatenation, pooling and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.add = EltwiseAdd()
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.relu3 = nn.ReLU6()
        self.cat = Concat(1)
        self.conv4 = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.add(self.conv2(x), x))
        z = self.conv4(self.cat(y, self.relu3(self.conv3(y))))
        return self.fc(z.mean((2, 3)))


class Chain(nn.Module):
    """Where emulation and engine round at the same places, but for the output."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.conv3(self.relu2(self.conv2(x)))


def make(kind):
    torch.manual_seed(0)
    model = kind()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    return model.eval()


def quantize(model, **options):
    options.setdefault("model_activation_stats", collect_quant_stats(model, [IMAGES]))
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), **options)
    quantizer.prepare_model(IMAGES[:2])
    return quantizer


def run(model):
    with torch.no_grad():
        return model(IMAGES)


def snr_db(expected, values):
    return float(10 * torch.log10(expected.square().sum() / (expected - values).square().sum()))


def export(model, path):
    export_onnx(model, IMAGES[:2], path)
    report = check_onnx(path)
    assert not [finding for finding in report.findings if finding.severity == "error"]
    return torch.from_numpy(predict(path, [IMAGES]))


EXACT = {
    "symmetric": {},
    "per channel": {"per_channel_wts": True},
    "restricted": {"mode": "SYMMETRIC_RESTRICTED", "per_channel_wts": True},
    "clipped": {"clip_acts": "GAUSS", "also_clip_weights": True},
    "6 bits": {"bits_activations": 6, "bits_parameters": 4, "per_channel_wts": True},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_exact_where_both_round_at_the_same_places(options, tmp_path):
    quantizer = quantize(make(Chain), **options)
    emulated = run(quantizer.model)
    codes = [layer.wrapped_module.weight.clone() for layer in quantizer.layers.values()]
    output = quantizer.layers["conv3"].output_params
    transfer = to_tensorrt(quantizer.model)
    assert [layer.precision for layer in transfer.layers] == ["int8"] * 3
    assert {tensor.verdict for layer in transfer.layers for tensor in layer.tensors} == {"exact"}
    assert [(place.name, "no int8 layer" in place.reason) for place in transfer.moved] == [
        ("conv3", True)
    ]
    path = tmp_path / "chain.onnx"
    exported = export(quantizer.model, path)
    graph = onnx.load(path).graph
    arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    stored = [array for array in arrays if array.dtype == np.int8 and array.ndim == 4]
    for expected in codes:
        assert any(np.array_equal(array, expected.numpy()) for array in stored)
    # The engine does not round the output. Sums next to a tie may give another code inside.
    steps = (output.fake_quantize(exported) - emulated) * output.scale
    assert float((steps.abs() > 0.5).double().mean()) < 0.01
    assert float(steps.abs().max()) < 1.5
    operators = [node.op_type for node in graph.node]
    is_clipped = "bits_activations" in options or "mode" in options
    assert operators.count("Clip") == (3 if is_clipped else 0)


@pytest.mark.trt
def test_every_layer_is_int8_in_the_engine(tmp_path):
    quantizer = quantize(make(Net), per_channel_wts=True)
    emulated = run(quantizer.model)
    transfer = to_tensorrt(quantizer.model)
    assert [layer.precision for layer in transfer.layers] == ["int8"] * 5
    path = tmp_path / "net.onnx"
    exported = export(quantizer.model, path)
    assert snr_db(emulated, exported) > 30
    report = build_engine(path, backend="rtx")
    assert not report.missing_int8
    assert sum(layer.int8 for layer in report.layers) == 5


def test_ranges_are_where_tensorrt_wants_them():
    quantizer = quantize(make(Net))
    scales = {name: float(layer.output_scale) for name, layer in quantizer.layers.items()}
    images = float(quantizer.layers["conv1"].input_params[0].scale)
    transfer = to_tensorrt(quantizer.model)
    ranges = {}
    for name, tensor_quantizer in named_quantizers(quantizer.model):
        if "weight" not in name:
            ranges[name] = 127 / float(tensor_quantizer.amax)
    assert ranges == pytest.approx(
        {
            "conv1._input_quantizer": images,
            "conv2._input_quantizer": scales["conv1"],
            "add.quantizers.0": scales["conv1"],
            "conv3._input_quantizer": scales["add"],
            "conv4._input_quantizer": scales["cat"],
            "fc._input_quantizer": float(quantizer.layers["fc"].input_params[0].scale),
        }
    )
    assert quantizer.model.add.positions == (1,)
    assert isinstance(quantizer.model.relu1, nn.ReLU)
    reasons = {}
    for place in transfer.moved:
        reasons.setdefault(place.name, []).append(place.reason)
    assert sorted(reasons) == ["add", "conv2", "conv3", "conv4", "fc", "relu3"]
    assert "straight into the addition" in reasons["conv2"][0]
    assert any("share one scale" in reason for reason in reasons["relu3"])
    assert any("scale of the sum" in reason for reason in reasons["add"])
    assert any("ReLU6 is computed in float" in reason for reason in reasons["conv3"])
    assert all("no int8 layer" in reasons[name][0] for name in ("conv4", "fc"))
    table = transfer.format_table()
    assert "add, input 1: range-linear SYMMETRIC, exact" in table
    assert f"TensorRT rounds otherwise than the emulation at {len(transfer.moved)} places" in table


class Downsampled(nn.Module):
    """A residual block in which both inputs of the sum come from convolutions."""

    def __init__(self, is_swapped):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.short = nn.Conv2d(8, 8, 1)
        self.add = EltwiseAdd()
        self.is_swapped = is_swapped

    def forward(self, x):
        x = self.relu1(self.stem(x))
        y = self.conv2(self.relu2(self.conv1(x)))
        inputs = (self.short(x), y) if self.is_swapped else (y, self.short(x))
        return self.add(*inputs)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_the_longer_path_is_not_rounded_before_a_sum(is_swapped):
    quantizer = quantize(Downsampled(is_swapped).eval())
    short = float(quantizer.layers["short"].output_scale)
    to_tensorrt(quantizer.model)
    assert quantizer.model.add.positions == ((0,) if is_swapped else (1,))
    assert 127 / float(quantizer.model.add.quantizers[0].amax) == pytest.approx(short)


@pytest.mark.parametrize("keep", [False, True])
def test_asymmetric_models_are_converted_on_request(keep, tmp_path):
    model = make(Net)
    quantizer = quantize(model, mode="ASYMMETRIC_UNSIGNED", save_fp_weights=keep)
    emulated = run(quantizer.model)
    state = {name: values.clone() for name, values in quantizer.model.state_dict().items()}
    with pytest.raises(ExportError, match="zero point") as error:
        to_tensorrt(quantizer.model)
    for name in ("conv1", "conv2", "conv3", "conv4", "fc", "add, input 1"):
        assert f"\n{name}: " in str(error.value)
    assert quantizer.model.state_dict().keys() == state.keys()
    assert torch.equal(run(quantizer.model), emulated)

    float_weight = quantizer.layers["conv2"].read_float_weight()
    transfer = to_tensorrt(quantizer.model, convert=True)
    assert [layer.precision for layer in transfer.layers] == ["int8"] * 5
    if keep:
        assert torch.equal(quantizer.model.conv2.weight, float_weight)
    exported = export(quantizer.model, tmp_path / "net.onnx")
    assert snr_db(run(model), exported) > 30


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_activation_stats": None}, "in each batch"),
        ({"bits_accum": 20}, "clamped to 20 bits"),
        ({"bits_activations": 10}, "10 bits"),
        ({"bits_parameters": 12}, "12 bits"),
    ],
)
def test_refusals_leave_the_model(options, text):
    quantizer = quantize(make(Net), **options)
    emulated = run(quantizer.model)
    with pytest.raises(ExportError, match=text):
        to_tensorrt(quantizer.model, convert=True)
    assert torch.equal(run(quantizer.model), emulated)
    with pytest.raises(ExportError, match="another number system"):
        export_onnx(quantizer.model, IMAGES[:2], "never_written.onnx")


def test_float_parts_are_said(tmp_path):
    overrides = OrderedDict(
        conv1={"bits_activations": None},
        conv2={"bits_weights": None},
        conv3={"fpq_module": 16},
        fc={"bits_activations": None, "bits_weights": None},
    )
    model = make(Net)
    quantizer = quantize(model, overrides=overrides)
    half = quantizer.model.conv3
    assert isinstance(half, FPWrapper)
    weight = half.wrapped_module.weight.float()
    transfer = to_tensorrt(quantizer.model)
    notes = {layer.name: (layer.precision, layer.note) for layer in transfer.layers}
    assert notes["conv4"] == ("int8", "")
    for name in ("conv1", "conv2", "conv3", "fc"):
        assert notes[name][0] == "float"
        assert notes[name][1]
    assert "its input is float" in notes["conv1"][1]
    assert "its weight is float" in notes["conv2"][1]
    assert torch.equal(quantizer.model.conv3.weight, weight)
    exported = export(quantizer.model, tmp_path / "net.onnx")
    assert snr_db(run(model), exported) > 25


def test_the_approximation_of_scales_is_dropped(caplog):
    quantizer = quantize(make(Chain), scale_approx_mult_bits=4)
    with caplog.at_level(logging.WARNING):
        transfer = to_tensorrt(quantizer.model)
    assert "approximations by integers of 4 bits" in caplog.text
    assert sum("approximations" in place.reason for place in transfer.moved) == 3


def test_a_layer_with_inputs_of_two_scales():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.head(self.first(x)), self.head(self.second(x))

    quantizer = quantize(Shared().eval())
    with pytest.raises(ExportError, match="come from several layers"):
        to_tensorrt(quantizer.model)


def test_a_sum_with_a_constant_is_not_rounded():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.relu = nn.Conv2d(3, 8, 1), nn.ReLU()
            self.shift = nn.Parameter(torch.ones(8, 1, 1))
            self.add = EltwiseAdd()
            self.conv2 = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv2(self.add(self.relu(self.conv1(x)), self.shift))

    quantizer = quantize(Shifted().eval())
    transfer = to_tensorrt(quantizer.model)
    assert transfer.standing == ()
    assert isinstance(quantizer.model.add, EltwiseAdd)


def test_layers_with_children_are_exported(tmp_path):
    class Padded(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 8, 3)
            self.pad = nn.ZeroPad2d(1)

        def forward(self, x):
            return super().forward(self.pad(x))

    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=Padded(), relu=nn.ReLU())).eval()
    quantizer = quantize(model)
    emulated = run(quantizer.model)
    transfer = to_tensorrt(quantizer.model)
    assert [(layer.name, layer.precision) for layer in transfer.layers] == [("conv", "int8")]
    exported = export(quantizer.model, tmp_path / "padded.onnx")
    assert snr_db(emulated, exported) > 35


def test_wide_codes_are_refused_by_their_width():
    model = Chain().eval()
    quantizer = PostTrainLinearQuantizer(
        model, 16, 16, model_activation_stats=collect_quant_stats(model, [IMAGES])
    )
    quantizer.prepare_model(IMAGES)
    with pytest.raises(ExportError, match="conv1: range-linear SYMMETRIC weights: 16 bits"):
        to_tensorrt(model)
