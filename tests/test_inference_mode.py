"""What is made inside of `torch.inference_mode` can be loaded, calibrated and trained outside of it."""

import copy

import pytest
import torch
from torch import nn

import qdq
import qdq.compat as pytorch_quantization
from qdq.compat import nn as quant_nn
from qdq.compat.tensor_quant import QuantDescriptor


def make_float():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()


def make_calibrated(batches):
    model = make_float()
    qdq.swap_modules(model, include="*")
    qdq.calibrate_model(model, batches)
    return model


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 12, 12) for _ in range(2)]


def require_usable(model, batch):
    """No tensor of the model is bound to the mode: a state dict can be loaded, and a step of SGD be done."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not [name for name, tensor in tensors.items() if tensor.is_inference()]
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model(batch).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_fold_swap_and_calibrate(batches):
    model = make_float()
    with torch.inference_mode():
        qdq.fold_batchnorm(model, batches[0])
        qdq.swap_modules(model, include="*")
        qdq.rewire_operations(model, batches[0])
        qdq.calibrate_model(model, [batch + 0 for batch in batches])
    require_usable(model, batches[0])


def test_ranges_set_again_and_by_hand(batches):
    model = make_calibrated(batches)
    fresh = make_float()
    qdq.swap_modules(fresh, include="*")
    with torch.inference_mode():
        model[0]._input_quantizer.amax = 2.0
        model[3]._weight_quantizer.learn_range()
        model[3]._weight_quantizer.keep_range()
        fresh.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
        fresh[3]._weight_quantizer.learn_range()
    require_usable(model, batches[0])
    require_usable(fresh, batches[0])


def test_corrected_bias_rounded_and_equalized_weights(batches):
    equalized, corrected, rounded = make_float(), make_calibrated(batches), make_calibrated(batches)
    expected = copy.deepcopy(rounded)
    qdq.round_weights(expected, batches)
    with torch.inference_mode():
        qdq.equalize_layers(equalized, batches)
        qdq.split_channels(equalized, batches, extra_macs=3.0)
        qdq.correct_bias(corrected, batches)
        qdq.round_weights(rounded, batches)
    for name, values in expected.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], values), name
    assert corrected[0].bias is not None
    require_usable(equalized, batches[0])
    require_usable(corrected, batches[0])
    require_usable(rounded, batches[0])


def test_a_model_made_there_is_exported_outside(batches, tmp_path):
    model = make_calibrated(batches)
    expected = qdq.export_onnx(model, batches[0], tmp_path / "expected.onnx").path
    with torch.inference_mode():
        copied, converted, built = (
            copy.deepcopy(model),
            copy.deepcopy(model).double().float(),
            make_calibrated(batches),
        )
    for name, twin in {"copied": copied, "converted": converted, "built": built}.items():
        assert twin[0].weight.is_inference()
        path = qdq.export_onnx(twin, batches[0], tmp_path / f"{name}.onnx", precision="fp16").path
        assert qdq.export_onnx(twin, batches[0], path).path.read_bytes() == expected.read_bytes(), (
            name
        )
    with torch.inference_mode():
        copied[0].weight[0] = float("nan")
    with pytest.raises(qdq.ExportError, match="holds 27 NaN"):
        qdq.export_onnx(copied, batches[0], tmp_path / "nan.onnx")


def test_an_estimate_says_that_it_needs_gradients(batches):
    model = make_calibrated(batches)
    with torch.inference_mode():
        built = make_calibrated(batches)
        assert qdq.analyze_layers(model, batches).layers
        with pytest.raises(qdq.StateError, match="inference_mode"):
            qdq.analyze_layers(model, batches, confirm=1)
    with pytest.raises(qdq.StateError, match="inference_mode"):
        qdq.analyze_layers(built, batches, confirm=1)
    assert qdq.analyze_layers(model, batches, confirm=1).layers


def test_a_loaded_model(tmp_path):
    module = qdq.load_model("squeezenet1_1", "random").module
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    with torch.inference_mode():
        modules = [
            qdq.load_model("squeezenet1_1", weights).module
            for weights in ("random", str(tmp_path / "weights.pt"))
        ]
    for twin in modules:
        assert all(
            torch.equal(parameter, value)
            for parameter, value in zip(twin.parameters(), module.parameters(), strict=True)
        )
        require_usable(twin, torch.randn(2, 3, 64, 64))


def test_imported_ranges(batches, tmp_path):
    model = make_calibrated(batches)
    onnx = qdq.export_onnx(model, batches[0], tmp_path / "model.onnx").path
    fresh = make_float()
    qdq.swap_modules(fresh, include="*")
    with torch.inference_mode():
        qdq.import_ranges(fresh, onnx)
    assert torch.equal(
        fresh[3]._weight_quantizer.scale.flatten(), model[3]._weight_quantizer.scale.flatten()
    )
    require_usable(fresh, batches[0])


@pytest.mark.parametrize("method", ["max", "histogram"])
def test_compat(batches, method):
    descriptor = QuantDescriptor(calib_method=method)
    model = nn.Sequential(
        quant_nn.QuantConv2d(3, 8, 3, quant_desc_input=descriptor), quant_nn.QuantConv2d(8, 4, 1)
    )
    quantizers = [
        module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)
    ]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.inference_mode():
        model(batches[0] + 0)
    model(batches[1])
    with torch.inference_mode():
        for quantizer in quantizers:
            quantizer.enable_quant()
            quantizer.disable_calib()
            is_histogram = isinstance(
                quantizer._calibrator, pytorch_quantization.calib.HistogramCalibrator
            )
            quantizer.load_calib_amax(**({"method": "mse"} if is_histogram else {}))
            quantizer._amax = quantizer._amax.to("cpu")
            quantizer.pre_quant_scale = 1.0
        pytorch_quantization.calib.calibrate_weights(model, "max")
    require_usable(model, batches[0])
