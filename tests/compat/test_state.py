"""State that comes from elsewhere: pytorch-quantization's and ModelOpt's dictionaries, and whole pickled models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qdq import calibrate_model, export_onnx, predict, swap_modules
from qdq.compat import calib
from qdq.compat import nn as quant_nn
from qdq.errors import ExportError, ModelError


def build():
    return nn.Sequential(
        quant_nn.QuantConv2d(3, 4, 3), nn.Flatten(), quant_nn.QuantLinear(4 * 36, 5)
    ).eval()


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def calibrated(inputs):
    model = build()
    calibrate_model(model, [inputs], method="max")
    return model


def test_keys_are_those_of_pytorch_quantization(calibrated):
    added = set(calibrated.state_dict()) - set(build().state_dict())
    assert added == {
        f"{layer}._{which}_quantizer._amax" for layer in (0, 2) for which in ("input", "weight")
    }
    assert calibrated.state_dict()["0._weight_quantizer._amax"].shape == (4, 1, 1, 1)
    assert calibrated.state_dict()["0._input_quantizer._amax"].shape == ()


def test_state_moves_to_qdq_and_back(calibrated, inputs):
    core = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    swap_modules(core, include="*")
    core.load_state_dict(calibrated.state_dict())
    back = build()
    back.load_state_dict(core.state_dict())
    assert torch.equal(back(inputs), calibrated(inputs))
    torch.testing.assert_close(core(inputs), calibrated(inputs), atol=0.05, rtol=0)


def test_modelopt_state_loads(calibrated, inputs):
    theirs = {
        key.replace("._input_", ".input_").replace("._weight_", ".weight_"): value
        for key, value in calibrated.state_dict().items()
    }
    assert "0.input_quantizer._amax" in theirs
    model = build()
    model.load_state_dict(theirs)
    assert torch.equal(model(inputs), calibrated(inputs))
    assert "0.input_quantizer._amax" in theirs  # the caller's dictionary is as before


def test_modelopt_state_with_what_is_not_there_is_refused():
    theirs = {**build().state_dict(), "0.output_quantizer._amax": torch.tensor(1.0)}
    with pytest.raises(RuntimeError, match="output_quantizer"):
        build().load_state_dict(theirs)


def test_whole_model_pickled_elsewhere_is_refused(calibrated):
    again = pickle.loads(pickle.dumps(calibrated))  # noqa: S301  # our own
    assert set(again.state_dict()) == set(calibrated.state_dict())
    quantizer = quant_nn.TensorQuantizer()
    state = quantizer.__getstate__()
    del state["name"]  # as the original has it
    with pytest.raises(ModelError, match=r"pickled as a whole.*state_dict"):
        quant_nn.TensorQuantizer.__new__(quant_nn.TensorQuantizer).__setstate__(state)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_in_any_shape(shape):
    mine, theirs = (
        quant_nn.TensorQuantizer(),
        {"_amax": torch.full(shape, 2.0), "_pre_quant_scale": torch.full(shape, 3.0)},
    )
    mine.amax, mine.pre_quant_scale = 1.0, 1.0
    mine.load_state_dict(theirs)
    assert mine.amax.item() == 2.0
    assert mine.pre_quant_scale.item() == 3.0


class TestRangesOnAnotherAxis:
    """2.1 saved the ranges of transposed weights along the input channels, 2.2 along the output channels."""

    @pytest.fixture(params=[4, 6], ids=["other", "square"])
    def model(self, request):
        torch.manual_seed(0)
        layers = [quant_nn.QuantConvTranspose2d(6, request.param, 3), nn.ReLU()]
        return nn.Sequential(*layers, quant_nn.QuantConv2d(request.param, 4, 1)).eval()

    @pytest.fixture
    def inputs(self):
        return torch.randn(2, 6, 8, 8)

    @pytest.fixture(params=[True, False], ids=["calibrated", "fresh"])
    def loaded(self, request, model, inputs):
        """The model with a checkpoint of 2.1, over ranges of its own or not."""
        calibrated = copy.deepcopy(model)
        calibrate_model(calibrated, [inputs], method="max")
        checkpoint = calibrated.state_dict()
        checkpoint["0._weight_quantizer._amax"] = (
            model[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)
        )
        result = calibrated if request.param else model
        result.load_state_dict(checkpoint)
        return result

    def golden(self, model, inputs):
        """The transposed convolution with a scale for each input channel, in float64."""
        weight = model[0].weight.detach().double()
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
        x, bias = model[0]._input_quantizer(inputs).double(), model[0].bias.detach().double()
        return torch.nn.functional.conv_transpose2d(x, (weight / scale).round() * scale, bias)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("fb", [False, True])
    @pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
    def test_eager_and_file_agree(self, loaded, inputs, tmp_path, monkeypatch, caplog, fb, dynamo):
        monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", fb)
        with torch.no_grad():
            assert torch.allclose(
                loaded[0](inputs).double(), self.golden(loaded, inputs), atol=1e-5
            )
            expected = loaded(inputs)
        torch.onnx.export(loaded, inputs, tmp_path / "m.onnx", dynamo=dynamo)
        assert torch.allclose(
            torch.from_numpy(predict(tmp_path / "m.onnx", [inputs])), expected, atol=1e-5
        )
        assert "1 weights have ranges on another axis" in caplog.text
        assert "0._weight_quantizer" in caplog.text

    def test_export_for_tensorrt_refuses_and_new_ranges_mend_it(self, loaded, inputs, tmp_path):
        with pytest.raises(
            ExportError, match=r"axis 0, not on its output channels .* calibrate it again"
        ):
            export_onnx(loaded, inputs, tmp_path / "m.onnx")
        calib.calibrate_weights(loaded, "max")
        assert loaded[0]._weight_quantizer.amax.shape[1] == loaded[0].out_channels
        export_onnx(loaded, inputs, tmp_path / "m.onnx")

    def test_calibration_takes_the_axis_of_the_quantizer(self, loaded, inputs, tmp_path):
        calibrate_model(loaded, [inputs])
        export_onnx(loaded, inputs, tmp_path / "m.onnx")
