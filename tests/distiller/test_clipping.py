"""Clip modes against golden values, and against brute force over each channel."""

import math

import pytest
import torch
from golden import read_cases, read_golden

from qdq.distiller import (
    ClipMode,
    LinearQuantMode,
    RangeStatistics,
    find_clip_constant,
    solve_clipped,
    solve_tensor,
    solve_weight,
    statistics_of,
)
from qdq.distiller.ranges.aciq import solve_clip_constant
from qdq.errors import ArgumentError

SYMMETRIC = LinearQuantMode.SYMMETRIC
UNSIGNED = LinearQuantMode.ASYMMETRIC_UNSIGNED
GOLDEN = read_golden("distiller_clip_modes")
TENSOR = torch.tensor(GOLDEN["tensor"])


def solve(case):
    settings = (
        case["num_bits"],
        LinearQuantMode[case["mode"]],
        ClipMode[case["clip"]],
        case["clip_n_stds"],
        case["half_range"],
    )
    if case["source"] == "tensor":
        return solve_tensor(TENSOR, *settings)
    return solve_clipped(RangeStatistics(**GOLDEN["stats"]), *settings)


def find_uncut_window(case):
    """The window of LAPLACE and GAUSS as the golden values have it, in float64."""
    from_tensor = case["source"] == "tensor"
    record = GOLDEN["stats"]
    std = TENSOR.double().std().item() if from_tensor else record["std"]
    is_symmetric = not case["mode"].startswith("ASYMMETRIC")
    half_range = case["half_range"] and not is_symmetric
    name = case["clip"].lower()
    deviation = record["b"] if name == "laplace" else std
    alpha = deviation * find_clip_constant(name, case["num_bits"], half_range)
    if is_symmetric:
        return -abs(record["mean"]) - alpha, abs(record["mean"]) + alpha
    low = max(record["min" if from_tensor else "avg_min"], record["mean"] - alpha)
    return low, low + (alpha if half_range else 2 * alpha)


def exceeds_the_data(case):
    if case["clip"] not in ("LAPLACE", "GAUSS"):
        return False
    record = GOLDEN["stats"]
    _, high = find_uncut_window(case)
    largest = record["max"]
    if not case["mode"].startswith("ASYMMETRIC"):
        largest = max(largest, -record["min"])
    return high > largest * (1 + 1e-6)


@pytest.mark.parametrize("case", [case for case in GOLDEN["cases"] if not exceeds_the_data(case)])
def test_golden_clip_modes(case):
    params, expected = solve(case), case["expected"]
    assert float(params.scale) == pytest.approx(expected["scale"], rel=1e-4)
    assert float(params.zero_point) == expected["zero_point"]
    # The source shows the ends of signed asymmetric codes as if they were unsigned.
    shift = 2 ** (case["num_bits"] - 1) if case["mode"] == "ASYMMETRIC_SIGNED" else 0
    low, high = expected["clip_min"], expected["clip_max"]
    lowest, highest = params.lowest + shift, params.highest + shift
    if case["mode"] == "SYMMETRIC_RESTRICTED":
        lowest -= 1  # it also shows a code below the restricted ones
    ends = params.dequantize(torch.tensor([lowest, highest]))
    assert ends.tolist() == pytest.approx([low, high], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", [case for case in GOLDEN["cases"] if exceeds_the_data(case)])
def test_a_window_beyond_the_data_is_cut_to_them(case):
    params = solve(case)
    low, _ = find_uncut_window(case)
    largest = GOLDEN["stats"]["max"]
    num_steps = {"SYMMETRIC": (2 ** case["num_bits"] - 1) / 2}
    num_steps["SYMMETRIC_RESTRICTED"] = 2 ** (case["num_bits"] - 1) - 1
    width = largest
    if case["mode"].startswith("ASYMMETRIC"):
        width = largest - min(low, 0)
    expected = num_steps.get(case["mode"], 2 ** case["num_bits"] - 1) / width
    assert float(params.scale) == pytest.approx(expected, rel=1e-4)
    assert float(params.scale) > case["expected"]["scale"]


def test_both_kinds_of_golden_clip_modes_occur():
    num_beyond = sum(map(exceeds_the_data, GOLDEN["cases"]))
    assert 0 < num_beyond < len(GOLDEN["cases"]) / 2


@pytest.mark.parametrize("table", read_cases("distiller_aciq_table"))
def test_golden_constants(table):
    distribution = table["table"].removeprefix("alpha_")
    for num_bits, constant in table["values"].items():
        assert find_clip_constant(distribution, int(num_bits)) == constant


@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
def test_the_equations_reproduce_the_table_to_its_digits(distribution, half_range):
    for num_bits in range(1, 9):
        constant = solve_clip_constant(distribution, num_bits + half_range)
        table = find_clip_constant(distribution, num_bits, half_range)
        num_digits = len(str(table).partition(".")[2])
        assert abs(constant - table) < 10**-num_digits  # some entries are cut, not rounded


@pytest.mark.parametrize("num_bits", [1, 4, 8, 12, 16])
def test_the_constants_solve_their_equations(num_bits):
    constant = solve_clip_constant("laplace", num_bits)
    assert constant * math.exp(constant) == pytest.approx(3 * 4**num_bits)
    constant = solve_clip_constant("gauss", num_bits)
    standard = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    # Survival by symmetry, so that it keeps its digits far from 0.
    tail = standard.cdf(torch.tensor(-constant, dtype=torch.float64)).item()
    density = standard.log_prob(torch.tensor(constant, dtype=torch.float64)).exp().item()
    assert density - constant * tail == pytest.approx(constant / (6 * 4**num_bits), rel=1e-6)


def test_more_than_8_bits_have_constants_too():
    for distribution in ("laplace", "gauss"):
        constants = [find_clip_constant(distribution, num_bits) for num_bits in range(1, 33)]
        assert constants == sorted(constants)
    params = solve_tensor(TENSOR, 12, SYMMETRIC, ClipMode.LAPLACE)
    assert float(params.scale) == pytest.approx(4095 / 2 / 4.1674, rel=1e-4)


@pytest.mark.parametrize("clip", [ClipMode.NONE, ClipMode.AVG, ClipMode.LAPLACE, ClipMode.GAUSS])
@pytest.mark.parametrize("mode", [SYMMETRIC, UNSIGNED])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_has_what_it_has_alone(clip, mode, axis):
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) ** 3
    params = solve_weight(weight, 4, mode, clip, axis=axis)
    assert params.scale.numel() == weight.shape[axis]
    assert torch.broadcast_to(params.scale, weight.shape).shape == weight.shape
    for number, channel in enumerate(weight.unbind(axis)):
        alone = solve_tensor(channel.flatten(), 4, mode, clip)
        scale = params.scale.flatten()[number]
        torch.testing.assert_close(scale, alone.scale)
        assert params.zero_point.flatten()[number] == alone.zero_point


def test_statistics_of_a_tensor():
    values = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    statistics = statistics_of(values)
    assert (statistics.min, statistics.max) == (0, 23)
    assert (statistics.avg_min, statistics.avg_max) == (6, 17)
    assert statistics.mean == 11.5
    assert statistics.std == pytest.approx(math.sqrt(24 * 25 / 12))
    assert statistics.b == 6


def test_one_value_has_no_deviation():
    assert statistics_of(torch.tensor([3.0])).std == 0
    params = solve_tensor(torch.tensor([3.0]), 8, SYMMETRIC, ClipMode.GAUSS)
    assert params.fake_quantize(torch.tensor([3.0])).item() == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("clip", ClipMode)
@pytest.mark.parametrize("mode", LinearQuantMode)
@pytest.mark.parametrize("mean", [-100.0, 100.0])
def test_a_range_that_a_relu6_has_cut_stays_a_range(clip, mode, mean):
    """The mean before it may be outside."""
    cut = RangeStatistics(0.0, 6.0, 0.0, 6.0, mean, 1.0, 0.8)
    params = solve_clipped(cut, 8, mode, clip, 2.0, half_range=True)
    values = params.fake_quantize(torch.tensor([0.0, 6.0]))
    assert torch.isfinite(values).all()
    assert values[0] == 0


def test_n_std_needs_a_number():
    for n_stds in (None, 0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="clip_n_stds"):
            solve_tensor(TENSOR, 8, SYMMETRIC, ClipMode.N_STD, n_stds)


def test_n_std_is_not_for_channels():
    with pytest.raises(ValueError, match="N_STD with weights per channel"):
        solve_weight(TENSOR, 8, SYMMETRIC, ClipMode.N_STD, 2.0, axis=0)


@pytest.mark.parametrize(
    ("clip", "name"), [(ClipMode.LAPLACE, "b"), (ClipMode.GAUSS, "std"), (ClipMode.N_STD, "std")]
)
def test_statistics_of_one_pass_are_not_enough(clip, name):
    first_pass = RangeStatistics(-1.0, 1.0, -0.5, 0.5, 0.0)
    with pytest.raises(ArgumentError, match=f"have no {name}"):
        solve_clipped(first_pass, 8, SYMMETRIC, clip, 2.0)


@pytest.mark.parametrize("clip", ClipMode)
def test_a_mean_is_for_the_modes_that_clip_about_it(clip):
    ends = RangeStatistics(-1.0, 1.0, -0.5, 0.5, None, 0.3, 0.2)
    if clip in (ClipMode.NONE, ClipMode.AVG):
        amax = 1.0 if clip is ClipMode.NONE else 0.5
        assert float(solve_clipped(ends, 8, SYMMETRIC, clip).scale) == 127.5 / amax
        return
    with pytest.raises(ArgumentError, match=f"have no mean, which {clip.name} needs"):
        solve_clipped(ends, 8, SYMMETRIC, clip, 2.0)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, float("nan")])])
def test_tensors_without_a_range_are_refused(values):
    with pytest.raises(ArgumentError, match=r"is empty|not finite"):
        solve_tensor(values, 8, SYMMETRIC)
