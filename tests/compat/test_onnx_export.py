"""`torch.onnx.export` as scripts call it: both exporters, every opset, against ONNX Runtime."""

import io
import logging

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qdq.compat as pytorch_quantization
from qdq import calibrate_model, export_onnx
from qdq.check import check_onnx
from qdq.compat import nn as quant_nn
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import ExportError, QdqError

EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
TensorQuantizer = quant_nn.TensorQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = quant_nn.QuantConv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = quant_nn.QuantLinear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def network():
    return Network().eval()


@pytest.fixture
def calibrated(network, inputs):
    calibrate_model(network, [inputs], method="max")
    return network


@pytest.fixture
def fb_fake_quant(monkeypatch):
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)


def export(model, inputs, path, **options):
    torch.onnx.export(model, inputs, path, **options)
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path)


def difference(path, model, inputs):
    session = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        expected = model(inputs)
    return (
        (torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]) - expected).abs().max()
    )


def count(model, kind):
    return sum(node.op_type == kind for node in model.graph.node)


@EXPORTERS
@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_every_opset(calibrated, inputs, tmp_path, dynamo, opset):
    model = export(calibrated, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=opset)
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    assert count(model, "QuantizeLinear") == count(model, "DequantizeLinear") == 4
    assert {"conv.weight", "head.weight"} <= {value.name for value in model.graph.initializer}
    assert difference(tmp_path / "m.onnx", calibrated, inputs) < 1e-5
    assert not check_onnx(tmp_path / "m.onnx").findings


@EXPORTERS
def test_opset_below_13_names_the_one_that_can(calibrated, inputs, tmp_path, dynamo):
    with pytest.raises(ExportError, match="opset_version=13"):
        torch.onnx.export(calibrated, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=12)
    assert not (tmp_path / "m.onnx").exists()


@EXPORTERS
@pytest.mark.parametrize("switch", [False, True])
def test_uncalibrated_is_one_error_that_names_all(network, inputs, tmp_path, dynamo, switch):
    network.head._input_quantizer.disable()
    context = pytorch_quantization.enable_onnx_export() if switch else torch.no_grad()
    with context, pytest.raises(RuntimeError, match="3 quantizers have no amax") as caught:
        torch.onnx.export(network, inputs, tmp_path / "m.onnx", dynamo=dynamo)
    assert isinstance(caught.value, QdqError)
    assert "load_calib_amax" in str(caught.value)
    assert "head._input_quantizer" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()
    assert TensorQuantizer._enable_onnx_export is False


@EXPORTERS
def test_uncalibrated_structure(network, inputs, tmp_path, dynamo, fb_fake_quant, caplog):
    with caplog.at_level(logging.WARNING, "qdq"):
        model = export(network, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=13)
    assert sum("4 quantizers have no amax" in record.message for record in caplog.records) == 1
    assert count(model, "QuantizeLinear") == 4
    assert difference(tmp_path / "m.onnx", network, inputs) < 1e-5
    assert "QDQ120" in {finding.rule for finding in check_onnx(tmp_path / "m.onnx").findings}
    assert "_amax" not in "".join(network.state_dict())  # the model is as before
    assert all("_export_constants" not in vars(module) for module in network.modules())


@EXPORTERS
def test_half_and_disabled_and_shared(calibrated, inputs, tmp_path, dynamo):
    calibrated.head._weight_quantizer.disable()
    model = export(calibrated, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=17)
    assert count(model, "QuantizeLinear") == 3
    half = quant_nn.TensorQuantizer(QuantDescriptor(amax=2.0)).eval()
    model = export(half, inputs.half(), tmp_path / "h.onnx", dynamo=dynamo, opset_version=17)
    assert [node.op_type for node in model.graph.node if node.op_type != "Constant"] == [
        "Cast", "QuantizeLinear", "DequantizeLinear", "Cast",
    ]  # fmt: skip


@EXPORTERS
def test_zero_range_and_one_element_amax(inputs, tmp_path, dynamo):
    model = nn.Sequential(
        TensorQuantizer(QuantDescriptor(amax=0.0)), TensorQuantizer(QuantDescriptor(amax=[2.0]))
    ).eval()
    export(model, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=13)
    assert not check_onnx(tmp_path / "m.onnx").findings  # scales are positive and 0-D


def test_fp8_from_opset_19(inputs, tmp_path):
    model = nn.Sequential(TensorQuantizer(QuantDescriptor(num_bits=(4, 3), amax=2.0))).eval()
    export(model, inputs, tmp_path / "m.onnx", opset_version=19)
    assert difference(tmp_path / "m.onnx", model, inputs) < 1e-6
    with pytest.raises(ExportError, match="opset_version=19"):
        torch.onnx.export(model, inputs, tmp_path / "n.onnx", opset_version=18)
    with pytest.raises(ExportError, match="dynamo=True"):
        torch.onnx.export(model, inputs, tmp_path / "n.onnx", opset_version=19, dynamo=False)


@pytest.mark.parametrize(
    ("descriptor", "error", "found"),
    [
        (QuantDescriptor(num_bits=4, amax=1.0), ExportError, "4 bits"),
        (QuantDescriptor(axis=(0, 1)), TypeError, "keeps the axes"),
        (QuantDescriptor(fake_quant=False, amax=1.0), ExportError, "fake_quant=False"),
        (QuantDescriptor(narrow_range=True, amax=1.0), ExportError, "narrow_range"),
    ],
)
def test_what_onnx_cannot_express(inputs, tmp_path, descriptor, error, found):
    model = nn.Sequential(TensorQuantizer(descriptor)).eval()
    with pytest.raises(error, match=found) as caught:
        torch.onnx.export(model, inputs, tmp_path / "m.onnx")
    assert isinstance(caught.value, QdqError)
    assert not (tmp_path / "m.onnx").exists()


def test_narrow_weights_inside_their_range_are_written(calibrated, inputs, tmp_path):
    calibrated.conv._weight_quantizer.narrow_range = True
    export(calibrated, inputs, tmp_path / "m.onnx")
    assert difference(tmp_path / "m.onnx", calibrated, inputs) < 1e-5
    calibrated.conv._weight_quantizer._amax.mul_(0.5)
    with pytest.raises(ExportError, match="narrow_range"):
        torch.onnx.export(calibrated, inputs, tmp_path / "m.onnx")


def test_unsigned_is_said(inputs, tmp_path, caplog):
    model = nn.Sequential(nn.ReLU(), TensorQuantizer(QuantDescriptor(unsigned=True, amax=2.0))).eval()
    with caplog.at_level(logging.WARNING, "qdq"):
        export(model, inputs, tmp_path / "m.onnx")
    assert "uint8" in caplog.text
    assert difference(tmp_path / "m.onnx", model, inputs) < 1e-6


def test_collecting_is_said(calibrated, inputs, tmp_path, caplog):
    calibrated.conv._input_quantizer.enable_calib()
    with caplog.at_level(logging.WARNING, "qdq"):
        torch.onnx.export(calibrated, inputs, tmp_path / "m.onnx")
    assert "still collecting: conv._input_quantizer" in caplog.text


@EXPORTERS
def test_into_memory(network, inputs, dynamo, fb_fake_quant):
    buffer = io.BytesIO()
    torch.onnx.export(network, inputs, buffer, dynamo=dynamo, opset_version=13)
    model = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(model)
    assert "qdq.uncalibrated" in {entry.key for entry in model.metadata_props}


def test_float_models_pass_through(inputs, tmp_path):
    program = torch.onnx.export(nn.Conv2d(3, 4, 1).eval(), (inputs,), tmp_path / "m.onnx")
    assert program.model.graph
    assert torch.onnx.export.__name__ == "export"


def _fail_in_nested_blocks():
    with pytorch_quantization.enable_onnx_export():
        with pytorch_quantization.enable_onnx_export():
            pass
        assert TensorQuantizer._enable_onnx_export
        raise ZeroDivisionError


def test_enable_onnx_export_nests_and_survives_exceptions(network, inputs):
    with pytest.raises(ZeroDivisionError):
        _fail_in_nested_blocks()
    assert not TensorQuantizer._enable_onnx_export
    with pytorch_quantization.enable_onnx_export(), pytest.raises(RuntimeError, match="4 quantizers have no amax"):
        network(inputs)


def test_stages_of_qdq_take_such_a_model(calibrated, inputs, tmp_path):
    report = export_onnx(calibrated, inputs, tmp_path / "m.onnx")
    assert (report.quantize_nodes, report.dequantize_nodes) == (2, 4)
    assert difference(tmp_path / "m.onnx", calibrated, inputs) < 1e-5
