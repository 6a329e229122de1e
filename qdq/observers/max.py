"""Running maximum of |x|, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.observers.finite import require_finite, require_tensor

Axis = int | Sequence[int] | None
"""The axes that are kept (negative ones count from the end); None: the whole tensor has one range."""


def reduce_amax(inputs: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Maximum of |x| over all axes but the kept ones.

    Args:
        inputs: Any shape; where there is nothing to take the maximum of, it is 0.
        axis: The axis or axes to keep (negative counts from the end), or None for the whole tensor.

    Returns:
        A float32 0-D tensor, or one of the rank of `inputs` with size 1 on every axis that is not kept.

    Raises:
        ArgumentError: An axis that `inputs` does not have.
        ArgumentTypeError: An axis that is no integer.
    """
    low, high = _aminmax(inputs.detach()) if axis is None else _aminmax_kept(inputs.detach(), axis)
    return torch.maximum(low.float().abs(), high.float().abs())


def _aminmax(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.numel() == 0:
        zero = inputs.new_zeros(())
        return zero, zero
    low, high = torch.aminmax(inputs)
    return low, high


def _aminmax_kept(inputs: torch.Tensor, axis: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    kept = _kept_axes(inputs, axis)
    others = [dim for dim in range(inputs.dim()) if dim not in kept]
    if not others:
        return inputs, inputs
    if any(inputs.shape[dim] == 0 for dim in others):
        zeros = inputs.new_zeros([size if dim in kept else 1 for dim, size in enumerate(inputs.shape)])
        return zeros, zeros
    return inputs.amin(others, keepdim=True), inputs.amax(others, keepdim=True)


def _kept_axes(inputs: torch.Tensor, axis: int | Sequence[int]) -> set[int]:
    """The axes counted from the start."""
    axes = [axis] if isinstance(axis, int) else list(axis)
    if not all(isinstance(dim, int) for dim in axes):
        raise ArgumentTypeError(f"axis is {axis!r}; it must be None, an int or a sequence of ints.", "0 keeps axis 0.")
    if not all(-inputs.dim() <= dim < inputs.dim() for dim in axes):
        raise ArgumentError(
            f"axis {axis} is out of range for a tensor of shape {tuple(inputs.shape)}.",
            f"keep axes between {-inputs.dim()} and {inputs.dim() - 1}, or use axis=None for one range per tensor."
            if inputs.dim()
            else "a tensor without axes has one range: use axis=None.",
        )
    return {dim % inputs.dim() for dim in axes}


class MaxCalibrator:
    """Collects the maximum of |x| over batches.

    Args:
        num_bits: Width of the format; kept for scripts that read it, a maximum does not depend on it.
        axis: The kept axis or axes, or None for one maximum per tensor.
        unsigned: As `num_bits`.
    """

    def __init__(self, num_bits: int, axis: Axis, unsigned: bool) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._calib_amax: torch.Tensor | None = None
        self.num_batches = 0

    @torch.no_grad()
    def collect(self, inputs: torch.Tensor) -> None:
        """Take one batch into account; an empty one changes nothing.

        Raises:
            CalibrationError: NaN or Inf in the batch.
            StateError: The kept axis has another length than before.
            ArgumentError: The batch does not have the kept axis.
        """
        require_tensor(inputs)
        if inputs.numel() == 0:
            return
        amax = self._reduce(inputs)
        require_finite(amax, inputs)
        self._merge(amax)
        self.num_batches += 1

    def _reduce(self, inputs: torch.Tensor) -> torch.Tensor:
        return reduce_amax(inputs, self._axis)

    def _merge(self, amax: torch.Tensor) -> None:
        if self._calib_amax is None:
            self._calib_amax = amax
        elif self._calib_amax.shape != amax.shape:
            raise StateError(
                f"amax shape changed! It was {tuple(self._calib_amax.shape)}, this batch gives {tuple(amax.shape)}.",
                "feed batches whose kept axis always has the same length, or calibrate per tensor (axis=None).",
            )
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax.to(self._calib_amax.device))

    def compute_amax(self) -> torch.Tensor | None:
        """The maximum so far as a copy, or None before any data."""
        return None if self._calib_amax is None else self._calib_amax.clone()

    def saw_zeros_only(self) -> bool:
        """Whether there was data and all of it was zero."""
        return self._calib_amax is not None and not bool(self._calib_amax.any())

    def __repr__(self) -> str:
        return (
            f"MaxCalibrator(num_bits={self._num_bits} axis={self._axis} unsigned={self._unsigned} "
            f"calib_amax={self._calib_amax})"
        )
