"""The int8 kernels of torch against the emulation: the same codes, or the neighbour at a tie."""

import logging

import pytest
import torch
from torch import nn

from qdq.distiller import (
    PostTrainLinearQuantizer,
    collect_quant_stats,
    convert_to_pytorch,
    modularize,
)
from qdq.distiller.layers.int8_layer import using_backend
from qdq.distiller.post_training.torch_int8 import clamps_sums, require_int8
from qdq.errors import ArgumentError, UnsupportedError

BACKENDS = [
    name for name in ("fbgemm", "qnnpack") if name in torch.backends.quantized.supported_engines
]
MODES = ["SYMMETRIC", "SYMMETRIC_RESTRICTED", "ASYMMETRIC_UNSIGNED", "ASYMMETRIC_SIGNED"]


class PaddingConv(nn.Conv2d):
    """A convolution with a forward of its own, as that of EfficientNet."""

    def forward(self, x):
        padded = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = PaddingConv(3, 16, 3, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.reflecting = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.grouped(x) + x)
        return self.head(self.reflecting(x).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(8, 3, 16, 16)


def make_quantizer(images, **options):
    model = modularize(Net().eval(), images)
    statistics = collect_quant_stats(model, [images])
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics, **options)
    quantizer.prepare_model(images)
    return quantizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_codes(images, mode, per_channel, backend, caplog):
    quantizer = make_quantizer(images, mode=mode, per_channel_wts=per_channel)
    with caplog.at_level(logging.WARNING, logger="qdq"):
        converted = convert_to_pytorch(quantizer.model, backend)
    is_clamping = clamps_sums(backend)
    assert ("adds products in 16 bits on this CPU" in caplog.text) == is_clamping
    if is_clamping:
        pytest.skip(f"{backend} clamps sums on this CPU, which has no VNNI: its codes are others")
    expected = quantizer.model(images)
    codes = (converted(images) - expected) * quantizer.layers["head"].output_scale
    assert float(codes.abs().max()) < 1.001
    assert float((codes.abs() < 0.5).float().mean()) > 0.9
    assert len(expected.unique()) > 20
    assert torch.equal(quantizer.model(images), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamped_sums_are_found_by_a_product(backend):
    """Codes of at most 7 bits never reach 16 bits; larger ones do."""
    count, scale = 64, 2.0**14
    for largest in (63, 127):
        with using_backend(backend):
            x = torch.quantize_per_tensor(torch.full((1, count), 255.0), 1.0, 0, torch.quint8)
            weight = torch.full((1, count), float(largest))
            weight = torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(weight, None)
            code = int(torch.ops.quantized.linear(x, packed, scale, 0).int_repr())
        is_exact = abs(code - count * 255 * largest / scale) <= 1
        assert is_exact or (largest == 127 and clamps_sums(backend))


def test_what_torch_has_no_kernel_for(images):
    for options, message in (
        ({"bits_parameters": 4}, "first: it has 4 bits for weights and 8 for activations"),
        ({"bits_parameters": None}, "head: its weight is float"),
        ({"bits_activations": None}, "head: its input is float"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            convert_to_pytorch(make_quantizer(images, **options).model)
    dynamic = PostTrainLinearQuantizer(modularize(Net().eval(), images))
    dynamic.prepare_model(images)
    with pytest.raises(UnsupportedError, match="its ranges are those of each batch"):
        convert_to_pytorch(dynamic.model)


def test_which_backends_there_are(images, monkeypatch):
    model = make_quantizer(images).model
    with pytest.raises(ArgumentError, match="run on a CPU alone"):
        require_int8("fbgemm", torch.device("cuda"))
    with pytest.raises(ArgumentError, match="backend is 'xnnpack'; expected fbgemm, qnnpack"):
        convert_to_pytorch(model, "xnnpack")
    monkeypatch.setattr("qdq.distiller.post_training.torch_int8.find_engines", lambda: [])
    with pytest.raises(UnsupportedError, match="has no fbgemm here; it has none"):
        convert_to_pytorch(model)
