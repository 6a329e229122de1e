"""`torch.onnx.export` as scripts call it: both exporters, every opset, against ONNX Runtime."""

import io
import logging

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import qdq.compat as pytorch_quantization
from qdq import calibrate_model, export_onnx
from qdq.check import check_onnx
from qdq.compat import nn as quant_nn
from qdq.compat import onnx_export
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import ExportError, QdqError

EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
TensorQuantizer = quant_nn.TensorQuantizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


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
        (
            torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
            - expected
        )
        .abs()
        .max()
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
    assert not [f for f in check_onnx(tmp_path / "m.onnx").findings if f.severity == "error"]


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
    assert "QDQ123" in {finding.rule for finding in check_onnx(tmp_path / "m.onnx").findings}
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
        "Cast",
        "QuantizeLinear",
        "DequantizeLinear",
        "Cast",
    ]


@EXPORTERS
def test_zero_range_and_one_element_amax(inputs, tmp_path, dynamo):
    model = nn.Sequential(
        TensorQuantizer(QuantDescriptor(amax=0.0)), TensorQuantizer(QuantDescriptor(amax=[2.0]))
    ).eval()
    export(model, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=13)
    findings = check_onnx(tmp_path / "m.onnx").findings
    # Scales are positive and 0-D.
    assert not [finding for finding in findings if finding.severity == "error"]


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
    model = nn.Sequential(
        nn.ReLU(), TensorQuantizer(QuantDescriptor(unsigned=True, amax=2.0))
    ).eval()
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
    with (
        pytorch_quantization.enable_onnx_export(),
        pytest.raises(RuntimeError, match="4 quantizers have no amax"),
    ):
        network(inputs)


def test_stages_of_qdq_take_such_a_model(calibrated, inputs, tmp_path):
    report = export_onnx(calibrated, inputs, tmp_path / "m.onnx")
    assert (report.quantize_nodes, report.dequantize_nodes) == (2, 4)
    assert difference(tmp_path / "m.onnx", calibrated, inputs) < 1e-5


@EXPORTERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_their_names(calibrated, inputs, tmp_path, dynamo, dtype):
    half = calibrated.to(dtype)
    before = {name: weight.clone() for name, weight in half.named_parameters()}
    path = tmp_path / "m.onnx"
    torch.onnx.export(half, inputs.to(dtype), path, dynamo=dynamo, opset_version=17)
    model = onnx.load(path)
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {"conv.weight", "head.weight"} <= quantized & {
        value.name for value in model.graph.initializer
    }
    assert all(
        weight.dtype == dtype and torch.equal(weight, before[name])
        for name, weight in half.named_parameters()
    )
    assert not any("_export_dtype" in vars(module) for module in half.modules())
    if dtype == torch.float16:
        assert difference(path, half, inputs.half()) < 2e-2


@EXPORTERS
def test_parallel_layers_keep_their_own_pairs_before_calibration(
    inputs, tmp_path, dynamo, fb_fake_quant
):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = quant_nn.QuantConv2d(3, 4, 1), quant_nn.QuantConv2d(3, 4, 1)

        def forward(self, x):
            x = torch.relu(x)
            return self.a(x) + self.b(x)

    model = export(Fork().eval(), inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=13)
    assert count(model, "QuantizeLinear") == 4


@EXPORTERS
@pytest.mark.parametrize(("asked", "written"), [(13, 13), (17, 17), (20, 20)])
def test_a_model_with_all_quantizers_disabled_gets_the_opset_asked_for(
    calibrated, inputs, tmp_path, dynamo, asked, written
):
    for module in calibrated.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    model = export(calibrated, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=asked)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [written]
    assert count(model, "QuantizeLinear") == 0


def test_an_export_bound_before_the_import(calibrated, inputs, tmp_path):
    with pytest.raises(RuntimeError, match=r"import qdq\.compat first"):
        onnx_export._torch_export(calibrated, (inputs,), tmp_path / "m.onnx", dynamo=False)
    onnx_export._torch_export(calibrated, (inputs,), tmp_path / "m.onnx", opset_version=18)
    assert count(onnx.load(tmp_path / "m.onnx"), "QuantizeLinear") == 4
    assert difference(tmp_path / "m.onnx", calibrated, inputs) < 1e-5


def test_uncalibrated_into_an_open_file(network, inputs, tmp_path, fb_fake_quant):
    with open(tmp_path / "m.onnx", "wb") as file:
        torch.onnx.export(network, (inputs,), file, dynamo=False)
    assert {finding.rule for finding in check_onnx(tmp_path / "m.onnx").findings} >= {"QDQ123"}


@EXPORTERS
def test_narrow_range_of_a_shared_quantizer_looks_at_every_weight(inputs, tmp_path, dynamo):
    narrow = QuantDescriptor(axis=0, narrow_range=True)
    model = nn.Sequential(
        *(quant_nn.QuantConv2d(3, 3, 1, quant_desc_weight=narrow) for _ in range(2))
    ).eval()
    model[1]._weight_quantizer = model[0]._weight_quantizer
    calibrate_model(model, [inputs], method="max")
    wide, tight = (0, 1) if model[0].weight.abs().max() > model[1].weight.abs().max() else (1, 0)
    with torch.no_grad():
        model[wide].weight.mul_(
            2 * model[0]._weight_quantizer.amax.max() / model[tight].weight.abs().max()
        )
    with pytest.raises(ExportError, match="narrow_range"):
        torch.onnx.export(model, inputs, tmp_path / "m.onnx", dynamo=dynamo)


def test_ranges_that_do_not_belong_to_the_axis(inputs, tmp_path):
    flat = QuantDescriptor(axis=0, amax=[0.05, 0.1, 0.2])
    model = nn.Sequential(quant_nn.QuantConv2d(3, 3, 3, quant_desc_weight=flat)).eval()
    model[0]._input_quantizer.amax = 3.0
    export(model, inputs, tmp_path / "m.onnx")
    # A flat list means the axis, in both.
    assert difference(tmp_path / "m.onnx", model, inputs) < 1e-5

    model[0]._weight_quantizer = TensorQuantizer(QuantDescriptor())
    model.load_state_dict(
        {**model.state_dict(), "0._weight_quantizer._amax": torch.ones(3, 1, 1, 1)}, strict=False
    )
    with pytest.raises(RuntimeError, match=r"0\._weight_quantizer is per tensor and has 3 ranges"):
        torch.onnx.export(model, inputs, tmp_path / "m.onnx")


def test_words_for_an_opset(calibrated, inputs, tmp_path):
    with pytest.raises(TypeError, match="opset_version is '13'"):
        torch.onnx.export(calibrated, inputs, tmp_path / "m.onnx", opset_version="13")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "descriptor",
    [
        QuantDescriptor(amax=2.0),
        QuantDescriptor(num_bits=(4, 3), amax=2.0),
        QuantDescriptor(fake_quant=False, amax=2.0),
        QuantDescriptor(num_bits=20, amax=2.0),
        QuantDescriptor(axis=(0, 1)),
    ],
    ids=str,
)
def test_captured_equals_eager(descriptor, inputs):
    quantizer = TensorQuantizer(descriptor)
    expected = quantizer(inputs)
    torch.testing.assert_close(torch.jit.trace(quantizer, inputs)(inputs), expected)
    for strict in (True, False):
        torch.testing.assert_close(
            torch.export.export(quantizer, (inputs,), strict=strict).module()(inputs), expected
        )


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_and_traced_with_gradients(calibrated, inputs):
    expected = calibrated(inputs)
    torch.testing.assert_close(torch.compile(calibrated, backend="eager")(inputs), expected)
    torch.testing.assert_close(torch.jit.trace(calibrated, inputs)(inputs), expected)


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12",
    reason="torch 2.11 cannot follow a deletion from a module's __dict__",
)
def test_a_model_compiled_as_one_graph(calibrated, inputs):
    compiled = torch.compile(calibrated, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), calibrated(inputs))


class DeadChannel(nn.Module):
    """A channel of zeros with a bias, in front of another quantizer: ONNX Runtime makes its bias an int32."""

    def __init__(self):
        super().__init__()
        self.conv = quant_nn.QuantConv2d(3, 8, 3)
        self.up = quant_nn.QuantConvTranspose2d(8, 8, 3)
        self.head = quant_nn.QuantConv2d(8, 4, 1)
        with torch.no_grad():
            self.conv.weight[1] = 0
            self.up.weight[:, 1] = 0
            self.conv.bias[1] = self.up.bias[1] = 0.7

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.relu(self.conv(x)))))


@EXPORTERS
@pytest.mark.parametrize("opset", [13, 19])
def test_dead_channel_in_onnxruntimes_default_session(inputs, tmp_path, dynamo, opset):
    model = DeadChannel().eval()
    calibrate_model(model, [inputs], method="max")
    export(model, inputs, tmp_path / "m.onnx", dynamo=dynamo, opset_version=opset)
    assert difference(tmp_path / "m.onnx", model, inputs) < 0.01
    buffer = io.BytesIO()
    torch.onnx.export(model, inputs, buffer, dynamo=dynamo, opset_version=opset)
    assert difference(buffer.getvalue(), model, inputs) < 0.01
    assert not [
        f for f in check_onnx(tmp_path / "m.onnx").findings if f.rule in ("QDQ101", "QDQ140")
    ]


def test_small_models_are_one_file(calibrated, inputs, tmp_path):
    path = tmp_path / "m.onnx"
    torch.onnx.export(calibrated, inputs, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    moved = path.rename(tmp_path / "moved.onnx")
    assert difference(moved, calibrated, inputs) < 1e-5


def test_weights_go_beside_a_file_that_is_too_large_or_where_a_script_asks_for_it(
    calibrated, inputs, tmp_path, monkeypatch
):
    torch.onnx.export(calibrated, inputs, tmp_path / "asked.onnx", external_data=True)
    assert (tmp_path / "asked.onnx.data").exists()
    monkeypatch.setattr("qdq.graph.save._ONE_FILE_BYTES", 1000)
    monkeypatch.setattr("qdq.graph.save._EXTERNAL_BYTES", 100)
    torch.onnx.export(calibrated, inputs, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").exists()
    for name in ("asked", "large"):
        assert difference(tmp_path / f"{name}.onnx", calibrated, inputs) < 1e-5


@EXPORTERS
@pytest.mark.parametrize("fb", [False, True])
def test_numbers_that_have_no_code_are_refused_all_at_once(
    calibrated, inputs, tmp_path, monkeypatch, dynamo, fb
):
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", fb)
    with torch.no_grad():
        calibrated.conv.weight[0, 0, 0, 0] = torch.nan
        calibrated.head.bias[1] = torch.inf
    calibrated.conv._input_quantizer._amax.fill_(-1.0)
    calibrated.head._input_quantizer.load_state_dict({"_amax": torch.tensor(torch.inf)})
    calibrated.head._weight_quantizer._amax = torch.ones(3, 1)
    with pytest.raises(ExportError) as caught:
        torch.onnx.export(calibrated, inputs, tmp_path / "m.onnx", dynamo=dynamo)
    for text in (
        "5 ranges and parameters",
        "conv.weight holds 1 NaN or Inf",
        "head.bias holds 1 NaN or Inf",
        "conv._input_quantizer has a negative amax, -1",
        "head._input_quantizer has an amax of NaN or Inf",
        "head._weight_quantizer has an amax of shape (3, 1), which does not fit axis 0 of its weight (5, 8)",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_model_on_the_gpu_gives_the_file_of_the_cpu(dynamo, gpu, tmp_path):
    model = nn.Sequential(quant_nn.QuantConv2d(3, 4, 3), nn.ReLU(), quant_nn.QuantLinear(4, 4))
    for quantizer in model.modules():
        if isinstance(quantizer, quant_nn.TensorQuantizer):
            quantizer.amax = 1.3 if quantizer.axis is None else [0.7] * 4
    model, inputs = model.to(gpu).eval(), torch.randn(2, 3, 6, 6).to(gpu)
    weight = model[0].weight
    torch.onnx.export(model, (inputs,), tmp_path / "gpu.onnx", dynamo=dynamo)
    assert model[0].weight is weight
    assert weight.device == gpu
    torch.onnx.export(model.cpu(), (inputs.cpu(),), tmp_path / "cpu.onnx", dynamo=dynamo)
    assert (tmp_path / "gpu.onnx").read_bytes() == (tmp_path / "cpu.onnx").read_bytes()
