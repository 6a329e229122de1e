"""Functions under the names of Distiller: codes and scales in numpy, and numbers that are none."""

import numpy as np
import pytest
import torch
from golden import read_cases

from qdq import distiller
from qdq.errors import ArgumentError, ArgumentTypeError, QdqError

VALUES = torch.tensor([[-1.0, 0.25, 0.5], [0.75, 3.0, -0.1]])


@pytest.mark.parametrize(("scale", "zero_point"), [(10, -3), ([10.0, 2.0, 4.0], [0.0, 1.0, -1.0])])
def test_codes_and_values_are_their_formulas(scale, zero_point):
    exact = VALUES.double().numpy()
    codes = np.rint(np.multiply(scale, exact) - zero_point)
    result = distiller.linear_quantize(VALUES, scale, zero_point)
    np.testing.assert_array_equal(result.numpy(), codes)
    clamped = distiller.linear_quantize_clamp(VALUES, scale, zero_point, -2, 5)
    np.testing.assert_array_equal(clamped.numpy(), codes.clip(-2, 5))
    values = distiller.linear_dequantize(result, scale, zero_point)
    np.testing.assert_allclose(values.numpy(), (codes + zero_point) / scale, rtol=1e-6)


def test_half_types_stay_and_the_input_is_left():
    values = VALUES.half()
    before = values.clone()
    codes = distiller.linear_quantize_clamp(values, 100.0, 0.0, -128, 127)
    assert codes.dtype is torch.float16
    assert codes.flatten().tolist() == [-100, 25, 50, 75, 127, -10]
    assert torch.equal(values, before)


@pytest.mark.parametrize("case", read_cases("distiller_scale_approx"))
def test_golden_approximations_of_numbers(case):
    arguments = (case["scale"], case["mult_bits"], case["limit"])
    params = distiller.get_scale_approximation_params(*arguments)
    assert params == (case["multiplier"], case["shift"])
    approximated = distiller.approx_scale_as_mult_and_shift(*arguments)
    assert isinstance(approximated, float)
    assert approximated == pytest.approx(case["approx"])


def test_numbers_and_lists_are_taken():
    multiplier, shift = distiller.approximate_scale(0.0007, 4)
    assert float(multiplier / 2**shift) == pytest.approx(0.0007, rel=2 / 15)
    scale, zero_point = distiller.symmetric_linear_quantization_params(8, [4.0, 10.0])
    assert scale.tolist() == [31.875, 12.75]
    assert zero_point.tolist() == [0, 0]
    scale, _ = distiller.asymmetric_linear_quantization_params(8, -1, [1.0, 2.0])
    assert scale.tolist() == [127.5, 85]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("approximate_scale", ("a", 4), "scale is 'a', a str; expected a number"),
        ("approximate_scale", (None, 4), "scale is None"),
        ("approximate_scale", ([0.1, "b"], 4), "a list; expected a number"),
        ("symmetric_linear_quantization_params", (8, "a"), "saturation_val is 'a'"),
        ("symmetric_linear_quantization_params", (8, [[1.0], [1.0, 2.0]]), "saturation_val is"),
        (
            "asymmetric_linear_quantization_params",
            (8, torch.zeros(2), torch.ones(3)),
            r"min has the shape \[2\], and max \[3\]",
        ),
        ("asymmetric_linear_quantization_params", (8, "a", 1.0), "min is 'a'"),
        ("linear_quantize", ([1.0], 1.0, 0.0), "the input is a list"),
        ("linear_quantize", (VALUES, 0.0, 0.0), "scale above 0"),
        ("linear_quantize", (VALUES, [1.0, 2.0], 0.0), r"scale has the shape \[2\]"),
        ("linear_dequantize", (VALUES, "a", 0.0), "scale is 'a'"),
        ("linear_dequantize", (VALUES, 1.0, float("nan")), "zero_point nan"),
        ("linear_quantize_clamp", (VALUES, 1.0, 0.0, None, 3), "clamp_min is None"),
        ("find_clip_constant", ("laplace", -1), "bits is -1; it must be 0 to 32"),
        ("find_clip_constant", ("laplace", 64), "bits is 64"),
        ("find_clip_constant", ("gauss", 2.5), "bits is 2.5, a float"),
        ("find_clip_constant", ("gauss", "x"), "bits is 'x', a str"),
        ("find_clip_constant", ("x", 8), "known are laplace, gauss"),
        ("find_clip_constant", ([1], 8), "known are laplace, gauss"),
        ("ClippedLinearQuantization", (4, 0.0), "clip_val is 0.*expected a number above 0"),
        ("ClippedLinearQuantization", (4, "high"), "clip_val is 'high'"),
    ],
)
def test_arguments_that_are_none_are_refused(name, arguments, text):
    with pytest.raises(QdqError, match=text) as error:
        getattr(distiller, name)(*arguments)
    assert isinstance(error.value, ArgumentError | ArgumentTypeError)


@pytest.mark.parametrize("option", [{"save_fp_weights": "yes"}, {"also_clip_weights": 3}])
def test_flags_that_are_none_are_refused(option):
    (name,) = option
    with pytest.raises(ArgumentError, match=f"{name} is .*expected true or false"):
        distiller.PostTrainLinearQuantizer(torch.nn.Linear(2, 2), **option)
