"""Solvers against loops written from the definition, closed forms and published figures."""

import math
from inspect import signature
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qdq.cli.calibrate
from qdq import ArgumentError, ArgumentTypeError
from qdq.formats import FP8, Format
from qdq.observers.aciq import gauss_ratio, laplace_ratio
from qdq.observers.collector import TensorCollector
from qdq.observers.entropy import solve_entropy
from qdq.observers.max import reduce_amax
from qdq.observers.methods import DEFAULT_PERCENTILE
from qdq.observers.mse import solve_mse
from qdq.observers.percentile import solve_percentile
from qdq.observers.solve import SOLVERS, list_methods, solve_amax
from qdq.observers.tensor_statistics import TensorStatistics


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
        if not candidate.any():
            continue
        p, q = reference / reference.sum(), candidate / candidate.sum()
        positive = p > 0
        divergence = (
            np.inf
            if np.any(q[positive] == 0)
            else np.sum(p[positive] * np.log(p[positive] / q[positive]))
        )
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
    magnitudes = np.abs(data.astype(np.float64))
    width = magnitudes.max() / num_bins
    return np.histogram(magnitudes, num_bins, (0, magnitudes.max()))[0], width


def statistics_of(*batches):
    collector = TensorCollector()
    for batch in batches:
        collector.collect(torch.as_tensor(batch))
    return collector.statistics()


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(8, unsigned=True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_equals_brute_force(kind, fmt):
    counts, width = histogram_of(samples(kind))
    expected, errors = brute_mse(counts, width, fmt)
    amax = solve_mse(counts, width, fmt)
    assert errors[round(amax / width - 0.5) - 128] <= min(errors) * (1 + 1e-9)
    assert abs(amax - expected) <= width * 1.001 or errors[round(amax / width - 0.5) - 128] == min(
        errors
    )


@pytest.mark.parametrize(
    "fmt", [Format(), Format(4), Format(8, unsigned=True), Format(12)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_equals_brute_force(kind, fmt):
    counts, width = histogram_of(samples(kind), 512)
    assert solve_entropy(counts, width, fmt) == pytest.approx(
        brute_entropy(counts, width, fmt), abs=width * 1.001
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=140, max_size=260).filter(
        lambda counts: sum(counts[1:]) > 0
    )
)
def test_solvers_on_any_counts(counts):
    counts = np.array(counts)
    assert solve_entropy(counts, 1.0, Format()) == pytest.approx(
        brute_entropy(counts, 1.0, Format()), abs=1.001
    )
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


def test_entropy_of_500_random_histograms():
    """Few bins, so that the loop over candidates stays quick; formats, gaps and outliers vary."""
    rng = np.random.default_rng(0)
    for case in range(500):
        fmt = Format(int(rng.integers(2, 6)), bool(case % 2))
        size = int(rng.integers(fmt.qmax + 2, 97))
        counts = rng.integers(0, 1000, size) * (rng.random(size) < rng.uniform(0.2, 1))
        counts[rng.integers(0, size)] += 1 + (case % 3) * 10**5
        if not counts[1:].any():
            continue
        start = fmt.qmax + 1
        expected = brute_entropy(counts, 0.25, fmt, start)
        assert solve_entropy(counts, 0.25, fmt, start_bin=start) == expected, (case, counts)


@pytest.mark.parametrize(
    "fmt", [Format(), Format(3), Format(8, unsigned=True), Format(6, unsigned=True)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_of_statistics_is_the_best_for_the_values(kind, fmt):
    """No range on a fine grid quantizes the data itself with less than 99 % of the error."""
    data = samples(kind).astype(np.float64)
    data = np.maximum(data, 0) if fmt.unsigned else data

    def error(amax):
        scale = amax / fmt.qmax
        return np.sum((np.clip(np.rint(data / scale), -fmt.qmax, fmt.qmax) * scale - data) ** 2)

    result = solve_amax(statistics_of(data), fmt, "mse")
    assert error(result) <= 1.01 * min(
        map(error, np.linspace(np.abs(data).max() / 400, np.abs(data).max(), 400))
    )


def test_laplace_and_gauss_are_those_of_the_paper():
    """Banner et al. 2019, section 3.1: best amax for 2, 3, 4 bits with 2^bits levels."""
    assert [laplace_ratio(2 ** (bits - 1)) for bits in (2, 3, 4)] == pytest.approx(
        [2.83, 3.89, 5.03], abs=0.01
    )
    assert [gauss_ratio(2 ** (bits - 1)) for bits in (2, 3, 4)] == pytest.approx(
        [1.71, 2.15, 2.55], abs=0.01
    )


@pytest.mark.parametrize("qmax", [1, 7, 127, 32767])
def test_laplace_and_gauss_minimize_the_integral(qmax):
    """The expected error, integrated numerically, is no smaller a little to either side."""
    x = np.linspace(0, 60, 600_001)

    def error(density, amax):
        tail = np.where(x > amax, (x - amax) ** 2, 0) * density
        return 2 * np.trapezoid(tail, x) + (amax / qmax) ** 2 / 12

    for density, best in (
        (np.exp(-x) / 2, laplace_ratio(qmax)),
        (np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), gauss_ratio(qmax)),
    ):
        assert all(error(density, best) < error(density, best * factor) for factor in (0.98, 1.02))


@pytest.mark.parametrize("num_bits", range(2, 17))
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("method", SOLVERS)
def test_every_method_and_width(method, num_bits, unsigned):
    fmt = Format(num_bits, unsigned)
    for data in (
        torch.randn(500),
        torch.full((5,), 0.3),
        torch.tensor([0.0, 0.0, 1e-30]),
        torch.tensor([1e30, 1e-3]),
    ):
        amax = solve_amax(statistics_of(data), fmt, method)
        largest = float(data.max() if unsigned else data.abs().max())
        assert 0 < amax <= largest


@pytest.mark.parametrize("method", SOLVERS)
def test_nothing_to_solve(method):
    for fmt in (Format(), Format(8, unsigned=True)):
        assert solve_amax(TensorStatistics.empty(), fmt, method) == 0
        assert solve_amax(statistics_of(torch.zeros(5)), fmt, method) == 0
    assert solve_amax(statistics_of(-torch.rand(5)), Format(8, unsigned=True), method) == 0


def test_moments_and_maxima():
    batches = [
        torch.tensor([1.0, -2.0, 0.5, 0.25]),
        torch.tensor([8.0, 1.0, 0.0, 0.0]),
        torch.tensor([4.0, 0.0]),
    ]
    statistics = statistics_of(*batches)
    values = torch.cat(batches).double()
    assert solve_amax(statistics, Format(), "max") == 8
    assert solve_amax(statistics, Format(), "average_max") == pytest.approx((2 + 8 + 4) / 3)
    assert (
        solve_amax(statistics, Format(), "moving_average", weight=0.5)
        == 0.5 * (0.5 * 2 + 0.5 * 8) + 0.5 * 4
    )
    expected = values.mean() + 1.5 * values.std(correction=0)
    assert solve_amax(statistics, Format(), "mean_std", num_std=1.5) == pytest.approx(
        expected.item()
    )
    assert solve_amax(statistics, Format(), "mean_std") == 8  # cut to the largest value


def test_zeros_of_a_relu_change_no_fit():
    data = torch.randn(4000)
    for method in ("laplace", "gauss"):
        with_zeros = statistics_of(torch.cat([data, torch.zeros(9000)]))
        assert solve_amax(with_zeros, Format(4), method) == pytest.approx(
            solve_amax(statistics_of(data), Format(4), method)
        )


def test_unsigned_formats_do_not_see_negative_values():
    data = torch.cat([torch.rand(5000), torch.full((2000,), -0.9)])
    fmt = Format(8, unsigned=True)
    for method in ("percentile", "entropy", "mse"):
        assert solve_amax(statistics_of(data), fmt, method) == solve_amax(
            statistics_of(data[data >= 0]), fmt, method
        )


def test_options():
    statistics = statistics_of(torch.randn(1000))
    assert solve_amax(statistics, Format(), "percentile", percentile=50) == pytest.approx(
        0.67, abs=0.1
    )
    for method, options, words in [
        ("kl", {}, "unknown calibration method 'kl'"),
        ("mse", {"percentile": 3}, "no option percentile"),
        ("percentile", {"percentile": 101}, "Invalid percentile"),
        ("mean_std", {"num_std": 0}, "num_std is 0"),
        ("moving_average", {"weight": 2}, "weight is 2"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            solve_amax(statistics, Format(), method, **options)


class TestReduceAmax:
    @pytest.mark.parametrize("axis", [(0,), (0, 2), [-1, 1], (0, 1, 2), ()])
    def test_several_axes(self, axis):
        data = np.random.default_rng(0).normal(0, 1, (4, 5, 6)).astype(np.float32)
        reduced_axes = tuple({0, 1, 2} - {dim % 3 for dim in axis})
        amax = reduce_amax(torch.from_numpy(data), axis)
        np.testing.assert_array_equal(amax.numpy(), np.abs(data).max(reduced_axes, keepdims=True))

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


def test_unsigned_maxima_are_of_the_values_above_zero():
    batches = [torch.tensor([-100.0, 1.7]), torch.tensor([-100.0, 1.0])]
    statistics, unsigned = statistics_of(*batches), Format(unsigned=True)
    assert solve_amax(statistics, unsigned, "average_max") == pytest.approx(1.35)
    assert solve_amax(statistics, unsigned, "moving_average") == pytest.approx(1.63)


@pytest.mark.parametrize(
    "data", [1 + torch.rand(10_000), torch.full((100,), 3.0)], ids=["away from 0", "constant"]
)
def test_entropy_does_not_clip_everything(data):
    statistics = statistics_of(data)
    assert statistics.clipped_share(solve_amax(statistics, Format(), "entropy")) <= 0.5


def test_the_default_percentile_is_the_same_everywhere():
    root = Path(qdq.__file__).parents[1]
    row = f"| {DEFAULT_PERCENTILE} | for"
    assert row in (root / "docs" / "calibrate.md").read_text(encoding="utf-8")
    assert row in (root / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"{DEFAULT_PERCENTILE} by default" in qdq.cli.calibrate.solve.__doc__
    for function in (qdq.calibrate_model, qdq.solve_ranges, qdq.Calibration):
        assert signature(function).parameters["percentile"].default == DEFAULT_PERCENTILE


class TestFP8:
    @pytest.mark.parametrize("kind", ["normal", "heavy"])
    def test_mse_equals_brute_force(self, kind):
        rng = np.random.default_rng(1)
        values = rng.normal(size=4000) if kind == "normal" else rng.standard_t(2, size=4000)
        counts, edges = np.histogram(np.abs(values), 300, (0, np.abs(values).max()))
        centres = (edges[1:] + edges[:-1]) / 2
        errors = []
        for amax in centres[8:]:
            ratio = np.clip(centres * (448 / amax), -448, 448)
            codes = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            errors.append(np.sum(counts * (codes * (amax / 448) - centres) ** 2))
        amax = solve_mse(counts, edges[1], FP8, start_bin=8)
        chosen = int(np.argmin(np.abs(centres[8:] - amax)))
        assert errors[chosen] <= min(errors) * (1 + 1e-9)

    @pytest.mark.parametrize("method", ["entropy", "laplace", "gauss"])
    def test_methods_with_equal_steps_are_refused(self, method):
        statistics = statistics_of(torch.randn(1000))
        with pytest.raises(ArgumentError, match=f"'{method}' is for integer codes"):
            solve_amax(statistics, FP8, method)

    def test_all_others_give_a_range(self):
        statistics = statistics_of(torch.randn(1000))
        for method in list_methods(FP8):
            assert 0 < solve_amax(statistics, FP8, method) <= statistics.absmax

    def test_sqnr_of_rounding(self):
        values = torch.randn(100_000)
        statistics = statistics_of(values)
        ratio = values * (448 / 3)
        codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).double()
        noise = (codes * (3 / 448) - values.double()).square().sum()
        expected = 10 * float((values.double().square().sum() / noise).log10())
        assert statistics.rounding_sqnr_db(3.0, FP8) == pytest.approx(expected, abs=0.1)
