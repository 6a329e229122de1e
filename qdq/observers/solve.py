"""amax of a tensor from its statistics: one table of all methods. No method needs data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qdq.errors import ArgumentError
from qdq.formats import FP8_AMAX_FLOOR, Format
from qdq.observers.aciq import gauss_ratio, laplace_ratio
from qdq.observers.batch_maxima import average_maxima, moving_average
from qdq.observers.entropy import solve_entropy
from qdq.observers.methods import DEFAULT_PERCENTILE
from qdq.observers.mse import solve_mse
from qdq.observers.percentile import solve_percentile
from qdq.observers.tensor_statistics import TensorStatistics

_MSE_OPERATIONS = 1 << 23  # candidates times levels; up to 12 bits every bin is a candidate

_LARGEST_CLIPPED_FRACTION = 0.5  # of the method entropy

Solver = Callable[..., float]


def _max(statistics: TensorStatistics, fmt: Format) -> float:
    return statistics.absmax


def _percentile(
    statistics: TensorStatistics, fmt: Format, *, percentile: float = DEFAULT_PERCENTILE
) -> float:
    return solve_percentile(statistics.magnitudes(fmt.unsigned), statistics.width, percentile)


def _entropy(statistics: TensorStatistics, fmt: Format) -> float:
    counts = statistics.magnitudes(fmt.unsigned)
    amax = solve_entropy(counts, statistics.width, fmt, start_bin=min(fmt.qmax + 1, counts.size))
    # If almost no value is near 0, the divergence is smallest for ranges that clip almost everything.
    if statistics.clipped_share(amax, fmt.unsigned) > _LARGEST_CLIPPED_FRACTION:
        return counts.size * statistics.width
    return amax


def _mse(statistics: TensorStatistics, fmt: Format) -> float:
    counts = statistics.magnitudes(fmt.unsigned)
    stride = 1 + counts.size * (len(fmt.list_magnitudes()) - 1) // _MSE_OPERATIONS
    start_bin = (counts.size - 1) % stride  # so that the last bin is a candidate
    return solve_mse(counts, statistics.width, fmt, stride, start_bin)


def _average_max(statistics: TensorStatistics, fmt: Format) -> float:
    return average_maxima(statistics.batch_maxima(fmt.unsigned))


def _moving_average(statistics: TensorStatistics, fmt: Format, *, weight: float = 0.1) -> float:
    if not 0 < weight <= 1:
        raise ArgumentError(
            f"weight is {weight}; it must be above 0 and at most 1.", "0.1 is the default."
        )
    return moving_average(statistics.batch_maxima(fmt.unsigned), weight)


def _mean_std(statistics: TensorStatistics, fmt: Format, *, num_std: float = 4.0) -> float:
    if not num_std > 0:
        raise ArgumentError(f"num_std is {num_std}; it must be above 0.", "4 is the default.")
    return abs(statistics.mean) + num_std * statistics.std


def _laplace(statistics: TensorStatistics, fmt: Format) -> float:
    return laplace_ratio(fmt.qmax) * statistics.laplace_b


def _gauss(statistics: TensorStatistics, fmt: Format) -> float:
    return gauss_ratio(fmt.qmax) * statistics.gauss_sigma


SOLVERS: dict[str, Solver] = {
    "max": _max,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
    "average_max": _average_max,
    "mean_std": _mean_std,
    "laplace": _laplace,
    "gauss": _gauss,
    "moving_average": _moving_average,
}
"""Method -> `(statistics, format, **options) -> amax`; `solve_amax` limits the result to the largest value."""


_INTEGER_METHODS = frozenset({"entropy", "laplace", "gauss"})


def list_methods(fmt: Format) -> list[str]:
    """The methods that compute a range for a format: all of them for integers."""
    return [method for method in SOLVERS if not (fmt.is_float and method in _INTEGER_METHODS)]


def solve_amax(
    statistics: TensorStatistics, fmt: Format, method: str = "mse", **options: Any
) -> float:
    """Compute the range of a tensor.

    Args:
        statistics: Statistics of the tensor.
        fmt: The format whose largest code amax is mapped to; for an unsigned one only values above 0 count.
        method: A key of SOLVERS.
        **options: `percentile` (0 to 100) of "percentile", `num_std` of "mean_std", `weight` of "moving_average".

    Returns:
        amax, not above the largest value that the format can represent; 0 if there is no such value, or no data. For
        FP8 it is not below `FP8_AMAX_FLOOR`.

    Raises:
        ArgumentError: An unknown method, one that the format does not have, an option that it does not have, or one
            out of range.
    """
    require_method(method, fmt)
    solver = require_solver(method)
    option_names = getattr(solver, "__kwdefaults__", None) or {}
    unknown = sorted(options.keys() - option_names.keys())
    if unknown:
        raise ArgumentError(
            f"method {method!r} has no option {', '.join(unknown)}; it has {', '.join(option_names) or 'none'}.",
            "leave it out, or choose the method that it belongs to.",
        )
    largest = max(statistics.high, 0.0) if fmt.unsigned else statistics.absmax
    if not largest > 0:
        return 0.0
    amax = min(solver(statistics, fmt, **options), largest)
    return max(amax, FP8_AMAX_FLOOR) if fmt.is_float else amax


def require_solver(method: str) -> Solver:
    """The solver of a method.

    Raises:
        ArgumentError: An unknown method.
    """
    if method not in SOLVERS:
        raise ArgumentError(
            f"unknown calibration method {method!r}; known are {', '.join(SOLVERS)}.",
            "choose one of them with --calib-method (or method=).",
        )
    return SOLVERS[method]


def require_method(method: str, fmt: Format) -> None:
    """Refuse FP8 for a method whose formula has equal steps.

    Raises:
        ArgumentError: An unknown method, or one that the format does not have.
    """
    require_solver(method)
    if method not in list_methods(fmt):
        raise ArgumentError(
            f"the method {method!r} is for integer codes, whose steps are equal; those of FP8 grow with the values.",
            f"use one of {', '.join(list_methods(fmt))}.",
        )
