"""Statistics of a tensor, and the methods that compute its range from them; the two are separate.

`TensorCollector` (torch) sees batches. `TensorStatistics` (numpy) is the result, which merges exactly. `solve_amax`
computes amax from it by any of the methods in `solve.SOLVERS`, one file each, without data and without torch.
"""

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
"""The keys of `solve.SOLVERS`, for the command line, which must not load numpy for its help."""

DEFAULT_PERCENTILE = 99.99
"""Percentage of the values inside the range of the method "percentile", unless another one is given."""
