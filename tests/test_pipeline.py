"""From module to engine: the layers that the engine runs in int8 are the torch modules that were left quantized."""

import pytest
import torch

from qdq import build_engine, disable_quantization, export_onnx
from qdq.swap import quantized_layers

pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
pytestmark = pytest.mark.trt


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_every_quantized_layer_runs_in_int8(quantized, images, tmp_path, weights):
    path = export_onnx(quantized, images, tmp_path / "model.onnx", weights=weights).path
    census = {layer.module: layer.int8 for layer in build_engine(path).layers}
    assert census == dict.fromkeys(quantized_layers(quantized), True)


def test_layer_left_in_float_is_float_in_the_engine(quantized, images, tmp_path):
    disable_quantization(quantized.conv)
    report = build_engine(export_onnx(quantized, images, tmp_path / "model.onnx").path)
    assert {layer.module: layer.int8 for layer in report.layers} == {
        "stem": True,
        "conv": False,
        "head": True,
    }
    assert report.missing_int8 == []
    assert report.expected_int8 == 2


def test_scale_of_shape_one_would_cost_int8(quantized, images, tmp_path):
    """The reason for writing scales as scalars, asked of the compiler itself (R-SHAPE)."""
    import onnx

    path = export_onnx(quantized, images, tmp_path / "model.onnx").path
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("conv._input_quantizer"):
            tensor.dims.append(1)
    onnx.save(model, path)
    report = build_engine(path)
    assert [layer.module for layer in report.missing_int8] == ["conv"]


def test_sequence_of_linear_layers(tmp_path):
    from torch import nn

    from qdq import calibrate_model, swap_modules

    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(2, 5, 32)
    swap_modules(model)
    calibrate_model(model, [x])
    report = build_engine(export_onnx(model, x, tmp_path / "model.onnx").path)
    assert [layer.int8 for layer in report.layers] == [True, True]
