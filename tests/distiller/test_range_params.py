"""Scale and zero point of ranges, and codes, against published and golden values and exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from golden import read_cases, read_golden

from qdq.distiller import (
    LinearQuantMode,
    asymmetric_linear_quantization_params,
    get_quantized_range,
    solve_params,
    solve_weight,
    symmetric_linear_quantization_params,
)
from qdq.errors import ArgumentError, ArgumentTypeError


def as_argument(value):
    return torch.tensor(value) if isinstance(value, list) else value


def solve(case):
    if case["kind"] == "symmetric":
        saturation = as_argument(case["saturation"])
        return symmetric_linear_quantization_params(
            case["num_bits"], saturation, case["restrict_qrange"]
        )
    return asymmetric_linear_quantization_params(
        case["num_bits"],
        as_argument(case["min"]),
        as_argument(case["max"]),
        integral_zero_point=case["integral_zero_point"],
        signed=case["signed"],
    )


@pytest.mark.parametrize("case", read_cases("distiller_qparams"))
def test_golden_ranges(case):
    expected = case["expected"]
    if "error" in expected:
        with pytest.raises(ValueError, match=r"must be at least 0|min not above max"):
            solve(case)
        return
    scale, zero_point = solve(case)
    assert isinstance(scale, float) == isinstance(zero_point, float) == case["scalar_in"]
    torch.testing.assert_close(
        torch.as_tensor(scale), torch.tensor(expected["scale"]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        torch.as_tensor(zero_point), torch.tensor(expected["zero_point"]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("case", read_cases("distiller_code_ranges"))
def test_golden_code_ranges(case):
    codes = get_quantized_range(case["num_bits"], case["signed"], case["restricted"])
    assert list(codes) == case["expected"]


def test_restricted_codes_leave_out_the_lowest():
    assert get_quantized_range(8, True, True) == (-127, 127)


@pytest.mark.parametrize("case", read_cases("distiller_weight_codes"))
def test_golden_weight_codes(case):
    weight = torch.tensor(read_golden("distiller_weight_codes")["weight"])
    axis = 0 if case["per_channel"] else None
    params = solve_weight(weight, case["num_bits"], LinearQuantMode[case["mode"]], axis=axis)
    codes = params.quantize(weight)
    torch.testing.assert_close(params.scale.flatten(), torch.tensor(case["scale"]))
    torch.testing.assert_close(params.zero_point.flatten(), torch.tensor(case["zero_point"]))
    torch.testing.assert_close(codes, torch.tensor(case["codes"]), rtol=0, atol=0)
    torch.testing.assert_close(params.dequantize(codes), torch.tensor(case["values"]))
    torch.testing.assert_close(params.fake_quantize(weight), torch.tensor(case["values"]))


def test_codes_are_those_of_exact_arithmetic_on_the_decimals():
    """0.6 * 127.5 is the tie 76.5, though the float32 nearest to 0.6 is above it."""
    decimals = [f"0.{digits:03d}" for digits in range(1000)]
    values = torch.tensor([float(decimal) for decimal in decimals])
    params = solve_params(-1.0, 1.0, 8, LinearQuantMode.SYMMETRIC)
    exact = [round(Fraction(decimal) * Fraction(255, 2)) for decimal in decimals]
    assert params.quantize(values).tolist() == exact


def test_the_range_is_a_product_with_the_inverse():
    """For 7, 127.5 / 7 rounded once gives code 127 for -7, and the inverse gives the published -128."""
    params = solve_params(-7.0, 7.0, 8, LinearQuantMode.SYMMETRIC)
    assert params.quantize(torch.tensor([-7.0])).item() == -128


@pytest.mark.parametrize("mode", LinearQuantMode)
@pytest.mark.parametrize("num_bits", [2, 3, 8, 16])
def test_values_are_near_and_zero_stays(mode, num_bits):
    generator = torch.Generator().manual_seed(num_bits)
    values = torch.randn(1000, generator=generator) + 0.5
    params = solve_params(values.min(), values.max(), num_bits, mode)
    codes = params.quantize(values)
    assert params.lowest <= codes.min()
    assert codes.max() <= params.highest
    # Symmetric full range: the largest value is half a step above the highest code.
    step = 1 / float(params.scale)
    assert (params.dequantize(codes) - values).abs().max() <= step * (1 + 1e-3)
    assert params.fake_quantize(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("mode", LinearQuantMode)
@pytest.mark.parametrize("ends", [(-3e38, 3e38), (0.0, 3.4e38), (0.0, 1e-45), (-1e-38, 0.0)])
def test_extreme_ranges_stay_finite(mode, ends):
    values = torch.tensor(ends)
    params = solve_params(*ends, 8, mode)
    assert torch.isfinite(params.scale).all()
    assert params.scale > 0
    assert torch.isfinite(params.fake_quantize(values)).all()


@pytest.mark.parametrize("mode", LinearQuantMode)
def test_a_range_without_width_has_scale_1(mode):
    params = solve_params(0.0, 0.0, 8, mode)
    assert params.scale == 1
    assert params.fake_quantize(torch.zeros(2)).tolist() == [0, 0]


def test_half_types_keep_their_type_and_their_input():
    values = torch.tensor([-1.0, 0.25, 6e4], dtype=torch.float16)
    before = values.clone()
    quantized = solve_params(-6e4, 6e4, 8, LinearQuantMode.SYMMETRIC).fake_quantize(values)
    assert quantized.dtype is torch.float16
    assert torch.isfinite(quantized).all()
    assert torch.equal(values, before)


@pytest.mark.parametrize("mode", LinearQuantMode)
def test_the_grid_has_the_same_values(mode):
    values = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    params = solve_weight(values, 8, mode, axis=0)
    grid = params.describe("test")
    codes = (values / grid.scale[:, None] + grid.zero_point[:, None]).round()
    codes = codes.clamp(grid.lowest, grid.highest)
    expected = (codes - grid.zero_point[:, None]) * grid.scale[:, None]
    # A tie may go the other way, since 1 / s is rounded: the ends of a symmetric range are ties.
    distance = ((values * params.scale) % 1 - 0.5).abs()
    is_tie = distance < 1e-4
    assert is_tie.sum() < values.numel() / 4
    torch.testing.assert_close(expected[~is_tie], params.fake_quantize(values)[~is_tie])
    assert grid.obstacle == ""


def test_wide_codes_are_an_obstacle():
    grid = solve_params(-1.0, 1.0, 9, LinearQuantMode.SYMMETRIC).describe("test")
    assert grid.obstacle == "9 bits"


@pytest.mark.parametrize("num_bits", [0, -1, 33])
def test_other_widths_are_refused(num_bits):
    with pytest.raises(ArgumentError, match=f"bits is {num_bits}"):
        solve_params(-1.0, 1.0, num_bits, LinearQuantMode.SYMMETRIC)


def test_restricted_codes_of_one_bit_are_refused():
    with pytest.raises(ArgumentError, match="bits is 1; it must be 2"):
        solve_params(-1.0, 1.0, 1, LinearQuantMode.SYMMETRIC_RESTRICTED)


def test_a_width_of_another_type_is_refused():
    with pytest.raises(ArgumentTypeError, match="a float"):
        get_quantized_range(8.0)


@pytest.mark.parametrize("end", [float("nan"), float("inf")])
def test_ends_that_are_not_finite_are_refused(end):
    with pytest.raises(ArgumentError, match=rf"min 0.0 and max {end}"):
        solve_params(0.0, end, 8, LinearQuantMode.ASYMMETRIC_UNSIGNED)
