"""Calibrators against plain numpy histograms, solvers against loops written from the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdq import ArgumentError, ArgumentTypeError, CalibrationError, StateError
from qdq.formats import Format
from qdq.observers import HistogramCalibrator, MaxCalibrator
from qdq.observers.entropy import solve_entropy
from qdq.observers.max import reduce_amax
from qdq.observers.mse import solve_mse
from qdq.observers.percentile import solve_percentile


def brute_mse(counts, width, fmt, start_bin=128):
    size = len(counts)
    centres = (np.arange(size) + 0.5) * width
    errors = []
    for i in range(start_bin, size):
        scale = centres[i] / fmt.qmax
        quantized = np.clip(np.rint(centres / scale), fmt.qmin, fmt.qmax) * scale
        errors.append(np.sum(counts * (quantized - centres) ** 2))
    return centres[start_bin + int(np.argmin(errors))], errors


def brute_entropy(counts, width, fmt, start_bin=128):
    hist = counts.astype(np.float64)
    hist[0] = hist[1]
    groups = fmt.qmax + 1
    best, edge = np.inf, len(hist)
    for i in range(start_bin, len(hist) + 1):
        reference = hist[:i].copy()
        group = np.floor(np.arange(i) * groups / i).astype(int)
        filled = hist[:i] > 0
        sums = np.bincount(group, weights=hist[:i])
        lengths = np.bincount(group, weights=filled)
        candidate = np.where(filled, sums[group] / np.maximum(lengths[group], 1), 0)
        reference[-1] += hist[i:].sum()
        p, q = reference / reference.sum(), candidate / candidate.sum()
        positive = p > 0
        divergence = np.inf if np.any(q[positive] == 0) else np.sum(p[positive] * np.log(p[positive] / q[positive]))
        if divergence <= best * (1 + 1e-12):
            best, edge = min(best, divergence), i
    return edge * width


def samples(kind, size=20000):
    rng = np.random.default_rng(sum(map(ord, kind)))
    return {
        "normal": lambda: rng.normal(0, 1, size),
        "laplace": lambda: rng.laplace(0, 1, size),
        "relu": lambda: np.maximum(rng.normal(0, 1, size), 0),
        "uniform": lambda: rng.uniform(-1, 1, size),
        "bimodal": lambda: np.concatenate([rng.normal(1, 0.1, size), rng.normal(5, 0.3, size)]),
        "heavy": lambda: rng.standard_t(2, size),
        "outlier": lambda: np.append(rng.normal(0, 1, size), 1e3),
    }[kind]().astype(np.float32)


KINDS = ["normal", "laplace", "relu", "uniform", "bimodal", "heavy", "outlier"]


def histogram_of(data, num_bins=2048):
    calibrator = HistogramCalibrator(8, None, False, num_bins)
    calibrator.collect(torch.from_numpy(data))
    return calibrator._calib_hist.numpy(), calibrator._width


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(8, unsigned=True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_equals_brute_force(kind, fmt):
    counts, width = histogram_of(samples(kind))
    expected, errors = brute_mse(counts, width, fmt)
    found = solve_mse(counts, width, fmt)
    assert errors[round(found / width - 0.5) - 128] <= min(errors) * (1 + 1e-9)
    assert abs(found - expected) <= width * 1.001 or errors[round(found / width - 0.5) - 128] == min(errors)


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(8, unsigned=True), Format(12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_equals_brute_force(kind, fmt):
    counts, width = histogram_of(samples(kind), 512)
    assert solve_entropy(counts, width, fmt) == pytest.approx(brute_entropy(counts, width, fmt), abs=width * 1.001)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=140, max_size=260).filter(lambda counts: sum(counts[1:]) > 0))
def test_solvers_on_any_counts(counts):
    counts = np.array(counts)
    assert solve_entropy(counts, 1.0, Format()) == pytest.approx(brute_entropy(counts, 1.0, Format()), abs=1.001)
    _, errors = brute_mse(counts, 1.0, Format())
    assert errors[int(solve_mse(counts, 1.0, Format()) - 0.5) - 128] <= min(errors) * (1 + 1e-9)


@pytest.mark.parametrize("percentile", [0.1, 50, 99, 99.9, 99.99])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_brackets_the_quantile(kind, percentile):
    data = np.abs(samples(kind))
    counts, width = histogram_of(data)
    amax = solve_percentile(counts, width, percentile)
    exact = np.quantile(data, percentile / 100, method="inverted_cdf")
    assert amax - 1e-6 <= exact <= amax + width * 1.001 or amax == pytest.approx(width)


def test_percentile_ends(caplog):
    counts = np.array([90, 0, 10])
    assert solve_percentile(counts, 2.0, 100) == 6.0
    assert solve_percentile(counts, 2.0, 50) == 2.0
    assert "smallest values" in caplog.text
    with pytest.raises(ArgumentError, match="Invalid percentile"):
        solve_percentile(counts, 2.0, 101)


def test_solving_changes_nothing():
    calibrator = HistogramCalibrator(8, None, False)
    calibrator.collect(torch.randn(1000))
    before = calibrator._calib_hist.clone()
    results = [calibrator.compute_amax(method) for method in ("entropy", "mse", "percentile", "entropy")]
    assert torch.equal(calibrator._calib_hist, before)
    assert results[0] == results[3]


def test_unknown_method():
    with pytest.raises(ArgumentTypeError, match="Unknown calibration method 'kl'"):
        HistogramCalibrator(8, None, False).compute_amax("kl")


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_impossible_bins(method):
    calibrator = HistogramCalibrator(8, None, False)
    calibrator.collect(torch.randn(1000))
    for wrong in ({"stride": 0}, {"start_bin": -1}):
        with pytest.raises(ArgumentError, match="or more"):
            calibrator.compute_amax(method, **wrong)
    with pytest.raises(ArgumentTypeError, match="integer"):
        calibrator.compute_amax(method, start_bin=64.0)
    with pytest.raises(ArgumentError, match="num_bins"):
        HistogramCalibrator(8, None, False, num_bins=0)


class TestHistogram:
    def counts(self, batches, num_bins=64):
        calibrator = HistogramCalibrator(8, None, False, num_bins)
        for batch in batches:
            calibrator.collect(torch.as_tensor(batch, dtype=torch.float32))
        return calibrator

    def test_equals_numpy(self):
        first, second = np.random.default_rng(0).normal(0, 1, (2, 5000)).astype(np.float32)
        calibrator = self.counts([first, second])
        edges = calibrator._calib_bin_edges.numpy()
        expected, _ = np.histogram(np.abs(np.concatenate([first, second])).astype(np.float64), edges)
        assert np.array_equal(calibrator._calib_hist.numpy(), expected)
        assert calibrator._calib_hist.sum() == 10000

    def test_grows_by_whole_bins(self):
        calibrator = self.counts([[1.0], [2.0]])
        assert calibrator._calib_hist.numel() == 128
        assert calibrator._width == 1 / 64
        assert calibrator._calib_hist[63] == 1
        assert calibrator._calib_hist[127] == 1

    def test_bins_stay_bounded_and_exact(self):
        batches = [np.full(7, 0.01), np.full(5, 10.0), np.full(3, 1e4), np.full(2, 1e9)]
        calibrator = self.counts(batches, num_bins=2048)
        assert calibrator._calib_hist.numel() <= 16 * 2048
        assert calibrator._calib_hist.sum() == 17
        assert calibrator.compute_amax("percentile", percentile=100) == pytest.approx(1e9, rel=1e-3)

    def test_zeros_wait_for_a_width(self):
        calibrator = self.counts([np.zeros(10), np.ones(5)])
        assert calibrator._calib_hist[0] == 10
        assert calibrator._calib_hist.sum() == 15

    def test_only_zeros(self):
        calibrator = self.counts([np.zeros(10)])
        assert calibrator.saw_zeros_only()
        assert calibrator.compute_amax("mse") == 0

    def test_empty_batches_change_nothing(self):
        calibrator = self.counts([[], [1.0], []])
        assert calibrator.num_batches == 1
        assert self.counts([[]]).compute_amax("mse") is None

    def test_skip_zeros(self):
        calibrator = HistogramCalibrator(8, None, False, 64, skip_zeros=True)
        calibrator.collect(torch.tensor([0.0, 0.0, 1.0]))
        assert calibrator._calib_hist.sum() == 1

    def test_subnormal_data(self):
        calibrator = self.counts([[1e-40, 5e-41]], num_bins=4)
        assert calibrator._calib_hist.tolist() == [0, 0, 1, 1]

    def test_reset_starts_over(self):
        calibrator = self.counts([[1.0], [50.0]])
        calibrator.reset()
        calibrator.collect(torch.ones(3))
        assert calibrator._calib_hist.numel() == 64

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        with pytest.raises(CalibrationError, match="1 of 3 values are NaN or Inf"):
            self.counts([[1.0, bad, 2.0]])

    def test_per_channel_is_refused(self):
        with pytest.raises(ArgumentError, match="per tensor"):
            HistogramCalibrator(8, 0, False)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types(self, dtype):
        calibrator = HistogramCalibrator(8, None, False, 4)
        calibrator.collect(torch.tensor([0.25, 1.0, -0.75], dtype=dtype))
        assert calibrator._calib_hist.tolist() == [0, 1, 0, 2]


class TestMax:
    @pytest.mark.parametrize("axis", [None, 0, 1, -1, 2])
    def test_equals_numpy(self, axis):
        batches = np.random.default_rng(0).normal(0, 1, (3, 4, 5, 6)).astype(np.float32)
        calibrator = MaxCalibrator(8, axis, False)
        for batch in batches:
            calibrator.collect(torch.from_numpy(batch))
        others = tuple(d for d in range(3) if axis is None or d != axis % 3)
        expected = np.abs(batches).max(0).max(others, keepdims=axis is not None)
        np.testing.assert_array_equal(calibrator.compute_amax().numpy(), expected)

    def test_amax_is_a_copy(self):
        calibrator = MaxCalibrator(8, None, False)
        calibrator.collect(torch.ones(1))
        calibrator.compute_amax().fill_(9)
        assert calibrator.compute_amax() == 1

    def test_shape_change_and_no_data(self):
        calibrator = MaxCalibrator(8, 0, False)
        assert calibrator.compute_amax() is None
        calibrator.collect(torch.ones(3, 2))
        with pytest.raises(StateError, match="amax shape changed"):
            calibrator.collect(torch.ones(4, 2))

    @pytest.mark.parametrize("axis", [(0,), (0, 2), [-1, 1], (0, 1, 2), ()])
    def test_several_axes(self, axis):
        data = np.random.default_rng(0).normal(0, 1, (4, 5, 6)).astype(np.float32)
        others = tuple({0, 1, 2} - {dim % 3 for dim in axis})
        found = reduce_amax(torch.from_numpy(data), axis)
        np.testing.assert_array_equal(found.numpy(), np.abs(data).max(others, keepdims=True))

    @pytest.mark.parametrize(("axis", "shape"), [(2, (3, 4)), ((0, -3), (3, 4)), (0, ())])
    def test_axis_out_of_range(self, axis, shape):
        with pytest.raises(ArgumentError, match="out of range") as caught:
            reduce_amax(torch.ones(shape), axis)
        assert str(shape) in caught.value.message

    def test_axis_of_another_kind(self):
        with pytest.raises(ArgumentTypeError, match="axis is 'channel'"):
            reduce_amax(torch.ones(3), "channel")

    def test_one_dimension(self):
        assert reduce_amax(torch.tensor([-3.0, 2.0]), 0).tolist() == [3, 2]
