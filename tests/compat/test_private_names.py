"""Names that pytorch-quantization does not document and that scripts use all the same."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import qdq.compat as pytorch_quantization
from qdq import calibrate_model, predict
from qdq.compat import cuda_ext, tensor_quant, utils
from qdq.compat import nn as quant_nn
from qdq.compat.calib import HistogramCalibrator, MaxCalibrator, histogram
from qdq.compat.nn.modules.tensor_quantizer import named_quantizers
from qdq.errors import ArgumentError, ExportError


def test_modules_of_single_names():
    version = importlib.import_module("qdq.compat.version")
    reduce_amax = importlib.import_module("qdq.compat.utils.reduce_amax").reduce_amax
    assert version.__version__ == pytorch_quantization.__version__
    assert utils.reduce_amax is reduce_amax
    assert reduce_amax(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), axis=0).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "calibrator", [MaxCalibrator(8, None, False), HistogramCalibrator(8, None, False)]
)
def test_collect_by_keyword(calibrator):
    calibrator.collect(x=torch.tensor([0.5, -3.0]))
    assert calibrator.num_batches == 1


class TestSolversOfAHistogram:
    @pytest.fixture(params=[torch.from_numpy, np.asarray], ids=["tensor", "ndarray"])
    def counts_and_edges(self, request):
        data = np.abs(np.random.default_rng(0).standard_t(3, 20_000))
        counts, edges = np.histogram(data, bins=300, range=(0, data.max()))
        return request.param(counts), request.param(edges)

    def test_mse(self, counts_and_edges):
        counts, edges = (np.asarray(part, np.float64) for part in counts_and_edges)
        centres = (edges[:-1] + edges[1:]) / 2
        errors = []
        for amax in centres[128:]:
            codes = np.clip(np.rint(centres * 127 / amax), -127, 127)
            errors.append(np.sum(counts * (codes * amax / 127 - centres) ** 2))
        found = histogram._compute_amax_mse(*counts_and_edges, 8, False)
        assert found.item() == pytest.approx(centres[128 + int(np.argmin(errors))], rel=1e-6)

    def test_percentile(self, counts_and_edges):
        counts, edges = (np.asarray(part, np.float64) for part in counts_and_edges)
        reached = np.cumsum(counts) / counts.sum() >= 0.99
        found = histogram._compute_amax_percentile(*counts_and_edges, percentile=99)
        assert found.item() == pytest.approx(edges[int(np.argmax(reached))], rel=1e-6)

    def test_entropy(self, counts_and_edges):
        counts, edges = (np.asarray(part, np.float64).copy() for part in counts_and_edges)
        counts[0] = counts[1]
        divergences = []
        for stop in range(128, len(counts) + 1):
            p, groups = counts[:stop].copy(), np.arange(stop) * 128 // stop
            q = np.zeros(stop)
            for group in range(128):
                members = (groups == group) & (p > 0)
                q[members] = p[members].mean() if members.any() else 0
            p[-1] += counts[stop:].sum()
            p, q, alive = p / p.sum(), q / q.sum(), p > 0
            with np.errstate(divide="ignore"):
                divergences.append(np.sum(p[alive] * np.log(p[alive] / q[alive])))
        last = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
        found = histogram._compute_amax_entropy(
            *counts_and_edges, 8, False, stride=1, start_bin=128
        )
        assert found.item() == pytest.approx(edges[128 + last], rel=1e-6)

    def test_without_data(self):
        for solve in (histogram._compute_amax_mse, histogram._compute_amax_entropy):
            assert solve(None, None, 8, False) is None
        assert histogram._compute_amax_percentile(None, None, 99.9) is None

    def test_edges_of_another_histogram(self):
        with pytest.raises(ArgumentError, match="one edge more"):
            histogram._compute_amax_mse(torch.ones(4), torch.arange(4.0), 8, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_and_scale(dtype):
    x = torch.randn(3, 4).to(dtype)
    codes, scale = tensor_quant._tensor_quant(x, torch.tensor([[1.0], [0.0], [2.0]]))
    expected = (
        (x.double() * torch.tensor([[127.0], [0.0], [63.5]]).double()).round().clamp(-127, 127)
    )
    assert torch.equal(codes.double(), expected)
    assert codes.dtype == dtype
    assert scale.flatten().tolist() == [127.0, 1.0, 63.5]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1, 1)])
def test_cuda_ext_takes_one_range_of_any_shape(shape):
    x = torch.randn(4, 6)
    expected = (x.double() * 63.5).round().clamp(-127, 127) / 63.5
    amax = torch.full(shape, 2.0)
    assert torch.allclose(cuda_ext.fake_tensor_quant(x, amax).double(), expected, atol=1e-6)
    assert torch.allclose(cuda_ext.fake_tensor_quant_(x, amax).double(), expected, atol=1e-6)
    assert torch.allclose(x.double(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4), (4, 1, 1, 1)])
def test_cuda_ext_takes_ranges_along_an_axis_of_any_shape(shape):
    x, amax = torch.randn(4, 6), torch.tensor([0.5, 1.0, 2.0, 3.0])
    scale = 127 / amax.double()[:, None]
    expected = (x.double() * scale).round().clamp(-127, 127) / scale
    found = cuda_ext.fake_tensor_quant_with_axis(x, amax.reshape(shape), 0)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    with pytest.raises(ArgumentError, match="does not fit"):
        cuda_ext.fake_tensor_quant_with_axis(x, amax.reshape(shape), 1)


DIMENSIONS = pytest.mark.parametrize("dimension", [1, 2, 3])


@DIMENSIONS
def test_output_size_of_transposed_convolutions(dimension):
    arguments, x, size = (4, 6, 3, 2, 1), torch.randn(2, 4, *[5] * dimension), [10] * dimension
    layer = getattr(quant_nn, f"QuantConvTranspose{dimension}d")(*arguments)
    plain = getattr(nn, f"ConvTranspose{dimension}d")(*arguments)
    plain.load_state_dict(layer.state_dict())
    for quantizer in named_quantizers(layer).values():
        quantizer.disable()
    for found in (layer(x, size), layer(x, output_size=size), layer(input=x, output_size=size)):
        assert torch.equal(found, plain(x, output_size=size))


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = quant_nn.QuantConvTranspose2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(x, output_size=[10, 10])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_output_size_is_exported(tmp_path, dynamo):
    model, x = Upsampling().eval(), torch.randn(2, 4, 5, 5)
    calibrate_model(model, [x], method="max")
    torch.onnx.export(model, x, tmp_path / "m.onnx", dynamo=dynamo)
    np.testing.assert_allclose(predict(tmp_path / "m.onnx", [x]), predict(model, [x]), atol=1e-5)


def test_fp8_below_opset_19_names_the_first_that_can(tmp_path):
    descriptor = tensor_quant.QuantDescriptor(num_bits=(4, 3), amax=2.0)
    model = nn.Sequential(quant_nn.TensorQuantizer(descriptor))
    with pytest.raises(ExportError, match="opset_version=19"):
        torch.onnx.export(model, torch.randn(2, 3), tmp_path / "m.onnx", opset_version=17)
