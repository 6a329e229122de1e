"""`to_tensorrt` on other layers than plain convolutions: ONNX Runtime has the values of the emulation."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qdq import check_onnx, export_onnx
from qdq.systems import LinearQuant, duplicate_model_with_quant, quantize_parameters, to_tensorrt


def make_batchnorm():
    batchnorm = nn.BatchNorm2d(4)
    with torch.no_grad():
        batchnorm.running_mean.normal_()
        batchnorm.running_var.uniform_(0.5, 2)
        batchnorm.weight.uniform_(0.5, 2)
        batchnorm.bias.normal_()
    return batchnorm


NETS = {
    "linear": (lambda: [nn.Linear(12, 5)], (12,)),
    "linear on tokens": (lambda: [nn.Linear(12, 5, bias=False)], (7, 12)),
    "1d": (lambda: [nn.Conv1d(3, 4, 3, padding=1)], (3, 10)),
    "depthwise": (lambda: [nn.Conv2d(6, 6, 3, padding=1, groups=6)], (6, 8, 8)),
    "depthwise with a multiplier": (lambda: [nn.Conv2d(6, 12, 3, groups=6)], (6, 8, 8)),
    "groups": (lambda: [nn.Conv2d(6, 4, 3, groups=2)], (6, 8, 8)),
    "batchnorm": (
        lambda: [nn.Conv2d(3, 4, 3), make_batchnorm(), nn.ReLU(), nn.Conv2d(4, 2, 3)],
        (3, 8, 8),
    ),
}


def make_net(layers, images):
    """In fixed point of 8 bits, with a quantizer before the first layer and after each but the last one."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers()).eval()
    quantize_parameters(net, 8)
    quantized = list(duplicate_model_with_quant(net, 8, counter=1))
    kept = (
        (0, 2, 3, 4, 5) if len(quantized) > 2 else (0,)
    )  # the quantizer behind the BatchNorm stays
    quantized = [quantized[index] for index in kept]
    net = nn.Sequential(LinearQuant("input", 8, counter=1), *quantized).eval()
    net(images)
    return net


@pytest.mark.parametrize(("layers", "shape"), NETS.values(), ids=NETS)
def test_the_file_has_the_values_of_the_emulation(layers, shape, tmp_path):
    images = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    net = make_net(layers, images)
    weights = {name: value.clone() for name, value in net.named_parameters() if value.dim() > 1}
    with torch.no_grad():
        expected = net(images).numpy()
    transfer = to_tensorrt(net)
    assert [layer.precision for layer in transfer.layers] == ["int8"] * len(weights)
    for layer in transfer.layers:
        facts = [(tensor.place, tensor.verdict) for tensor in layer.tensors]
        assert facts == [("weight", "exact"), ("input", "exact")]
    assert not transfer.standing

    path = tmp_path / "net.onnx"
    export_onnx(net, images, path)
    check_onnx(path)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(output, expected, atol=2e-5 * np.abs(expected).max())
    assert sorted(read_weights(path)) == sorted(
        tuple(weight.detach().flatten().sort().values.tolist()) for weight in weights.values()
    )


def read_weights(path):
    """The sorted values of each weight in int8."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.dtype == np.int8:
            scale = constants[node.input[1]].astype(np.float64)
            axis = next(
                (attribute.i for attribute in node.attribute if attribute.name == "axis"), 0
            )
            shape = [-1 if index == axis else 1 for index in range(codes.ndim)]
            yield tuple(np.sort((codes * scale.reshape(shape)).flatten()).tolist())
