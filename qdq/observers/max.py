"""Running maximum of |x|, per tensor or per channel."""

from __future__ import annotations

import torch

from qdq.errors import StateError
from qdq.observers.finite import require_finite


def reduce_amax(inputs: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Maximum of |x| over all axes but the kept one.

    Args:
        inputs: Any shape, not empty.
        axis: The axis to keep (negative counts from the end), or None for the whole tensor.

    Returns:
        A float32 0-D tensor, or one of the rank of `inputs` with size 1 on every axis but `axis`.
    """
    low, high = torch.aminmax(inputs.detach()) if axis is None else _aminmax_kept(inputs.detach(), axis)
    return torch.maximum(low.abs(), high.abs()).float()


def _aminmax_kept(inputs: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = axis % inputs.dim()
    others = [dim for dim in range(inputs.dim()) if dim != kept]
    if not others:
        return inputs, inputs
    return inputs.amin(others, keepdim=True), inputs.amax(others, keepdim=True)


class MaxCalibrator:
    """Collects the maximum of |x| over batches.

    Args:
        num_bits: Width of the format; kept for scripts that read it, a maximum does not depend on it.
        axis: The kept axis, or None for one maximum per tensor.
        unsigned: As `num_bits`.
    """

    def __init__(self, num_bits: int, axis: int | None, unsigned: bool) -> None:
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
        """
        if inputs.numel() == 0:
            return
        amax = reduce_amax(inputs, self._axis)
        require_finite(amax, inputs)
        if self._calib_amax is None:
            self._calib_amax = amax
        elif self._calib_amax.shape != amax.shape:
            raise StateError(
                f"amax shape changed! It was {tuple(self._calib_amax.shape)}, this batch gives {tuple(amax.shape)}.",
                "feed batches whose kept axis always has the same length, or calibrate per tensor (axis=None).",
            )
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax.to(self._calib_amax.device))
        self.num_batches += 1

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
