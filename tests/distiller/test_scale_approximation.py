"""Scales as multiplier and shift against golden values and the bound of the error."""

import pytest
import torch
from golden import read_cases

from qdq.distiller import approximate_scale, evaluate_approximation


@pytest.mark.parametrize("case", read_cases("distiller_scale_approx"))
def test_golden_approximations(case):
    scale = torch.tensor(case["scale"])
    multiplier, shift = approximate_scale(scale, case["mult_bits"], case["limit"])
    assert (multiplier, shift) == (case["multiplier"], case["shift"])
    assert evaluate_approximation(multiplier, shift).item() == pytest.approx(case["approx"])


@pytest.mark.parametrize("num_bits", [2, 5, 8, 16])
def test_the_error_is_below_its_bound(num_bits):
    scales = torch.logspace(-8, 8, 1001)
    multiplier, shift = approximate_scale(scales, num_bits)
    assert multiplier.max() <= 2**num_bits - 1
    error = (scales - multiplier / 2**shift) / scales
    assert error.min() >= 0
    assert error.max() < 2 / (2**num_bits - 1)


def test_a_limited_shift_is_at_most_the_width():
    scales = torch.tensor([1e-4, 0.3, 20.0])
    multiplier, shift = approximate_scale(scales, 8, limit=True)
    assert shift.tolist() == [8, 8, 3]
    assert multiplier.tolist() == [0, 76, 160]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(ValueError, match="finite and above 0"):
        approximate_scale(torch.tensor([1.0, scale]), 8)
