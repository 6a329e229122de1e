"""What stays float for its shape, against a table written by hand from the rules' words."""

import pytest

from qdq.float_rules import reason_against_convolution, reason_against_linear

# weight [Cout, Cin / groups, kernel ...], groups, is it the first convolution, rule against it ("" if none)
CONVOLUTIONS = [
    # Cout >= 16 and Cin / groups >= 16: quantize, whatever the kernel
    ((16, 16, 3, 3), 1, False, ""),
    ((16, 16, 1, 1), 1, False, ""),
    ((16, 16, 1, 7), 1, False, ""),
    ((17, 19, 3, 3), 1, False, ""),
    ((16, 16, 3), 1, False, ""),
    # one below either bound, and neither a multiple of 8
    ((15, 17, 3, 3), 1, False, "R-CONV-3"),
    ((17, 15, 3, 3), 1, False, "R-CONV-3"),
    ((17, 15, 3, 3), 1, True, "R-CONV-3"),
    # one group: Cout or Cin a multiple of 8 ...
    ((15, 16, 3, 3), 1, False, ""),
    ((16, 15, 3, 3), 1, False, ""),
    ((24, 3, 3, 3), 1, False, ""),
    ((3, 24, 3, 3), 1, False, ""),
    ((20, 8, 3, 3), 1, False, ""),
    ((20, 7, 3, 3), 1, False, "R-CONV-3"),
    ((20, 9, 3, 3), 1, False, "R-CONV-3"),
    ((1, 32, 1, 1), 1, False, ""),
    ((1, 33, 1, 1), 1, False, "R-CONV-3"),
    # ... and the first of the network, or one of them >= 16 ...
    ((8, 3, 3, 3), 1, True, ""),
    ((8, 3, 3, 3), 1, False, "R-CONV-3"),
    ((8, 8, 3, 3), 1, True, ""),
    ((8, 8, 3, 3), 1, False, "R-CONV-3"),
    ((8, 15, 3, 3), 1, False, "R-CONV-3"),
    ((15, 8, 3, 3), 1, False, "R-CONV-3"),
    ((8, 16, 3, 3), 1, False, ""),
    ((12, 3, 3, 3), 1, True, "R-CONV-3"),
    ((32, 3, 3, 3), 1, True, ""),
    # ... and a square kernel
    ((24, 3, 5, 5), 1, False, ""),
    ((24, 3, 5, 3), 1, False, "R-CONV-3"),
    ((24, 3, 1, 3), 1, True, "R-CONV-3"),
    ((24, 3, 5), 1, False, ""),
    # depthwise: Cout a multiple of 8 and every kernel size >= 3
    ((32, 1, 3, 3), 32, False, ""),
    ((32, 1, 3, 5), 32, False, ""),
    ((32, 1, 2, 3), 32, False, "R-CONV-3"),
    ((32, 1, 3, 2), 32, False, "R-CONV-3"),
    ((32, 1, 1, 1), 32, False, "R-CONV-3"),
    ((32, 1, 3), 32, False, ""),
    ((8, 1, 3, 3), 8, False, ""),
    ((8, 1, 3, 3), 4, False, ""),
    ((12, 1, 3, 3), 12, False, "R-CONV-3"),
    ((12, 1, 3, 3), 12, True, "R-CONV-3"),
    ((7, 1, 3, 3), 7, False, "R-CONV-3"),
    # grouped, 1 < groups < Cin: never, however wide
    ((64, 32, 3, 3), 2, False, "R-CONV-4"),
    ((64, 32, 3, 3), 2, True, "R-CONV-4"),
    ((32, 2, 3, 3), 16, False, "R-CONV-4"),
    ((32, 4, 1, 1), 8, False, "R-CONV-4"),
    # three dimensions: never
    ((32, 32, 3, 3, 3), 1, False, "R-CONV-7"),
    ((32, 3, 3, 3, 3), 1, True, "R-CONV-7"),
    ((32, 1, 3, 3, 3), 32, False, "R-CONV-7"),
]

# weight [N, K], rule against it
LINEAR = [
    ((16, 16), ""),
    ((1000, 1280), ""),
    ((17, 19), ""),
    ((15, 16), "R-MM-3"),
    ((16, 15), "R-MM-3"),
    ((1, 4096), "R-MM-3"),
    ((4096, 1), "R-MM-3"),
    ((15, 15), "R-MM-3"),
]


@pytest.mark.parametrize(("weight", "groups", "is_first", "rule"), CONVOLUTIONS)
def test_convolution(weight, groups, is_first, rule):
    reason = reason_against_convolution(weight, groups, is_first)
    assert reason.endswith(f"({rule})") if rule else reason == ""


def test_reason_names_the_sizes():
    assert reason_against_convolution((12, 3, 3, 5), 1, True).startswith(
        "3 to 12 channels, kernel [3, 5]: "
    )
    assert reason_against_convolution((12, 1, 3, 3), 12, False).startswith(
        "12 to 12 channels, kernel [3, 3]: "
    )
    assert reason_against_linear((10, 1280)).startswith("1280 to 10 features: ")


@pytest.mark.parametrize(("weight", "rule"), LINEAR)
def test_linear(weight, rule):
    reason = reason_against_linear(weight)
    assert reason.endswith(f"({rule})") if rule else reason == ""
