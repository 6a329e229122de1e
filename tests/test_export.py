import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import (
    ArgumentError,
    ExportError,
    calibrate_model,
    check_onnx,
    export_onnx,
    predict,
    rewire_operations,
    swap_modules,
)
from qdq.check import OnnxModel
from qdq.metrics import sqnr_db
from qdq.quantizer import QuantDescriptor, disable_quantization, named_quantizers


def graph_of(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def constants(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def nodes(graph, *kinds):
    return [node for node in graph.node if node.op_type in kinds]


def run(path, images):
    # Not ONNX Runtime's own defaults: its int8 kernels clamp sums in 16 bits on a CPU without VNNI.
    return OnnxModel(path, session="default")(images.numpy())[0]


def test_every_quantizer_becomes_a_pair(quantized, images, tmp_path):
    report = export_onnx(quantized, images, tmp_path / "model.onnx")
    graph = graph_of(report.path)
    assert len(nodes(graph, "QuantizeLinear")) == report.quantize_nodes == 3
    assert len(nodes(graph, "DequantizeLinear")) == report.dequantize_nodes == 6
    assert report.layers == {"stem": ["stem/Conv"], "conv": ["conv/Conv"], "head": ["head/Gemm"]}
    assert not nodes(graph, "BatchNormalization", "Identity")


def test_numbers_in_the_file_are_those_of_the_quantizers(quantized, images, tmp_path):
    graph = graph_of(export_onnx(quantized, images, tmp_path / "model.onnx").path)
    values = constants(graph)
    for name, quantizer in named_quantizers(quantized):
        scale, zero_point = values[f"{name}.scale"], values[f"{name}.zero_point"]
        np.testing.assert_array_equal(scale, quantizer.scale.numpy().reshape(scale.shape))
        assert scale.shape == (() if quantizer.axis is None else (quantizer.amax.numel(),))
        assert zero_point.dtype == np.int8
        assert zero_point.shape == scale.shape
        assert not zero_point.any()
    for name in ("stem", "conv", "head"):
        layer = quantized.get_submodule(name)
        scale = layer.weight_quantizer.scale
        codes = values[f"{name}.weight"]
        assert codes.dtype == np.int8
        expected = layer.weight_quantizer(layer.weight).detach()
        np.testing.assert_array_equal(torch.from_numpy(codes.copy()).float() * scale, expected)
    assert all(
        "axis" in {a.name for a in node.attribute}
        for node in nodes(graph, "QuantizeLinear", "DequantizeLinear")
    )


def test_amax_of_shape_one_is_written_as_scalar(quantized, images, tmp_path):
    quantized.conv.input_quantizer._amax = quantized.conv.input_quantizer._amax.reshape(1)
    graph = graph_of(export_onnx(quantized, images, tmp_path / "model.onnx").path)
    assert constants(graph)["conv._input_quantizer.scale"].shape == ()


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_same_numbers_in_onnx_runtime(quantized, images, tmp_path, weights):
    path = export_onnx(quantized, images, tmp_path / "model.onnx", weights=weights).path
    expected = predict(quantized, [images])
    report = check_onnx(path, expected=expected, found=predict(path, [images]))
    assert not [finding for finding in report.findings if finding.severity == "error"]
    assert report.parity.cosine > 1 - 1e-6
    np.testing.assert_allclose(run(path, images), expected, atol=0.05 * np.abs(expected).max())


def test_float_weights_are_kept_on_request(quantized, images, tmp_path):
    int8 = export_onnx(quantized, images, tmp_path / "int8.onnx")
    floats = export_onnx(quantized, images, tmp_path / "float.onnx", weights="float")
    assert floats.quantize_nodes == floats.dequantize_nodes == 6
    assert constants(graph_of(floats.path))["conv.weight"].dtype == np.float32
    assert int8.file_bytes < floats.file_bytes


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 23])
def test_opsets(quantized, images, tmp_path, opset):
    report = export_onnx(quantized, images, tmp_path / "model.onnx", opset=opset)
    assert {entry.domain: entry.version for entry in onnx.load(report.path).opset_import}[
        ""
    ] == opset
    np.testing.assert_allclose(
        run(report.path, images), predict(quantized, [images]), rtol=0.1, atol=0.05
    )


def test_batch_is_dynamic_by_default(quantized, images, tmp_path):
    report = export_onnx(quantized, images[:1], tmp_path / "model.onnx")
    assert report.inputs["images"][0] == "batch"
    for size in (1, 3, 7):
        assert run(report.path, torch.randn(size, 3, 12, 12)).shape == (size, 16)


def test_flags_among_the_inputs(tmp_path):
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x, scale=None):
            return self.layer(x) if scale is None else self.layer(x) * scale

    model, batch = Flagged(), {"x": torch.randn(2, 16), "scale": None}
    swap_modules(model, batch)
    calibrate_model(model, [batch])
    inputs = export_onnx(model, batch, tmp_path / "model.onnx").inputs
    assert inputs.keys() == {"x"}
    assert isinstance(inputs["x"][0], str)


def test_module_names_with_slashes(tmp_path):
    model, x = nn.Sequential(nn.ModuleDict({"a/b": nn.Linear(16, 16)})["a/b"]), torch.randn(2, 16)
    model.add_module("c/d", nn.Linear(16, 16))
    swap_modules(model)
    calibrate_model(model, [x])
    assert set(export_onnx(model, x, tmp_path / "model.onnx").layers) == {"0", "c/d"}


def test_static_batch(quantized, images, tmp_path):
    assert export_onnx(quantized, images, tmp_path / "m.onnx", dynamic_batch=False).inputs == {
        "images": [4, 3, 12, 12]
    }


def test_fixed_batch_is_refused_by_name(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32, 16)

        def forward(self, features):
            return self.head(features.reshape(4, 32))

    model, x = Fixed(), torch.randn(4, 4, 8)
    swap_modules(model)
    calibrate_model(model, [x])
    with pytest.raises(ExportError, match=r"batch|captur"):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, x, tmp_path / "model.onnx", dynamic_batch=False).file_bytes


def test_disabled_layers_leave_no_trace(quantized, images, tmp_path):
    disable_quantization(quantized.conv)
    report = export_onnx(quantized, images, tmp_path / "model.onnx")
    assert (report.quantize_nodes, report.dequantize_nodes) == (2, 4)
    assert "conv" not in report.layers
    assert constants(graph_of(report.path))["conv.weight"].dtype == np.float32


def test_subclass_with_padding(tmp_path):
    class SamePad(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride)

    model, x = nn.Sequential(SamePad(3, 8, 3, stride=2)), torch.randn(2, 3, 9, 9)
    swap_modules(model, x, include="*")
    calibrate_model(model, [x])
    path = export_onnx(model, x, tmp_path / "model.onnx").path
    graph = graph_of(path)
    (conv,) = nodes(graph, "Conv")
    # The quantizer stands before the padding, so that the exporter can fold the Pad into the convolution (R-CONV-6).
    assert next(list(a.ints) for a in conv.attribute if a.name == "pads") == [0, 0, 1, 1]
    assert [node.op_type for node in graph.node].count("Pad") == 0
    np.testing.assert_allclose(run(path, x), predict(model, [x]), atol=0.05)


def test_linear_over_a_sequence(tmp_path):
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(2, 5, 16)
    swap_modules(model)
    calibrate_model(model, [x])
    report = export_onnx(model, x, tmp_path / "model.onnx")
    assert set(report.layers) == {"0", "2"}
    np.testing.assert_allclose(run(report.path, x), predict(model, [x]), atol=0.05)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 1, 3), nn.Sequential(nn.Flatten(), nn.Linear(75, 1))]
)
def test_one_output_channel(tmp_path, layer):
    x = torch.randn(2, 3, 5, 5)
    swap_modules(layer, include="*")
    calibrate_model(layer, [x])
    path = export_onnx(layer, x, tmp_path / "model.onnx").path
    assert {
        tensor.shape for name, tensor in constants(graph_of(path)).items() if name.endswith("scale")
    } == {()}
    np.testing.assert_allclose(run(path, x), predict(layer, [x]), atol=0.05)


def test_dictionaries_and_pairs(quantized, images, tmp_path):
    for batch in ({"images": images}, (images, torch.zeros(4)), [images[:1]]):
        report = export_onnx(quantized, batch, tmp_path / "model.onnx")
        assert isinstance(report.inputs["images"][0], str)
        np.testing.assert_allclose(
            predict(report.path, [batch]), predict(quantized, [batch]), atol=0.05
        )


def test_a_module_used_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model, x = Twice(), torch.randn(4, 16)
    swap_modules(model)
    calibrate_model(model, [x])
    report = export_onnx(model, x, tmp_path / "model.onnx")
    assert len(report.layers["layer"]) == 2
    np.testing.assert_allclose(run(report.path, x), predict(model, [x]), atol=0.05)


def test_a_module_with_two_names(tmp_path):
    """torch knows it by the name it was called by, qdq by the first one."""

    class Inner(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.relu(self.layer(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.inner = Inner(self.layer)

        def forward(self, x):
            return self.inner(x)

    model, x = Outer(), torch.randn(4, 16)
    swap_modules(model)
    calibrate_model(model, [x])
    assert list(export_onnx(model, x, tmp_path / "model.onnx").layers) == ["layer"]


def test_exporting_changes_nothing_in_the_model(quantized, images, tmp_path):
    quantized.train()
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    export_onnx(quantized, images, tmp_path / "model.onnx")
    assert quantized.training
    assert all(torch.equal(state[name], tensor) for name, tensor in quantized.state_dict().items())


def test_no_path_of_the_machine_in_the_file(quantized, images, tmp_path):
    content = export_onnx(quantized, images, tmp_path / "model.onnx").path.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content
    assert onnx.load_from_string(content).producer_name == "qdq"


class TestRefused:
    def refused(self, model, images, tmp_path, words):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, images, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_without_amax(self, residual, images, tmp_path):
        swap_modules(residual)
        self.refused(
            residual, images, tmp_path, r"6 quantizers have no amax: stem\._input_quantizer"
        )

    def test_unsigned(self, residual, images, tmp_path):
        swap_modules(residual, input_desc=QuantDescriptor(unsigned=True))
        calibrate_model(residual, [images])
        self.refused(residual, images, tmp_path, r"stem\._input_quantizer cannot .*R-SYM")

    def test_four_bit(self, residual, images, tmp_path):
        swap_modules(residual, weight_desc=QuantDescriptor(4, axis=0))
        calibrate_model(residual, [images])
        self.refused(residual, images, tmp_path, "not 4 bit")

    @pytest.mark.parametrize("operand", ["input_desc", "weight_desc"])
    def test_narrow_range(self, residual, images, tmp_path, operand):
        axis = 0 if operand == "weight_desc" else None
        swap_modules(residual, **{operand: QuantDescriptor(axis=axis, narrow_range=True)})
        calibrate_model(residual, [images])
        self.refused(residual, images, tmp_path, "narrow_range")

    def test_still_calibrating(self, quantized, images, tmp_path):
        quantized.conv.input_quantizer.enable_calib()
        self.refused(quantized, images, tmp_path, r"calibrating.*conv\._input_quantizer")

    def test_bfloat16(self, images, tmp_path):
        model = nn.Conv2d(3, 16, 1).bfloat16()
        swap_modules(model)
        calibrate_model(model, [images.bfloat16()])
        self.refused(model, images.bfloat16(), tmp_path, "bfloat16")

    def test_broken_amax(self, quantized, images, tmp_path):
        quantized.conv.input_quantizer._amax.fill_(float("nan"))
        self.refused(quantized, images, tmp_path, "NaN")

    def test_model_that_torch_cannot_capture(self, images, tmp_path, capfd):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Conv2d(3, 16, 1)

            def forward(self, x):
                return self.layer(x) if x.sum() > 0 else self.layer(-x)

        model = Branch()
        swap_modules(model)
        calibrate_model(model, [images])
        self.refused(model, images, tmp_path, "torch.export cannot capture")
        assert capfd.readouterr() == ("", "")  # torch says hundreds of lines

    @pytest.mark.parametrize("option", [{"opset": 9}, {"weights": "int4"}])
    def test_options(self, quantized, images, tmp_path, option):
        with pytest.raises(ArgumentError, match=str(next(iter(option.values())))):
            export_onnx(quantized, images, tmp_path / "model.onnx", **option)

    def test_folder_that_cannot_be_written(self, quantized, images, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArgumentError, match="cannot write"):
            export_onnx(quantized, images, tmp_path / "file" / "model.onnx")


class TestNumbersThatHaveNoCode:
    """Refused before anything is captured, every one of them by name."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
        )
        swap_modules(model, include="*")
        calibrate_model(model, [torch.randn(2, 3, 12, 12)])
        return model

    def refuse(self, model, tmp_path):
        with pytest.raises(ExportError) as caught:
            export_onnx(model, torch.randn(2, 3, 12, 12), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    def test_all_at_once(self, model, tmp_path):
        with torch.no_grad():
            model[0].weight[1, 0, 0, 0] = torch.nan
            model[2].weight[0] = torch.inf
            model[4].bias[2] = torch.nan
        model[0]._input_quantizer.amax.fill_(-1.0)
        model[2]._input_quantizer.amax.fill_(torch.inf)
        model[4]._weight_quantizer._amax = torch.ones(3)
        message = self.refuse(model, tmp_path)
        for text in (
            "6 ranges and parameters",
            "0.weight holds 1 NaN or Inf",
            "2.weight holds 36 NaN",
            "4.bias holds 1 NaN",
            "0._input_quantizer has a negative amax, -1",
            "2._input_quantizer has an amax of NaN or Inf",
            "4._weight_quantizer has an amax of shape (3,), which does not fit axis 0 of its weight (4, 4, 3, 3)",
        ):
            assert text in message

    def test_several_ranges_of_a_quantizer_per_tensor(self, model, tmp_path):
        model[0]._input_quantizer._amax = torch.ones(3)
        assert "0._input_quantizer is per tensor and has 3 ranges" in self.refuse(model, tmp_path)

    @pytest.mark.parametrize("weights", ["int8", "float"])
    def test_weight_that_the_forward_computes(self, tmp_path, weights):
        class Standardized(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Conv2d(8, 8, 3)
                self.kernel = nn.Parameter(torch.randn(4, 8, 3, 3))

            def forward(self, x):
                mean, std = (
                    self.kernel.mean((1, 2, 3), keepdim=True),
                    self.kernel.std((1, 2, 3), keepdim=True),
                )
                return F.relu(F.conv2d(self.stem(x), (self.kernel - mean) / std)).mean((2, 3))

        model, images = Standardized().eval(), torch.randn(2, 8, 12, 12)
        swap_modules(model, include="*")
        rewire_operations(model, images, include="*")
        calibrate_model(model, [images])
        with torch.no_grad():
            model.kernel[0] = 0  # 0 / 0
        with pytest.raises(ExportError, match="NaN or Inf"):
            export_onnx(model, images, tmp_path / "model.onnx", weights=weights)
        assert not list(tmp_path.iterdir())

    def test_ranges_that_are_set_or_loaded(self, model):
        quantizer = model[0]._input_quantizer
        for bad in (-1.0, torch.nan, torch.inf):
            with pytest.raises(ArgumentError, match="NaN, Inf or a negative"):
                quantizer.amax = bad
            with pytest.raises(ArgumentError, match="NaN, Inf or a negative"):
                quantizer.load_state_dict({"_amax": torch.tensor(bad)})


class Printing(nn.Sequential):
    """Prints itself, as torch.export of torch 2.11 does."""

    def forward(self, x):
        assert "amax=" in repr(self)
        return super().forward(x)


def test_a_model_that_is_printed_while_it_is_captured(tmp_path):
    model, images = (
        Printing(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval(),
        torch.randn(2, 16, 8, 8),
    )
    swap_modules(model, include=["*"])
    calibrate_model(model, [images], method="max")
    file = export_onnx(model, images, tmp_path / "model.onnx").path
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert kinds == {"QuantizeLinear", "DequantizeLinear", "Conv", "Relu"}


class Attention(nn.Module):
    """Attention and a shortcut over a sequence."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens):
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(mixed + tokens)


class Recurrent(nn.Module):
    """Recurrent layers, whose list of weights is an attribute of their own, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 16)
        self.offset = torch.full((16,), 0.25)  # neither a parameter nor a buffer
        self.options = {"device": self.offset.device}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.offset = fn(self.offset)
        self.options = {"device": self.offset.device}
        return self

    def forward(self, tokens):
        states = self.gru(self.lstm(tokens)[0])[0] + self.offset
        return self.head(states + tokens + torch.ones(1, **self.options))


def make_calibrated(name, residual, gpu):
    """A model whose ranges were computed on the CPU, on the GPU, and an example there; no forward runs after that."""
    models = {
        "residual": residual,
        "attention": Attention().eval(),
        "recurrent": Recurrent().eval(),
    }
    shape = (4, 3, 12, 12) if name == "residual" else (2, 5, 16)
    batch = torch.randn(shape)
    model = models[name]
    swap_modules(model, batch)
    rewire_operations(model, batch)
    calibrate_model(model, [batch])
    return model.to(gpu), batch.to(gpu)


class TestOnTheGpu:
    """The file is that of the CPU, and the model stays on the device."""

    @pytest.mark.parametrize(
        ("name", "precision"), [("residual", "fp32"), ("attention", "fp32"), ("recurrent", "fp16")]
    )
    def test_the_same_bytes(self, name, precision, residual, gpu, tmp_path):
        model, batch = make_calibrated(name, residual, gpu)
        model.head.input_quantizer.learn_range()  # log2 of it differs by device, but is read on the CPU
        tensors = [*model.parameters(), *model.buffers()]
        export_onnx(model, batch, tmp_path / "gpu.onnx", precision=precision)
        for tensor, former in zip([*model.parameters(), *model.buffers()], tensors, strict=True):
            assert tensor is former
            assert tensor.device == gpu
        export_onnx(model.cpu(), batch, tmp_path / "cpu.onnx", precision=precision)
        assert (tmp_path / "gpu.onnx").read_bytes() == (tmp_path / "cpu.onnx").read_bytes()

    def test_calibrated_there_compiled_and_with_hooks(self, residual, images, gpu, tmp_path):
        model = residual.to(gpu)
        swap_modules(model, images)
        calibrate_model(model, [images])
        devices = set()
        model.conv.register_forward_hook(lambda module, *_: devices.add(module.weight.device.type))
        report = export_onnx(torch.compile(model), images, tmp_path / "model.onnx")
        assert report.quantize_nodes == 3
        assert devices == {"cpu"}

    def test_constants_that_no_module_holds_are_captured_there(
        self, residual, images, gpu, tmp_path
    ):
        model = residual.to(gpu)
        swap_modules(model, images)
        calibrate_model(model, [images])
        expected = predict(model, [images])
        factor = torch.full((1,), 2.0, device=gpu)
        model.head.register_forward_hook(lambda *arguments: arguments[-1] * factor)
        export_onnx(model, images, tmp_path / "model.onnx")
        outputs = predict(tmp_path / "model.onnx", [images])
        assert sqnr_db(2 * expected, outputs) > 60

    def test_a_refused_model_stays_there(self, residual, gpu, tmp_path):
        model, batch = make_calibrated("residual", residual, gpu)
        weight = model.conv.weight
        weight.data[0] = float("nan")
        with pytest.raises(ExportError, match="NaN"):
            export_onnx(model, batch, tmp_path / "model.onnx")
        assert model.conv.weight is weight
        assert weight.device == gpu

    def test_states_loaded_there(self, residual, images, gpu, tmp_path):
        """A state is loaded into quantizers that have no range yet, and exported without a forward."""
        twin = copy.deepcopy(residual).to(gpu)
        swap_modules(residual, images)
        calibrate_model(residual, [images])
        torch.save(residual.state_dict(), tmp_path / "state.pt")
        export_onnx(residual, images, tmp_path / "cpu.onnx")
        swap_modules(twin, images)
        twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert {tensor.device for tensor in twin.state_dict().values()} == {gpu}
        export_onnx(twin, images, tmp_path / "gpu.onnx")
        assert (tmp_path / "gpu.onnx").read_bytes() == (tmp_path / "cpu.onnx").read_bytes()
