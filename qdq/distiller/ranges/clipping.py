"""Clip modes: which part of the range of a tensor gets codes.

    NONE            all of it
    AVG             from the mean of the smallest values of the samples to that of their largest
    N_STD           some standard deviations about the mean
    LAPLACE, GAUSS  alpha = c * mean |x - mu|, or c * std, with the constants c of `aciq`; symmetric |mu| + alpha,
                    asymmetric from max(avg_min, mu - alpha) on, 2 * alpha wide, or alpha wide before a ReLU

No window is wider than the values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from qdq.distiller.ranges.aciq import Distribution, find_clip_constant
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.ranges.tensor_statistics import measure_std, require_n_stds
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.systems.arithmetic import require_values


class ClipMode(Enum):
    """What is clipped."""

    NONE = 0
    AVG = 1
    N_STD = 2
    GAUSS = 3
    LAPLACE = 4


_DISTRIBUTIONS: dict[ClipMode, Distribution] = {
    ClipMode.GAUSS: "gauss",
    ClipMode.LAPLACE: "laplace",
}


def parse_clip(value: Any) -> ClipMode:
    """The clip mode that a YAML file or a script names.

    Args:
        value: A mode, or its name.

    Raises:
        ArgumentError: An unknown name.
        ArgumentTypeError: A value of another type.
    """
    if isinstance(value, ClipMode):
        return value
    names = ", ".join(ClipMode.__members__)
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"the clip mode is {value!r}, a {type(value).__name__}; expected is a name: {names}.",
            "give a name.",
        )
    if value not in ClipMode.__members__:
        raise ArgumentError(f"the clip mode is {value!r}; known are {names}.", "give one of these.")
    return ClipMode[value]


@dataclass(frozen=True)
class RangeStatistics:
    """A record of the statistics file.

    Args:
        min: The smallest value.
        max: The largest value.
        avg_min: Mean of the smallest values of the samples.
        avg_max: Mean of their largest values.
        mean: Mean of all values; None if not collected.
        std: Standard deviation; None if not collected.
        b: Mean of |x - mean|; None if not collected.
    """

    min: float
    max: float
    avg_min: float
    avg_max: float
    mean: float | None = None
    std: float | None = None
    b: float | None = None


@dataclass(frozen=True)
class Measures:
    """The same as tensors: one element, or one for each channel."""

    min: torch.Tensor
    max: torch.Tensor
    avg_min: torch.Tensor
    avg_max: torch.Tensor
    mean: torch.Tensor | None
    std: torch.Tensor | None
    b: torch.Tensor | None


def statistics_of(values: torch.Tensor) -> RangeStatistics:
    """The statistics of one tensor; its standard deviation is that of a sample.

    Args:
        values: Axis 0 counts samples; a tensor of one axis is one sample.

    Raises:
        ArgumentError: An empty tensor, NaN or Inf.
        ArgumentTypeError: Not a float tensor.
    """
    measures = vars(measure_tensor(values))
    return RangeStatistics(**{name: float(measure) for name, measure in measures.items()})


def measure_tensor(values: torch.Tensor) -> Measures:
    """The statistics of a tensor, in one element."""
    require_values(values, "statistics")
    rows = values.detach().float().reshape(1, -1)
    samples = rows if values.dim() < 2 else rows.reshape(values.shape[0], -1)
    low, high = samples.aminmax(dim=1)
    measures = measure_rows(rows)
    return replace(measures, avg_min=low.mean(), avg_max=high.mean())


def measure_rows(rows: torch.Tensor) -> Measures:
    """The statistics of each row, which is one sample."""
    low, high = rows.aminmax(dim=1)
    mean = rows.mean(1)
    deviation = (rows - mean[:, None]).abs().mean(1)
    return Measures(low, high, low, high, mean, measure_std(rows), deviation)


def forget_samples(measures: Measures, clip: ClipMode) -> Measures:
    """LAPLACE and GAUSS of a tensor begin at its minimum, not at the mean of those of its samples."""
    return replace(measures, avg_min=measures.min) if clip in _DISTRIBUTIONS else measures


def find_window(
    measures: Measures,
    num_bits: int,
    mode: LinearQuantMode,
    clip: ClipMode,
    clip_n_stds: float | None,
    half_range: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the part that gets codes, within the values.

    Raises:
        ArgumentError: Statistics or a number of deviations are missing.
    """
    if clip is ClipMode.NONE:
        return measures.min, measures.max
    if clip is ClipMode.AVG:
        return measures.avg_min, measures.avg_max
    if clip is ClipMode.N_STD:
        alpha = require_n_stds(clip_n_stds) * _require(measures.std, "std", clip)
        mean = _require(measures.mean, "mean", clip)
        return _cut(mean - alpha, measures), _cut(mean + alpha, measures)
    name = "b" if clip is ClipMode.LAPLACE else "std"
    deviation = _require(getattr(measures, name), name, clip)
    mean = _require(measures.mean, "mean", clip)
    is_half = half_range and not mode.is_symmetric
    alpha = deviation * find_clip_constant(_DISTRIBUTIONS[clip], num_bits, is_half)
    if mode.is_symmetric:
        largest = torch.maximum(-measures.min, measures.max)
        saturation = torch.minimum(mean.abs() + alpha, largest)
        return -saturation, saturation
    low = _cut(torch.maximum(measures.avg_min, mean - alpha), measures)
    high = low + (alpha if is_half else 2 * alpha)
    return low, _cut(high, measures)


def _cut(end: torch.Tensor, measures: Measures) -> torch.Tensor:
    """An end within the values, which a fused ReLU can leave far from their mean."""
    return end.clamp(measures.min, measures.max)


def _require(measure: torch.Tensor | None, name: str, clip: ClipMode) -> torch.Tensor:
    """Refuse a record without a value that the clip mode needs.

    Raises:
        ArgumentError: It is missing.
    """
    if measure is None:
        raise ArgumentError(
            f"the statistics have no {name}, which {clip.name} needs.",
            "collect statistics with both passes.",
        )
    return measure
