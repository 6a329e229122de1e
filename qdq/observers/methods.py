"""The names of the calibration methods and the default percentile, without numpy: `qdq --help` loads them."""

from typing import Literal, get_args

Method = Literal[
    "max",
    "percentile",
    "entropy",
    "mse",
    "average_max",
    "mean_std",
    "laplace",
    "gauss",
    "moving_average",
]
METHODS: tuple[Method, ...] = get_args(Method)
"""The keys of `solve.SOLVERS`."""

DEFAULT_PERCENTILE = 99.99
"""Percentage of the values inside the range of the method "percentile", unless another one is given."""
