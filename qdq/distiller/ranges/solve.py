"""Scale and zero point of a tensor: by its statistics, by its values, or by those of each channel."""

from __future__ import annotations

import dataclasses

import torch

from qdq.distiller.ranges.clipping import (
    ClipMode,
    Measures,
    RangeStatistics,
    find_window,
    forget_samples,
    measure_rows,
    measure_tensor,
)
from qdq.distiller.ranges.linear_params import LinearParams, solve_params
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.errors import ArgumentError
from qdq.systems.arithmetic import require_values


def solve_clipped(
    statistics: RangeStatistics,
    num_bits: int,
    mode: LinearQuantMode,
    clip: ClipMode,
    clip_n_stds: float | None = None,
    half_range: bool = False,
) -> LinearParams:
    """The scale and zero point of a tensor by its statistics.

    Args:
        statistics: Its record.
        num_bits: The width of a code.
        mode: The mode.
        clip: The clip mode.
        clip_n_stds: Number of standard deviations, for N_STD.
        half_range: Whether a ReLU follows; mean, std and b are those before it. It acts in asymmetric modes with
            LAPLACE and GAUSS.

    Returns:
        The parameters, of no axes.

    Raises:
        ArgumentError: `clip_n_stds` is missing or not above 0, or the record lacks mean, std or b, or is no range.
    """
    fields = {}
    for field in dataclasses.fields(Measures):
        value = getattr(statistics, field.name)
        fields[field.name] = None if value is None else torch.tensor(value, dtype=torch.float32)
    measures = Measures(**fields)  # type: ignore[arg-type]  # only mean, std and b can be None
    window = find_window(measures, num_bits, mode, clip, clip_n_stds, half_range)
    return solve_params(*window, num_bits, mode)


def solve_tensor(
    values: torch.Tensor,
    num_bits: int,
    mode: LinearQuantMode,
    clip: ClipMode = ClipMode.NONE,
    clip_n_stds: float | None = None,
    half_range: bool = False,
) -> LinearParams:
    """The scale and zero point of a tensor by its own values.

    Args:
        values: Axis 0 counts samples.
        num_bits: As for `solve_clipped`.
        mode: Likewise.
        clip: Likewise.
        clip_n_stds: Likewise.
        half_range: Likewise.

    Returns:
        The parameters, of no axes, on the device of the values.

    Raises:
        ArgumentError: As for `solve_clipped`, or the tensor is empty or not finite.
        ArgumentTypeError: Not a float tensor.
    """
    measures = forget_samples(measure_tensor(values), clip)
    low, high = find_window(measures, num_bits, mode, clip, clip_n_stds, half_range)
    return solve_params(low.reshape(()), high.reshape(()), num_bits, mode)


def solve_weight(
    weight: torch.Tensor,
    num_bits: int,
    mode: LinearQuantMode,
    clip: ClipMode = ClipMode.NONE,
    clip_n_stds: float | None = None,
    axis: int | None = None,
) -> LinearParams:
    """The scale and zero point of a weight, or of each of its channels.

    Args:
        weight: The weight.
        num_bits: As for `solve_clipped`.
        mode: Likewise.
        clip: Likewise; a channel is one sample, so that AVG is NONE for channels.
        clip_n_stds: Likewise.
        axis: The axis of the channels, 0, or 1 for transposed convolutions; None: one for all.

    Returns:
        The parameters, which broadcast to the weight.

    Raises:
        ArgumentError: As for `solve_tensor`; N_STD for channels.
        ArgumentTypeError: Not a float tensor.
    """
    if axis is None:
        return solve_tensor(weight, num_bits, mode, clip, clip_n_stds)
    if clip is ClipMode.N_STD:
        raise ArgumentError(
            "the clip mode is N_STD with weights per channel.",
            "take another clip mode, or per_channel_wts: False.",
        )
    require_values(weight, "weight")
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    measures = forget_samples(measure_rows(rows), clip)
    window = find_window(measures, num_bits, mode, clip, clip_n_stds, half_range=False)
    shape = [1] * weight.dim()
    shape[axis] = -1
    low, high = (end.reshape(shape) for end in window)
    return solve_params(low, high, num_bits, mode)
