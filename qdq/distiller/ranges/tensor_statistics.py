"""Ranges of one tensor, under the names that users of Distiller know.

A dimension `dim` keeps the axes 0 to dim and reduces all later ones; None reduces all.
"""

from __future__ import annotations

import torch

from qdq.errors import ArgumentError
from qdq.systems.arithmetic import require_values


def get_tensor_min_max(
    values: torch.Tensor, per_dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value.

    Args:
        values: Any shape.
        per_dim: The last axis that stays.

    Raises:
        ArgumentError: No such axis, or NaN or Inf among the values.
        NumberTypeError: Not a float tensor.
    """
    low, high = _flatten_after(values, per_dim).aminmax(dim=-1)
    return low, high


def get_tensor_avg_min_max(
    values: torch.Tensor, across_dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the smallest and of the largest values.

    Args:
        values: Any shape.
        across_dim: As for `get_tensor_min_max`, whose results are averaged.

    Raises:
        ArgumentError: No such axis, or NaN or Inf among the values.
        NumberTypeError: Not a float tensor.
    """
    low, high = get_tensor_min_max(values, across_dim)
    return low.mean(), high.mean()


def get_tensor_max_abs(values: torch.Tensor, per_dim: int | None = None) -> torch.Tensor:
    """The largest absolute value.

    Args:
        values: Any shape.
        per_dim: As for `get_tensor_min_max`.

    Raises:
        ArgumentError: No such axis, or NaN or Inf among the values.
        NumberTypeError: Not a float tensor.
    """
    low, high = get_tensor_min_max(values, per_dim)
    return torch.maximum(low.abs(), high.abs())


def get_tensor_avg_max_abs(values: torch.Tensor, across_dim: int | None = None) -> torch.Tensor:
    """The larger absolute one of the two means of `get_tensor_avg_min_max`.

    Args:
        values: Any shape.
        across_dim: As there.

    Raises:
        ArgumentError: No such axis, or NaN or Inf among the values.
        NumberTypeError: Not a float tensor.
    """
    low, high = get_tensor_avg_min_max(values, across_dim)
    return torch.maximum(low.abs(), high.abs())


def get_tensor_mean_n_stds_min_max(
    values: torch.Tensor, dim: int | None = None, n_stds: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of some standard deviations about the mean, cut to the values.

    Args:
        values: Any shape.
        dim: As for `get_tensor_min_max`.
        n_stds: Number of deviations, those of a sample, above 0.

    Raises:
        ArgumentError: No such axis, NaN or Inf among the values, or not above 0.
        NumberTypeError: Not a float tensor.
    """
    require_n_stds(n_stds)
    rows = _flatten_after(values, dim)
    mean = rows.mean(-1)
    distance = n_stds * measure_std(rows)
    low, high = get_tensor_min_max(values, dim)
    return torch.maximum(low, mean - distance), torch.minimum(high, mean + distance)


def get_tensor_mean_n_stds_max_abs(
    values: torch.Tensor, dim: int | None = None, n_stds: float = 1
) -> torch.Tensor:
    """The larger absolute end of the window of `get_tensor_mean_n_stds_min_max`.

    Args:
        values: Any shape.
        dim: As there.
        n_stds: As there.

    Raises:
        ArgumentError: No such axis, NaN or Inf among the values, or not above 0.
        NumberTypeError: Not a float tensor.
    """
    low, high = get_tensor_mean_n_stds_min_max(values, dim, n_stds)
    return torch.maximum(low.abs(), high.abs())


def measure_std(rows: torch.Tensor) -> torch.Tensor:
    """The standard deviations of a sample along the last axis; 0 for one value.

    Args:
        rows: At least one axis.
    """
    if rows.shape[-1] == 1:
        return torch.zeros_like(rows[..., 0])
    return rows.std(-1)


def require_n_stds(n_stds: float | None) -> float:
    """Refuse a number of deviations that gives no window.

    Args:
        n_stds: The number.

    Raises:
        ArgumentError: Missing, or not above 0.
    """
    if n_stds is None or not 0 < n_stds < float("inf"):
        raise ArgumentError(
            f"the number of standard deviations (clip_n_stds) is {n_stds}; it must be above 0.",
            "give one, such as 2.0.",
        )
    return n_stds


def _flatten_after(values: torch.Tensor, dim: int | None) -> torch.Tensor:
    """One row for each index of the axes 0 to dim.

    Raises:
        ArgumentError: No such axis, no values, or NaN or Inf among them.
        NumberTypeError: Not a float tensor.
    """
    require_values(values, "range of a tensor")
    if dim is None:
        return values.reshape(-1)
    if not 0 <= dim < values.dim():
        raise ArgumentError(
            f"dim is {dim}; a tensor of shape {tuple(values.shape)} has 0 to {values.dim() - 1}.",
            "give one of these, or None.",
        )
    return values.reshape(*values.shape[: dim + 1], -1)
