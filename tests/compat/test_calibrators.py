"""The calibrators of pytorch-quantization against plain numpy histograms and maxima."""

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch

from qdq import ArgumentError, ArgumentTypeError, CalibrationError, StateError
from qdq.compat.calib import HistogramCalibrator, MaxCalibrator


def test_solving_changes_nothing():
    calibrator = HistogramCalibrator(8, None, False)
    calibrator.collect(torch.randn(1000))
    before = calibrator._calib_hist.clone()
    results = [
        calibrator.compute_amax(method) for method in ("entropy", "mse", "percentile", "entropy")
    ]
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
        expected, _ = np.histogram(
            np.abs(np.concatenate([first, second])).astype(np.float64), edges
        )
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
        assert calibrator.num_batches == 1
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
        with pytest.raises(NotImplementedError, match="per tensor"):
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


class TestOnTheGpu:
    """Calibrators on a device wait for it as little as they can."""

    @pytest.fixture
    def deterministic(self):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("axis", [None, 0])
    @pytest.mark.parametrize("track", [False, True])
    def test_maxima_do_not_wait(self, axis, track, gpu, deterministic):
        batches = torch.randn(3, 4, 5)
        moved = list(batches.to(gpu))
        calibrator, expected = (MaxCalibrator(8, axis, False, track) for _ in range(2))
        with watch(gpu) as events:
            for batch in moved:
                calibrator.collect(batch)
        assert list_waits(events) == []
        for batch in batches:
            expected.collect(batch)
        assert torch.equal(calibrator.compute_amax().cpu(), expected.compute_amax())
        np.testing.assert_array_equal(calibrator.amaxs, expected.amaxs)

    @pytest.mark.parametrize("skip_zeros", [False, True])
    def test_a_histogram_waits_once_a_batch(self, skip_zeros, gpu, deterministic):
        batches = [torch.zeros(9), torch.randn(1000).relu(), 3 * torch.randn(500), torch.zeros(9)]
        moved = [batch.to(gpu) for batch in batches]
        calibrator, expected = (
            HistogramCalibrator(8, None, False, skip_zeros=skip_zeros) for _ in range(2)
        )
        for batch, moved_batch in zip(batches, moved, strict=True):
            with watch(gpu) as events:
                calibrator.collect(moved_batch)
            assert len(list_waits(events)) <= 1
            expected.collect(batch)
            if expected._calib_hist is not None:
                assert torch.equal(calibrator._calib_hist.cpu(), expected._calib_hist)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_the_first_batch_with_defects_is_named(self, value, gpu):
        calibrator = MaxCalibrator(8, None, False)
        for batch in (
            torch.ones(3),
            torch.tensor([1.0, value]),
            torch.ones(3),
            torch.tensor([value]),
        ):
            calibrator.collect(batch.to(gpu))
        with pytest.raises(CalibrationError, match="batch 1 has values that are NaN or Inf"):
            calibrator.compute_amax()
        calibrator.reset()
        calibrator.collect(torch.ones(3, device=gpu))
        assert calibrator.compute_amax().item() == 1
        with pytest.raises(CalibrationError, match="1 of 2 values"):
            HistogramCalibrator(8, None, False).collect(torch.tensor([1.0, value], device=gpu))
