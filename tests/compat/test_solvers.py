"""Ranges from histograms against the definitions written out: numpy in float64, one candidate after the other."""

import math

import numpy as np
import pytest
import torch

from qdq.compat import calib
from qdq.compat.tensor_quant import scaled_e4m3
from qdq.errors import QdqError

EPS = 2.0**-24
METHODS = ("entropy", "mse", "percentile")


class Reference:
    """The histogram and its three solvers, literally."""

    def __init__(self, batches, num_bins=2048, num_bits=8, unsigned=False, start_bin=128, stride=1):
        self.largest = 2 ** (num_bits - 1 + unsigned) - 1
        self.start_bin, self.stride = start_bin, stride
        self.counts = None
        for batch in batches:
            self.collect(np.abs(batch.astype(np.float32)).astype(np.float64).ravel(), num_bins)
        self.edges = np.arange(len(self.counts) + 1) * self.width

    def collect(self, values, num_bins):
        if self.counts is None:
            self.width = values.max() / num_bins
            self.counts = np.zeros(num_bins, dtype=np.int64)
        while math.ceil(values.max() / self.width) > 16 * num_bins:
            if len(self.counts) % 2:
                self.counts = np.append(self.counts, 0)
            self.counts = self.counts[0::2] + self.counts[1::2]
            self.width *= 2
        missing = math.ceil(values.max() / self.width) - len(self.counts)
        self.counts = np.append(self.counts, np.zeros(max(missing, 0), dtype=np.int64))
        for value in values:
            self.counts[min(math.floor(value / self.width), len(self.counts) - 1)] += 1

    def solve(self, method):
        return getattr(self, method)()

    def percentile(self, percentile=99.99):
        total, seen = self.counts.sum(), 0
        for j, count in enumerate(self.counts):
            seen += count
            if seen / total >= percentile / 100:
                return self.edges[max(j, 1)]
        raise AssertionError

    def mse(self):
        centres = (self.edges[:-1] + self.edges[1:]) / 2
        return centres[min(self.mse_errors(centres), key=lambda pair: pair[0])[1]]

    def mse_errors(self, centres):
        for i in range(self.start_bin, len(centres), self.stride):
            scale = self.largest / centres[i]
            quantized = (
                np.minimum(np.rint(centres * scale), self.largest) / scale * (centres[i] > EPS)
            )
            yield np.sum(self.counts * (quantized - centres) ** 2), i

    def entropy(self):
        hist = self.counts.astype(np.float64)
        hist[0] = hist[1]
        best, chosen = math.inf, None
        for i in range(self.start_bin, len(hist) + 1, self.stride):
            divergence = self.divergence(hist, i)
            if divergence <= best:
                best, chosen = divergence, i
        return self.edges[chosen]

    def divergence(self, hist, i):
        groups = self.largest + 1
        group = np.arange(i) * groups // i
        filled = hist[:i] > 0
        mass = np.zeros(groups)
        members = np.zeros(groups)
        np.add.at(mass, group, hist[:i])
        np.add.at(members, group, filled)
        q = np.where(filled, mass[group] / np.maximum(members[group], 1), 0)
        p = hist[:i].copy()
        p[-1] += hist[i:].sum()
        positive = p > 0
        if (q[positive] == 0).any():
            return math.inf
        p, q = p[positive] / p.sum(), q[positive] / q.sum()
        return np.sum(p * np.log(p / q))


def bimodal(rng, size):
    return np.concatenate([rng.normal(1, 0.2, size // 2), rng.normal(6, 0.5, size - size // 2)])


def with_outlier(rng, size):
    return np.append(rng.normal(0, 1, size - 1), 1e6)


DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(0, rng.uniform(0.01, 100), size),
    "laplace": lambda rng, size: rng.laplace(0, 1, size),
    "half-normal": lambda rng, size: np.maximum(rng.normal(0, 1, size), 0),
    "uniform": lambda rng, size: rng.uniform(-3, 3, size),
    "bimodal": bimodal,
    "heavy": lambda rng, size: rng.standard_t(2, size),
    "constant": lambda rng, size: np.full(size, rng.uniform(-5, 5)),
    "outlier": with_outlier,
}
FORMATS = [(8, False), (8, True), (8, False), (4, False), (8, False)]


def case(kind, seed):
    """Batches and settings: one batch of 2048 bins, or fewer bins and every other time two batches; mostly 8 bit."""
    rng = np.random.default_rng([seed, *kind.encode()])
    data = DISTRIBUTIONS[kind](rng, 4000).astype(np.float32)
    split = seed >= 5 and seed % 2
    batches = np.split(data, [1500]) if split else [data]
    num_bins, start_bin = (2048, 128) if seed < 5 else (512, 64)
    # Grows to 16 times as many: the definition takes the square of that.
    if kind == "outlier" and split:
        num_bins, start_bin = 64, 16
    num_bits, unsigned = FORMATS[seed % 5]
    return batches, {
        "num_bins": num_bins,
        "num_bits": num_bits,
        "unsigned": unsigned,
        "start_bin": start_bin,
    }


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_within_one_bin_of_the_definition(kind, seed):
    batches, settings = case(kind, seed)
    reference = Reference(batches, **settings)
    expected = {method: reference.solve(method) for method in METHODS}
    calibrator = calib.HistogramCalibrator(
        settings["num_bits"], None, settings["unsigned"], num_bins=settings["num_bins"]
    )
    for batch in batches:
        calibrator.collect(torch.from_numpy(batch))
    assert np.array_equal(calibrator._calib_hist.numpy(), reference.counts)
    assert np.array_equal(calibrator._calib_bin_edges.numpy(), reference.edges)
    for method in METHODS:
        amax = calibrator.compute_amax(method, start_bin=settings["start_bin"])
        assert amax.shape == ()
        assert amax.dtype == torch.float32
        assert abs(float(amax) - expected[method]) <= 1.001 * reference.width


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_ranges_of_the_gpu_are_those_of_the_cpu(kind, seed, gpu):
    batches, settings = case(kind, seed)
    start_bin = settings.pop("start_bin")
    calibrators = {}
    for device in (torch.device("cpu"), gpu):
        calibrators[device] = calib.HistogramCalibrator(axis=None, **settings)
        for batch in batches:
            calibrators[device].collect(torch.from_numpy(batch).to(device))
    expected, calibrator = calibrators.values()
    assert torch.equal(calibrator._calib_hist.cpu(), expected._calib_hist)
    assert torch.equal(calibrator._calib_bin_edges.cpu(), expected._calib_bin_edges)
    for method in METHODS:
        amax = calibrator.compute_amax(method, start_bin=start_bin)
        assert amax.device == gpu
        assert torch.equal(amax.cpu(), expected.compute_amax(method, start_bin=start_bin))


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_stride(stride):
    data = np.random.default_rng(0).laplace(0, 1, 5000).astype(np.float32)
    reference = Reference([data], num_bins=512, start_bin=64, stride=stride)
    calibrator = calib.HistogramCalibrator(8, None, False, num_bins=512)
    calibrator.collect(torch.from_numpy(data))
    for method in ("entropy", "mse"):
        amax = calibrator.compute_amax(method, stride=stride, start_bin=64)
        assert float(amax) == pytest.approx(reference.solve(method), rel=1e-6)


@pytest.mark.parametrize("percentile", [0, 0.5, 50, 99, 99.9, 99.99, 99.999])
def test_percentiles(percentile):
    data = np.random.default_rng(0).standard_t(3, 30000).astype(np.float32)
    calibrator = calib.HistogramCalibrator(8, None, False)
    calibrator.collect(torch.from_numpy(data))
    expected = Reference([data]).percentile(percentile)
    assert calibrator.compute_amax("percentile", percentile=percentile) == np.float32(expected)


class TestFP8:
    @pytest.fixture
    def calibrator(self):
        calibrator = calib.HistogramCalibrator((4, 3), None, False, num_bins=512)
        calibrator.collect(
            torch.from_numpy(np.random.default_rng(0).standard_t(2, 5000).astype(np.float32))
        )
        return calibrator

    def test_mse_by_scaled_e4m3(self, calibrator):
        edges, counts = calibrator._calib_bin_edges, calibrator._calib_hist
        centres = (edges[:-1] + edges[1:]) / 2
        errors = [
            (counts * (scaled_e4m3(centres, centres[i]) - centres) ** 2).sum().item()
            for i in range(64, len(centres))
        ]
        found = calibrator.compute_amax("mse", start_bin=64)
        assert float(found) == pytest.approx(float(centres[64 + int(np.argmin(errors))]), rel=1e-6)

    def test_percentile_needs_no_codes(self, calibrator):
        twin = calib.HistogramCalibrator(8, None, False, num_bins=512)
        twin._calib_hist, twin._calib_bin_edges = (
            calibrator._calib_hist,
            calibrator._calib_bin_edges,
        )
        assert calibrator.compute_amax("percentile") == twin.compute_amax("percentile")

    def test_entropy_is_refused(self, calibrator):
        with pytest.raises(NotImplementedError, match="entropy") as caught:
            calibrator.compute_amax("entropy")
        assert isinstance(caught.value, QdqError)


def test_ranges_that_the_quantizer_erases_are_no_better_than_each_other():
    """`fake_tensor_quant` gives zeros where amax <= 2^-24; the first of equal errors wins."""
    calibrator = calib.HistogramCalibrator(8, None, False, num_bins=256)
    calibrator.collect(torch.linspace(0, 2.0**-25, 1000))
    assert calibrator.compute_amax("mse") == torch.tensor(
        128.5 * 2.0**-25 / 256, dtype=torch.float32
    )


class TestTies:
    """Equal errors: the first wins for "mse", the last for "entropy"."""

    def solved(self, counts, method, **arguments):
        calibrator = calib.HistogramCalibrator(8, None, False)
        calibrator._calib_hist = np.array(counts)
        calibrator._calib_bin_edges = np.arange(len(counts) + 1.0)
        return float(calibrator.compute_amax(method, **arguments))

    def test_mse(self):
        counts = np.zeros(2000, dtype=int)
        counts[10] = (
            5  # 10.5 = 7 (190.5 / 127) = 3 (444.5 / 127) = 1 (1333.5 / 127), without any error
        )
        assert self.solved(counts, "mse") == 190.5
        assert self.solved(counts, "mse", start_bin=191) == 444.5

    def test_entropy(self):
        counts = np.random.default_rng(0).integers(1, 9, 128)
        # up to 128 bins every bin is its own group, nothing is lost
        assert self.solved([*counts[:100], *[0] * 28], "entropy", start_bin=100) == 128

    def test_entropy_where_nothing_is_finite(self):
        counts = [0] * 130
        counts[129] = counts[64] = 1
        assert self.solved(counts, "entropy", start_bin=70, stride=30) == 130
        assert self.solved(counts, "entropy", start_bin=70, stride=25) == 120


class TestArguments:
    @pytest.fixture
    def calibrator(self):
        calibrator = calib.HistogramCalibrator(8, None, False, num_bins=100)
        calibrator.collect(torch.linspace(0, 2, 1000))
        return calibrator

    def refused(self, calibrator, kind, words, method, **arguments):
        with pytest.raises(kind, match=words) as caught:
            calibrator.compute_amax(method, **arguments)
        assert isinstance(caught.value, QdqError)

    def test_method(self, calibrator):
        self.refused(calibrator, TypeError, "Unknown calibration method", "kl")
        with pytest.raises(TypeError):
            calibrator.compute_amax()

    @pytest.mark.parametrize("percentile", [-0.1, 100.1, math.nan])
    def test_percentile(self, calibrator, percentile):
        words = "Invalid percentile. Must be in range"
        self.refused(calibrator, ValueError, words, "percentile", percentile=percentile)

    @pytest.mark.parametrize(
        "arguments",
        [{"stride": 0}, {"stride": -1}, {"start_bin": -1}, {"start_bin": 0, "method": "entropy"}],
    )
    def test_bins(self, calibrator, arguments):
        self.refused(calibrator, ValueError, "or more", **({"method": "mse"} | arguments))
        self.refused(calibrator, TypeError, "integer", "mse", stride=1.5)

    @pytest.mark.parametrize(
        ("num_bits", "unsigned"), [(0, False), (1, False), (1, True), (17, False), (32, True)]
    )
    def test_width_without_a_solver(self, num_bits, unsigned):
        calibrator = calib.HistogramCalibrator(num_bits, None, unsigned)
        calibrator.collect(torch.ones(3))
        assert calibrator.compute_amax("percentile", percentile=100) == 1
        for method in ("mse", "entropy"):
            self.refused(calibrator, ValueError, "num_bits", method)

    def test_other_fp8(self):
        calibrator = calib.HistogramCalibrator((5, 2), None, False)
        calibrator.collect(torch.ones(3))
        for method in ("mse", "entropy"):
            self.refused(calibrator, NotImplementedError, "num_bits", method)

    @pytest.mark.parametrize("method", ["mse", "entropy"])
    def test_fewer_bins_than_start_bin(self, calibrator, method, caplog):
        assert calibrator.compute_amax(method) == 2
        assert "last edge" in caplog.text

    def test_percentile_100_is_the_last_edge(self, calibrator):
        assert calibrator.compute_amax("percentile", percentile=100) == 2

    def test_mostly_zeros(self, caplog):
        calibrator = calib.HistogramCalibrator(8, None, False, num_bins=100)
        calibrator.collect(torch.cat([torch.zeros(10**6), torch.ones(1)]))
        assert calibrator.compute_amax("percentile") == pytest.approx(0.01)
        assert "skip_zeros" in caplog.text
        assert "max" in caplog.text


def test_solving_again_is_as_solving_afresh():
    data = torch.randn(20000)

    def fresh():
        calibrator = calib.HistogramCalibrator(8, None, False)
        calibrator.collect(data)
        return calibrator

    calibrator = fresh()
    counts = calibrator._calib_hist.clone()
    for method in (*METHODS, *METHODS[::-1]):
        assert calibrator.compute_amax(method) == fresh().compute_amax(method)
        assert torch.equal(calibrator._calib_hist, counts)
        calibrator.compute_amax(method).fill_(7)
