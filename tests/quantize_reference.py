"""Fake quantization by its definition in float64, and the values on which implementations differ."""

import itertools

import numpy as np

from qdq.formats import AMAX_FLOOR, Format

FORMATS = [
    Format(bits, unsigned, narrow)
    for bits, unsigned, narrow in itertools.product(
        (2, 3, 4, 8, 12, 16), (False, True), (False, True)
    )
]


def reference(x, amax, fmt, axis=None):
    """The definition in float64, rounded to float32 where float32 arithmetic rounds: exact products, no tie lost."""
    values = np.asarray(x, np.float64)
    shape = [-1 if dim == axis else 1 for dim in range(values.ndim)] if axis is not None else ()
    ranges = np.maximum(np.asarray(amax, np.float32).astype(np.float64).reshape(shape), AMAX_FLOOR)
    scale = (ranges / fmt.qmax).astype(np.float32).astype(np.float64)
    inverse = (1.0 / scale).astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        product = (values.astype(np.float32).astype(np.float64) * inverse).astype(np.float32)
    codes = np.clip(np.rint(product.astype(np.float64)), fmt.qmin, fmt.qmax)
    return (codes * scale).astype(np.float32)


def same_bits(result, expected):
    """Equal to the last bit, the sign of zero aside (codes have none)."""
    result, expected = np.asarray(result) + 0.0, np.asarray(expected) + 0.0
    np.testing.assert_array_equal(result, expected)


def edge_values(amax, fmt):
    scale = np.float32(max(amax, AMAX_FLOOR)) / np.float32(fmt.qmax)
    ties = (
        np.arange(-fmt.qmax - 3, fmt.qmax + 3, max(1, fmt.qmax // 64), dtype=np.float64) + 0.5
    ) * scale
    neighbours = [
        np.nextafter(ties.astype(np.float32), side)
        for side in (np.float32("-inf"), np.float32("inf"))
    ]
    extremes = [
        0.0,
        -0.0,
        amax,
        -amax,
        1e-45,
        -1e-45,
        1.1e-38,
        1e30,
        -1e30,
        3.4e38,
        np.inf,
        -np.inf,
    ]
    return np.concatenate(
        [ties, *neighbours, extremes, np.random.default_rng(0).normal(0, amax or 1, 500)]
    )
