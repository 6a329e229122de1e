"""FP8 files: what is stored, and their values in ONNX Runtime against torch."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qdq
from qdq import ArgumentError
from qdq.check.parity import OnnxModel, has_fp8
from qdq.metrics import sqnr_db
from qdq.nn import QuantLinear


@pytest.fixture
def network():
    """Two convolutions, a Relu before a Q, and a linear layer, quantized to FP8."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 32),
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    qdq.swap_modules(model, x, formats=("fp8",))
    qdq.calibrate_model(model, [x], method="max")
    return model, x


def load(path):
    graph = onnx.load(path).graph
    return graph, {tensor.name: tensor for tensor in graph.initializer}


@pytest.mark.parametrize(("input_bits", "weight_bits"), [((4, 3), 8), (8, (4, 3))])
def test_a_layer_of_two_formats_is_refused(input_bits, weight_bits, tmp_path):
    layer = QuantLinear(
        32,
        32,
        quant_desc_input=qdq.QuantDescriptor(num_bits=input_bits),
        quant_desc_weight=qdq.QuantDescriptor(num_bits=weight_bits),
    )
    model = nn.Sequential(layer).eval()
    x = torch.randn(4, 32)
    qdq.calibrate_model(model, [x], method="max")
    with pytest.raises(qdq.ExportError, match=r"different formats: 0 \(fp8 and int8\)"):
        qdq.export_onnx(model, x, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_what_is_stored(network, tmp_path):
    model, x = network
    exported = qdq.export_onnx(model, x, tmp_path / "m.onnx", precision="fp32")
    graph, constants = load(exported.path)
    assert (exported.opset, exported.quantize_nodes, exported.dequantize_nodes) == (19, 3, 6)
    for name in ("0", "2", "5"):
        layer = model.get_submodule(name)
        for quantizer in ("_input_quantizer", "_weight_quantizer"):
            zero_point = constants[f"{name}.{quantizer}.zero_point"]
            assert zero_point.data_type == TensorProto.FLOAT8E4M3FN
            scale = numpy_helper.to_array(constants[f"{name}.{quantizer}.scale"])
            assert scale == layer.get_submodule(quantizer).amax.numpy() / np.float32(448)
            assert scale.shape == ()
        weight = constants[f"{name}.weight"]
        assert weight.data_type == TensorProto.FLOAT8E4M3FN
        ratio = layer.weight.detach().numpy() / layer.weight_quantizer.scale.numpy()
        expected = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        codes = numpy_helper.to_array(weight)
        np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert "0._input_quantizer" in json.loads(metadata["qdq.fp8"])
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 3


@pytest.mark.parametrize("axis", [None, 0])
def test_onnx_runtime_gives_the_numbers_of_torch(network, tmp_path, axis):
    model, x = network
    qdq.restore_modules(model)
    weight_desc = qdq.QuantDescriptor(num_bits=(4, 3), axis=axis)
    qdq.swap_modules(model, x, formats=("fp8",), weight_desc=weight_desc)
    qdq.calibrate_model(model, [x], method="max")
    path = qdq.export_onnx(model, x, tmp_path / "m.onnx", precision="fp32").path
    expected = model(x).detach().numpy()
    for session in ("plain", "default"):
        assert sqnr_db(expected, OnnxModel(path, session=session)(x.numpy())[0]) > 100


def test_the_rest_is_fp16_by_default(network, tmp_path):
    model, x = network
    exported = qdq.export_onnx(model, x, tmp_path / "m.onnx")
    assert exported.remainder == "fp16"
    _, constants = load(exported.path)
    assert constants["0.bias"].data_type == TensorProto.FLOAT16
    expected = model(x).detach().numpy()
    output = qdq.predict(exported.path, [x])
    floor = qdq.measure_tie_floor(model, [x], precision="fp16")
    assert sqnr_db(expected, output) > min(30, floor - 3)


FUNCTION = """
<ir_version: 10, opset_import: ["" : 19, "local" : 1]>
g (float[4] x) => (float[4] y)
<float s = {0.01}%s> { y = local.round(x%s) }
<domain: "local", opset_import: ["" : 19]>
round (x%s) => (y)
{
    s = Constant <value_float = 0.01> ()
    %s
    q = QuantizeLinear (x, s, z)
    y = DequantizeLinear (q, s, z)
}
"""


@pytest.mark.parametrize("is_argument", [True, False])
def test_fp8_in_a_function_is_seen(is_argument, tmp_path):
    zero = "z = Constant <value = float8e4m3fn {0}> ()"
    parts = (", float8e4m3fn z = {0}", ", z", ", z", "") if is_argument else ("", "", "", zero)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(FUNCTION % parts), path)
    assert has_fp8(path)


def test_the_default_session_is_not_measured(network, tmp_path):
    """Both sessions of qdq run an FP8 file alike, so there is nothing to compare."""
    model, x = network
    path = qdq.export_onnx(model, x, tmp_path / "m.onnx").path
    plain, default = (qdq.predict(path, [x], session=session) for session in ("plain", "default"))
    report = qdq.check_onnx(path, expected=plain, found=plain, found_default=default)
    assert report.parity is not None
    assert report.default_parity is None
    assert "default session against" not in report.format_table()


def test_int8_stays_fp32_by_default(network, tmp_path):
    model, x = network
    qdq.restore_modules(model)
    qdq.swap_modules(model, x)
    qdq.calibrate_model(model, [x], method="max")
    exported = qdq.export_onnx(model, x, tmp_path / "m.onnx")
    assert exported.remainder == "fp32"
    assert not has_fp8(exported.path)


def test_lower_opsets_are_refused(network, tmp_path):
    model, x = network
    with pytest.raises(ArgumentError, match=r"opset 18 has no FP8, which 6 quantizers use"):
        qdq.export_onnx(model, x, tmp_path / "m.onnx", opset=18)


def test_scales_are_normal_numbers_of_float16(network, tmp_path):
    model, x = network
    qdq.restore_modules(model)
    with torch.no_grad():
        model[5].weight.mul_(1e-2)
    qdq.swap_modules(model, x, formats=("fp8",))
    qdq.calibrate_model(model, [x], method="max")
    assert model[5].weight_quantizer.scale == 2.0**-14
    exported = qdq.export_onnx(model, x, tmp_path / "m.onnx")
    assert not exported.precision.kept


@pytest.mark.parametrize("session", ["plain", "default"])
def test_a_relu_before_a_quantizer_stays(tmp_path, session):
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.01])
    zero_point = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [scale, zero_point])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.array([-2, -1, 1, 2], np.float32)
    (y,) = OnnxModel(tmp_path / "m.onnx", session=session)(x)
    np.testing.assert_allclose(y, [0, 0, 0.96, 1.92], rtol=1e-6)


def test_what_fp8_has_no_kernel_for_stays_float():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 7, 2), nn.AvgPool2d(2), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)
    )
    plan = qdq.plan_swap(model, torch.randn(1, 3, 64, 64), formats=("fp8",))
    reasons = {module.name: module.reason for module in plan.of("float")}
    assert "kernel 7 x 7" in reasons["0"]
    assert "products in FP8" in reasons["1"]
    assert "2" not in reasons


@pytest.mark.parametrize("formats", ["fp8", (), ("int4",), ("int8", "int8")])
def test_other_formats_are_refused(formats):
    with pytest.raises(qdq.QdqError, match="formats is"):
        qdq.plan_swap(nn.Linear(8, 8), formats=formats)


class RelativeAttention(nn.Module):
    """Attention of 6 heads with a bias from a table, as in Swin."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(192, 576)
        self.table = nn.Parameter(torch.randn(169, 6))
        self.register_buffer("index", torch.randint(169, (49 * 49,)))

    def forward(self, x):
        query, key, value = self.qkv(x).reshape(-1, 49, 3, 6, 32).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(49, 49, -1).permute(2, 0, 1).unsqueeze(0)
        scores = query @ key.transpose(-2, -1) + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.trt
def test_attention_with_a_bias_from_a_table_is_one_kernel(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    model = RelativeAttention().eval()
    x = torch.randn(2, 49, 192)
    qdq.swap_modules(model, x, formats=("fp8",))
    qdq.rewire_operations(model, x, formats=("fp8",))
    qdq.calibrate_model(model, [x], method="max")
    path = qdq.export_onnx(model, x, tmp_path / "m.onnx").path
    (attention,) = qdq.build_engine(path, backend="rtx", sm=89).attention
    assert attention.is_fused
