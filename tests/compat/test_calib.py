"""Calibrators of the compat package: what scripts read, set and print; counts against numpy in float64."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from qdq.compat import calib
from qdq.compat import nn as quant_nn
from qdq.compat.calib.calibrator import _Calibrator
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import QdqError

METHODS = ("entropy", "mse", "percentile")


def histogram(*batches, **arguments):
    calibrator = calib.HistogramCalibrator(8, None, False, **arguments)
    for batch in batches:
        calibrator.collect(torch.as_tensor(batch, dtype=torch.float32))
    return calibrator


class TestBoth:
    @pytest.fixture(params=[calib.MaxCalibrator, calib.HistogramCalibrator])
    def cls(self, request):
        return request.param

    def test_kinds(self, cls):
        calibrator = cls(8, None, False)
        assert isinstance(calibrator, _Calibrator)
        assert (calibrator._num_bits, calibrator._axis, calibrator._unsigned) == (8, None, False)

    def test_three_positional_arguments_are_required(self, cls):
        with pytest.raises(TypeError):
            cls(8, None)

    @pytest.mark.parametrize("num_bits", [0, 1, 8, 32, (4, 3)])
    def test_any_width_collects(self, cls, num_bits):
        calibrator = cls(num_bits, None, True)
        calibrator.collect(torch.ones(2))
        calibrator.anything = 1
        calibrator._torch_hist = True  # recipes set it on every calibrator
        assert calibrator._num_bits == num_bits

    @pytest.mark.parametrize("make_twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])  # noqa: S301
    def test_twins_are_equal_and_apart(self, cls, make_twin):
        def solved(calibrator):
            return calibrator.compute_amax(*(["mse"] if cls is calib.HistogramCalibrator else []))

        calibrator = cls(8, None, False)
        calibrator.collect(torch.linspace(-1, 1, 1000))
        twin = make_twin(calibrator)
        assert solved(twin) == solved(calibrator)
        twin.collect(torch.full((10**4,), 9.0))
        assert solved(twin) > 8
        assert solved(calibrator) <= 1

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_non_finite_batch_is_refused_and_changes_nothing(self, cls, bad):
        calibrator = cls(8, None, False)
        calibrator.collect(torch.ones(4))
        before = repr(calibrator)
        with pytest.raises(QdqError, match="2 of 4 values are NaN or Inf"):
            calibrator.collect(torch.tensor([bad, 1.0, bad, 5.0]))
        assert repr(calibrator) == before

    def test_the_quantizer_names_the_layer_of_a_non_finite_batch(self, cls):
        method = "max" if cls is calib.MaxCalibrator else "histogram"
        quantizer = quant_nn.TensorQuantizer(
            QuantDescriptor(name="layer7", calib_method=method), if_quant=False, if_calib=True
        )
        assert type(quantizer._calibrator) is cls
        with pytest.raises(QdqError, match=r"layer7.*1 of 2 values"):
            quantizer(torch.tensor([1.0, torch.nan]))

    def test_float64_beyond_float32(self, cls):
        with pytest.raises(QdqError, match="1 of 2 values"):
            cls(8, None, False).collect(torch.tensor([1.0, 1e300], dtype=torch.float64))

    def test_empty_batch(self, cls):
        calibrator = cls(8, None, False)
        fresh = repr(calibrator)
        calibrator.collect(torch.empty(0, 3))
        assert repr(calibrator) == fresh

    def test_loaded_amax_is_a_copy(self, cls):
        calibrated = quant_nn.TensorQuantizer(if_quant=False, if_calib=True)
        calibrated._calibrator = cls(8, None, False)
        calibrated(torch.ones(10))
        calibrated.disable_calib()
        arguments = (
            {} if cls is calib.MaxCalibrator else {"method": "percentile", "percentile": 100}
        )
        calibrated.load_calib_amax(**arguments)
        calibrated._calibrator.collect(torch.full((10,), 5.0))
        assert calibrated.amax == 1
        calibrated.amax.fill_(3)
        assert calibrated._calibrator.compute_amax(**arguments) == 5


def test_base_class_for_own_calibrators():
    class Own(_Calibrator):
        def compute_amax(self):
            return torch.tensor(2.0)

    calibrator = Own(8, 0, True)
    assert calibrator.compute_amax() == 2
    for method, arguments in (("collect", [torch.ones(1)]), ("reset", [])):
        with pytest.raises(NotImplementedError, match=f"Own has no {method}") as caught:
            getattr(calibrator, method)(*arguments)
        assert isinstance(caught.value, QdqError)


class TestMax:
    @pytest.mark.parametrize("axis", [0, 1, -1, -3, (0, 2), [1, -1], (0, 1, 2)])
    def test_equals_numpy(self, axis, device):
        batches = np.random.default_rng(0).normal(0, 1, (3, 4, 5, 6)).astype(np.float32)
        calibrator = calib.MaxCalibrator(8, axis, False)
        for batch in batches:
            calibrator.collect(torch.from_numpy(batch).to(device))
        kept = {dim % 3 for dim in np.atleast_1d(axis)}
        expected = np.abs(batches).max(0).max(tuple({0, 1, 2} - kept), keepdims=True)
        assert calibrator.compute_amax().device.type == device.type
        np.testing.assert_array_equal(calibrator.compute_amax().cpu().numpy(), expected)

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((4, 3), None), ((1, 3), 0), ((3, 1, 1), (1, -1)), ((4,), ()), ((), None)],
    )
    def test_one_element_is_0d(self, shape, axis, device):
        calibrator = calib.MaxCalibrator(8, axis, False)
        calibrator.collect(torch.full(shape, -2.0, device=device))
        assert calibrator.compute_amax().shape == ()
        assert calibrator.compute_amax() == 2

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8]
    )
    def test_types(self, dtype, device):
        calibrator = calib.MaxCalibrator(8, None, False)
        calibrator.collect(torch.tensor([-128, 3], device=device).to(dtype))
        assert calibrator.compute_amax().dtype == torch.float32
        assert calibrator.compute_amax() == 128

    def test_tracking(self, device):
        calibrator = calib.MaxCalibrator(8, 0, False, track_amax=True)
        for factor in (1, 3, 2):
            calibrator.collect(factor * torch.tensor([[1.0, 0], [2, -4]], device=device))
        assert [type(amax) for amax in calibrator.amaxs] == [np.ndarray] * 3
        assert [amax.tolist() for amax in calibrator.amaxs] == [[[1], [4]], [[3], [12]], [[2], [8]]]
        calibrator._calib_amax.fill_(9)
        assert calibrator.amaxs[0].max() == 4
        calibrator.reset()
        assert calibrator.amaxs == []
        assert calibrator.compute_amax() is None


class TestMaxState:
    def test_untracked(self):
        calibrator = calib.MaxCalibrator(8, None, False)
        calibrator.collect(torch.ones(1))
        assert calibrator.amaxs == []

    def test_shape_change(self):
        calibrator = calib.MaxCalibrator(8, 0, False, track_amax=True)
        calibrator.collect(torch.ones(3, 2))
        for shape in ((4, 2), (1, 2), (3, 2, 2)):
            with pytest.raises(RuntimeError, match="amax shape changed!") as caught:
                calibrator.collect(torch.ones(shape))
            assert isinstance(caught.value, QdqError)
        assert len(calibrator.amaxs) == 1

    @pytest.mark.parametrize(
        ("axis", "shape"), [(2, (3, 4)), (-3, (3, 4)), ((0, 5), (3, 4)), (0, ())]
    )
    def test_axis_out_of_range(self, axis, shape):
        with pytest.raises(ValueError, match="out of range") as caught:
            calib.MaxCalibrator(8, axis, False).collect(torch.ones(shape))
        assert isinstance(caught.value, QdqError)
        assert str(shape) in str(caught.value)

    def test_axis_of_another_kind(self):
        with pytest.raises(TypeError):
            calib.MaxCalibrator(8, "0", False).collect(torch.ones(3))

    def test_amax_is_a_copy_and_settable(self):
        calibrator = calib.MaxCalibrator(8, None, False)
        calibrator.collect(torch.ones(1))
        calibrator.compute_amax().fill_(9)
        assert calibrator.compute_amax() == 1
        calibrator._calib_amax = torch.tensor(4.0)
        calibrator.collect(torch.full((2,), 3.0))
        assert calibrator.compute_amax() == 4
        calibrator._calib_amax = None
        assert calibrator.compute_amax() is None

    def test_takes_no_method(self):
        with pytest.raises(TypeError):
            calib.MaxCalibrator(8, None, False).compute_amax("mse")

    def test_texts(self):
        calibrator = calib.MaxCalibrator(8, None, False)
        assert str(calibrator) == "MaxCalibrator(track_amax=False)"
        assert repr(calibrator) == (
            "MaxCalibrator(num_bits=8 axis=None unsigned=False calib_amax=None track_amax=False)"
        )
        calibrator = calib.MaxCalibrator(4, (0, 1), True, True)
        calibrator.collect(torch.full((1, 1), 2.5))
        assert str(calibrator) == "MaxCalibrator(track_amax=True)"
        assert repr(calibrator) == (
            "MaxCalibrator(num_bits=4 axis=(0, 1) unsigned=True calib_amax=2.5 track_amax=True)"
        )


class TestHistogramCounts:
    @pytest.mark.parametrize("num_bins", [1, 10, 100, 2048, 3000])
    @pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 1e-30, 1e30])
    def test_bin_is_floor_in_float64(self, num_bins, scale, device):
        """Also for values on edges, and for their neighbours in float32."""
        rng = np.random.default_rng(num_bins)
        maximum = np.float32(scale * rng.uniform(1, 2))
        edges = (np.arange(num_bins + 1) * (float(maximum) / num_bins)).astype(np.float32)
        values = np.concatenate(
            [
                rng.uniform(-maximum, maximum, 20000).astype(np.float32),
                edges,
                np.nextafter(edges, np.float32(0)),
            ]
        )
        values = np.append(values[np.abs(values) < maximum], maximum)
        calibrator = calib.HistogramCalibrator(8, None, False, num_bins=num_bins)
        calibrator.collect(torch.from_numpy(values).to(device))
        width = float(maximum) / num_bins
        bins = np.minimum(np.floor(np.abs(values).astype(np.float64) / width), num_bins - 1).astype(
            int
        )
        assert calibrator._calib_hist.device.type == device.type
        assert np.array_equal(
            calibrator._calib_hist.cpu().numpy(), np.bincount(bins, minlength=num_bins)
        )
        assert np.array_equal(
            calibrator._calib_bin_edges.cpu().numpy(), np.arange(num_bins + 1) * width
        )

    def test_first_small_then_large(self, device):
        """Maxima 0.01, 10, 1e4 (and back): bounded bins, no count lost, the right amax."""
        generator = torch.Generator().manual_seed(0)
        calibrator = calib.HistogramCalibrator(8, None, False)
        sizes = []
        for maximum in (0.01, 10.0, 1e4, 0.02):
            batch = torch.rand(5000, generator=generator) * maximum
            batch[0] = maximum
            calibrator.collect(batch.to(device))
            sizes.append(calibrator._calib_hist.numel())
        assert sizes[0] == 2048
        assert max(sizes) <= 16 * 2048
        assert calibrator._calib_hist.sum() == 20000
        width = float(calibrator._calib_bin_edges[1])
        assert np.log2(width / (float(np.float32(0.01)) / 2048)) % 1 == 0
        assert 0 <= float(calibrator.compute_amax("percentile", percentile=100)) - 1e4 <= 2 * width
        assert 0 <= calibrator._calib_bin_edges[-1] - 1e4 <= 2 * width
        # the third batch is a quarter of the data and uniform: its percentiles are known
        assert float(calibrator.compute_amax("percentile", percentile=95)) == pytest.approx(
            8e3, rel=0.02
        )
        assert float(calibrator.compute_amax("mse")) == pytest.approx(1e4, rel=0.01)

    def test_strides(self, device):
        data = torch.randn(4, 6, 5, 7, device=device)
        expected, found = (calib.HistogramCalibrator(8, None, False) for _ in range(2))
        expected.collect(data)
        found.collect(data.to(memory_format=torch.channels_last))
        assert torch.equal(expected._calib_hist, found._calib_hist)

    def test_only_zeros_give_an_amax_on_their_device(self, device):
        calibrator = calib.HistogramCalibrator(8, None, False)
        calibrator.collect(torch.zeros(5, device=device))
        for method in METHODS:
            amax = calibrator.compute_amax(method)
            assert amax == 0
            assert amax.device.type == device.type


class TestHistogramState:
    @pytest.mark.parametrize("arguments", [{}, {"skip_zeros": True}, {"num_bins": 100}])
    def test_tensors_and_arrays_are_the_same(self, arguments):
        batches = [torch.randn(3000).relu() * factor for factor in (0, 1, 0.5, 3, 100)]
        tensors, arrays = (
            histogram(*batches, torch_hist=flag, **arguments) for flag in (True, False)
        )
        for name in ("_calib_hist", "_calib_bin_edges"):
            assert isinstance(getattr(tensors, name), torch.Tensor)
            assert isinstance(getattr(arrays, name), np.ndarray)
            assert np.array_equal(getattr(tensors, name).numpy(), getattr(arrays, name))
        for method in METHODS:
            assert tensors.compute_amax(method) == arrays.compute_amax(method)
        arrays._torch_hist = True
        assert torch.equal(arrays._calib_hist, tensors._calib_hist)

    def test_before_data_and_after_reset(self):
        calibrator = histogram()
        for _ in range(2):
            assert calibrator._calib_hist is None
            assert calibrator._calib_bin_edges is None
            assert all(calibrator.compute_amax(method) is None for method in METHODS)
            calibrator.collect(torch.ones(3))
            calibrator.reset()

    def test_reset_goes_back_to_the_configured_bins(self):
        calibrator = histogram([1.0], [9.0], num_bins=64)
        assert calibrator._calib_hist.numel() == 9 * 64
        calibrator.reset()
        calibrator.collect(torch.full((2,), 5.0))
        assert calibrator._calib_hist.numel() == 64

    def test_zeros_wait_for_a_width(self):
        calibrator = histogram(np.zeros(10), np.zeros(3), [1.0, 0.0], num_bins=4)
        assert calibrator._calib_hist.tolist() == [14, 0, 0, 1]

    def test_skip_zeros(self):
        calibrator = histogram(np.zeros(10), skip_zeros=True, num_bins=4)
        assert calibrator.compute_amax("mse") is None  # nothing is left of the batch
        calibrator.collect(torch.tensor([0.0, 1.0]))
        assert calibrator._calib_hist.tolist() == [0, 0, 0, 1]

    def test_more_counts_than_float32_can_hold(self):
        calibrator = histogram([1.0])
        calibrator._calib_hist[-1] = 2**24
        calibrator.collect(torch.ones(1))
        assert calibrator._calib_hist[-1] == 2**24 + 1

    @pytest.mark.parametrize("flag", [True, False])
    def test_edits_in_place_count(self, flag):
        calibrator = histogram(np.linspace(0, 1, 1000), torch_hist=flag)
        calibrator._calib_hist[1024:] = 0
        assert 0.49 < calibrator.compute_amax("percentile") <= 0.5

    @pytest.mark.parametrize("make", [np.array, torch.tensor, list])
    @pytest.mark.parametrize("edges_first", [True, False])
    @pytest.mark.parametrize("before", [[], [[3.0]]])
    def test_state_of_another_run(self, make, edges_first, before):
        other = histogram(np.random.default_rng(0).laplace(0, 1, 5000), num_bins=300)
        state = {
            "_calib_hist": make(other._calib_hist.tolist()),
            "_calib_bin_edges": make(np.float32(other._calib_bin_edges).tolist()),
        }
        calibrator = histogram(*before)
        for name in sorted(state, reverse=not edges_first):
            setattr(calibrator, name, state[name])
        assert torch.equal(calibrator._calib_hist, other._calib_hist)
        assert torch.allclose(calibrator._calib_bin_edges, other._calib_bin_edges)
        for method in METHODS:
            assert float(calibrator.compute_amax(method)) == pytest.approx(
                float(other.compute_amax(method))
            )
        calibrator.collect(torch.ones(7))
        assert calibrator._calib_hist.sum() == 5007

    def test_what_is_set_is_copied(self):
        counts = np.ones(200)
        calibrator = histogram()
        calibrator._calib_hist, calibrator._calib_bin_edges = counts, np.arange(201)
        counts[:] = 0
        assert calibrator._calib_hist.sum() == 200

    @pytest.mark.parametrize("name", ["_calib_hist", "_calib_bin_edges"])
    def test_none_forgets(self, name):
        calibrator = histogram([1.0])
        setattr(calibrator, name, None)
        assert calibrator._calib_hist is None
        assert calibrator._calib_bin_edges is None
        assert calibrator.compute_amax("mse") is None
        calibrator.collect(torch.ones(2))
        assert calibrator._calib_hist.sum() == 2

    @pytest.mark.parametrize(
        "edges", [[1.0], [], [0.0, 1.0, 4.0], [1.0, 2.0, 3.0], [0.0, -1.0], [0.0, np.nan]]
    )
    def test_edges_that_are_none(self, edges):
        calibrator = histogram([1.0])
        with pytest.raises(ValueError, match="_calib_bin_edges") as caught:
            calibrator._calib_bin_edges = edges
        assert isinstance(caught.value, QdqError)
        assert calibrator.compute_amax("percentile", percentile=100) == 1

    def test_edges_without_counts(self):
        calibrator = histogram()
        calibrator._calib_bin_edges = np.arange(5) / 2
        assert calibrator.compute_amax("mse") is None
        calibrator.collect(torch.tensor([0.6, 2.0]))
        assert calibrator._calib_hist.tolist() == [0, 1, 0, 1]

    @pytest.mark.parametrize("axis", [0, (0, 1)])
    def test_axis(self, axis):
        with pytest.raises(NotImplementedError, match="only supports per tensor scaling") as caught:
            calib.HistogramCalibrator(8, axis, False)
        assert isinstance(caught.value, QdqError)

    @pytest.mark.parametrize("num_bins", [0, -1])
    def test_no_bins(self, num_bins):
        with pytest.raises(ValueError, match="num_bins"):
            calib.HistogramCalibrator(8, None, False, num_bins=num_bins)

    def test_grow_method(self, caplog):
        calib.HistogramCalibrator(8, None, False, 2048, "append", False, True)
        assert "grow_method='append' is ignored" in caplog.text

    def test_texts(self):
        assert str(histogram()) == "HistogramCalibrator(calib_bin_edges=None)"
        assert (
            str(histogram([0.996]))
            == "HistogramCalibrator(calib_bin_edges=[0.000, ..., 0.996](2049))"
        )


LAYERS = {
    "linear": (lambda: quant_nn.QuantLinear(50, 7), 0),
    "conv": (lambda: quant_nn.QuantConv2d(4, 6, 3), 0),
    "grouped": (lambda: quant_nn.QuantConv1d(6, 6, 5, groups=3), 0),
    "transposed": (lambda: quant_nn.QuantConvTranspose2d(3, 5, 4), 1),
    "one": (lambda: quant_nn.QuantConv2d(3, 1, 3), 0),
}


def slices(weight, axis):
    return (
        [weight]
        if axis is None
        else [weight.select(axis, index) for index in range(weight.shape[axis])]
    )


class TestWeights:
    def layer(self, kind, device, num_bits=8):
        make, axis = LAYERS[kind]
        layer = make()
        with torch.no_grad():
            layer.weight.copy_(torch.distributions.Laplace(0.0, 0.1).sample(layer.weight.shape))
        layer.weight_quantizer._num_bits = num_bits
        return layer.to(device), axis

    @pytest.mark.parametrize("num_bits", [8, 4, (4, 3)])
    @pytest.mark.parametrize("num_bins", [2048, 300])
    @pytest.mark.parametrize("perchannel", [True, False])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_equals_a_calibrator_of_each_slice(self, kind, perchannel, num_bins, num_bits, device):
        layer, axis = self.layer(kind, device, num_bits)
        axis = axis if perchannel else None
        model = nn.Sequential(layer, nn.Linear(2, 2))
        for method in ("mse", "percentile", "entropy"):
            if (method, num_bits) == ("entropy", (4, 3)):
                continue
            layer.weight_quantizer.__dict__["_buffers"].clear()
            calib.calibrate_weights(model, method, perchannel, percentile=97.0, num_bins=num_bins)
            expected = []
            for part in slices(layer.weight.detach(), axis):
                calibrator = calib.HistogramCalibrator(num_bits, None, False, num_bins=num_bins)
                calibrator.collect(part)
                expected.append(calibrator.compute_amax(method, percentile=97.0).cpu())
            amax = layer.weight_quantizer.amax
            assert amax.device.type == device.type
            assert torch.equal(amax.cpu().flatten(), torch.stack(expected))
            kept = [
                layer.weight.shape[dim] if dim == axis else 1 for dim in range(layer.weight.dim())
            ]
            assert list(amax.shape) == ([] if amax.numel() == 1 else kept)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_max(self, kind, device):
        layer, axis = self.layer(kind, device)
        for perchannel in (True, False):
            layer.weight_quantizer.__dict__["_buffers"].clear()
            calib.calibrate_weights(layer, "max", perchannel)
            expected = [
                part.abs().max()
                for part in slices(layer.weight.detach(), axis if perchannel else None)
            ]
            assert torch.equal(layer.weight_quantizer.amax.flatten(), torch.stack(expected))

    def test_a_channel_of_zeros(self, device):
        layer, _ = self.layer("conv", device)
        with torch.no_grad():
            layer.weight[2] = 0
        for method in ("max", "mse", "entropy", "percentile"):
            calib.calibrate_weights(layer, method)
            assert layer.weight_quantizer.amax.flatten()[2] == 0
            assert (layer.weight_quantizer.amax != 0).sum() == 5
        with torch.no_grad():
            layer.weight.zero_()
        calib.calibrate_weights(layer, "mse")
        assert not layer.weight_quantizer.amax.any()


class TestWeightsOfModels:
    @pytest.fixture
    def model(self):
        return nn.Sequential(
            quant_nn.QuantConv2d(3, 4, 3), nn.ReLU(), nn.Sequential(quant_nn.QuantLinear(4, 2))
        )

    def test_method(self, model):
        with pytest.raises(TypeError, match="Unsupported calibration method") as caught:
            calib.calibrate_weights(model, "kl")
        assert isinstance(caught.value, QdqError)
        with pytest.raises(ValueError, match="Invalid percentile"):
            calib.calibrate_weights(model, "percentile", percentile=101)

    def test_entropy_of_fp8(self, model):
        model[0].weight_quantizer._num_bits = (4, 3)
        with pytest.raises(NotImplementedError, match="entropy"):
            calib.calibrate_weights(model, "entropy")

    @pytest.mark.parametrize("method", ["max", "mse"])
    def test_non_finite_weights_are_named(self, model, method):
        with torch.no_grad():
            model[2][0].weight[0, 1] = torch.inf
        with pytest.raises(QdqError, match=r"2\.0\.weight: 1 of 8 values are NaN or Inf"):
            calib.calibrate_weights(model, method)

    def test_one_line_a_layer(self, model, caplog):
        with caplog.at_level(logging.INFO, logger="qdq"):
            calib.calibrate_weights(model, "max")
        lines = [record.message for record in caplog.records]
        assert lines == ["0.weight: max range of 4 channels", "2.0.weight: max range of 2 channels"]

    def test_again_by_another_method_and_after_max(self, model):
        for method in ("max", "percentile", "mse"):
            calib.calibrate_weights(model, method)
            assert model[0].weight_quantizer.amax.shape == (4, 1, 1, 1)
            assert model[2][0].weight_quantizer.amax.shape == (2, 1)
        with pytest.raises(RuntimeError, match="Changing shape"):
            calib.calibrate_weights(model, "max", perchannel=False)

    def test_own_modules(self):
        """Anything with a `weight` and a `weight_quantizer`; what lacks either is passed over."""

        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5, 8, dtype=torch.bfloat16))
                self.weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor(axis=0))

        bare, empty = Table(), Table()
        bare.weight, empty.weight = None, nn.Parameter(torch.empty(0, 3))
        model = nn.ModuleDict({"table": Table(), "bare": bare, "empty": empty})
        calib.calibrate_weights(model)
        assert model["table"].weight_quantizer.amax.shape == (5, 1)
        assert bare.weight_quantizer.amax is None
        assert empty.weight_quantizer.amax is None
