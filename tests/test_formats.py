"""Codes, scales and refusals of number formats, against the powers of two that define them."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qdq import ArgumentError
from qdq.formats import AMAX_FLOOR, FP8, Format, scale_from_amax


@pytest.mark.parametrize(
    ("fmt", "codes"),
    [
        (Format(), (-128, 127)),
        (Format(narrow_range=True), (-127, 127)),
        (Format(unsigned=True), (0, 255)),
        (Format(unsigned=True, narrow_range=True), (0, 255)),
        (Format(4), (-8, 7)),
        (Format(2), (-2, 1)),
        (Format(2, narrow_range=True), (-1, 1)),
        (Format(16), (-32768, 32767)),
        (Format(16, unsigned=True), (0, 65535)),
    ],
    ids=str,
)
def test_codes_of_a_format(fmt, codes):
    assert (fmt.qmin, fmt.qmax) == codes


@pytest.mark.parametrize("num_bits", [1, 0, 17, -3])
def test_other_widths_are_refused(num_bits):
    with pytest.raises(ArgumentError, match=f"num_bits is {num_bits}; .* 2 to 16 bits"):
        Format(num_bits)


def test_tensorrt_takes_signed_eight_bits_only():
    assert Format().tensorrt_reason is None
    assert Format(narrow_range=True).tensorrt_reason is None
    assert "R-SYM" in Format(unsigned=True).tensorrt_reason
    assert "not 4 bit" in Format(4).tensorrt_reason


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(16), Format(unsigned=True)], ids=str)
def test_scale_is_the_rounded_quotient_for_numpy_and_torch(fmt):
    ranges = np.concatenate(
        [
            [0.0, 1e-45, 2.0**-65, 2.0**-64, 3.4e38],
            np.random.default_rng(0).lognormal(0, 20, 2000).clip(1e-30, 1e30),
        ]
    ).astype(np.float32)
    # A float64 quotient of two float32 numbers, rounded once more, is the float32 quotient (Figueroa 1995).
    quotients = np.maximum(ranges.astype(np.float64), AMAX_FLOOR) / fmt.qmax
    expected = quotients.astype(np.float32)
    np.testing.assert_array_equal(scale_from_amax(ranges, fmt), expected)
    np.testing.assert_array_equal(scale_from_amax(torch.from_numpy(ranges), fmt), expected)
    assert scale_from_amax(ranges, fmt).dtype == np.float32


def test_the_precision_of_a_range_is_that_of_its_scale():
    assert scale_from_amax(np.float64(1.0), Format()) == 1 / 127
    assert scale_from_amax(torch.tensor(1.0, dtype=torch.float64), Format()) == 1 / 127


def test_nan_has_no_scale():
    assert np.isnan(scale_from_amax(np.array([np.nan]), Format())).all()
    assert torch.isnan(scale_from_amax(torch.tensor(float("nan")), Format()))


class TestFP8:
    def test_codes_are_those_of_ml_dtypes(self):
        bytes_up_to_448 = np.arange(127, dtype=np.uint8)
        codes = bytes_up_to_448.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_array_equal(FP8.list_magnitudes(), codes)
        assert (FP8.qmin, FP8.qmax, FP8.width, FP8.name) == (-448, 448, 8, "fp8")
        assert FP8.tensorrt_reason is None

    def test_what_is_clipped_starts_halfway_to_a_code_that_is_nan(self):
        halfway = (448 + 480) / 2
        assert (FP8.clip_low, FP8.clip_high) == (-halfway, halfway)
        assert (Format().clip_low, Format().clip_high) == (-128.5, 127.5)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"num_bits": (5, 2)}, "only FP8 E4M3"),
            ({"num_bits": (4, 3.0)}, r"num_bits is \(4, 3\.0\)"),
            ({"num_bits": (4, 3), "unsigned": True}, "cannot be unsigned"),
            ({"num_bits": (4, 3), "narrow_range": True}, "always symmetric"),
        ],
    )
    def test_other_float_formats_are_refused(self, arguments, words):
        with pytest.raises(ArgumentError, match=words):
            Format(**arguments)


def test_names_of_integer_formats():
    assert [Format(4).name, Format(unsigned=True).name] == ["int4", "uint8"]
