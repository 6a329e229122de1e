"""The names of the former CUDA extension, as ordinary functions for any device; without gradients."""

from __future__ import annotations

import torch

from qdq.compat import tensor_quant
from qdq.compat.tensor_quant import Range, _as_tensor
from qdq.errors import ArgumentError, ArgumentTypeError


@torch.no_grad()
def fake_tensor_quant(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """As `tensor_quant.fake_tensor_quant`; one range may have any shape."""
    return tensor_quant.fake_tensor_quant(
        inputs, _flat(amax, inputs), num_bits, unsigned, narrow_range
    )


@torch.no_grad()
def fake_tensor_quant_(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """As `fake_tensor_quant`, in place."""
    quantized = fake_tensor_quant(inputs, amax, num_bits, unsigned, narrow_range)
    return inputs.copy_(quantized)


def _flat(amax: Range, inputs: torch.Tensor) -> torch.Tensor:
    """One range as 0-D; several unchanged."""
    ranges = _as_tensor(amax, inputs)
    if ranges.numel() == 1:
        return ranges.reshape(())
    return ranges


@torch.no_grad()
def fake_tensor_quant_with_axis(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    axis: int,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """As `tensor_quant.fake_tensor_quant`, with one range for each index of an axis.

    Args:
        inputs: Any shape.
        amax: As many ranges as `inputs` has along `axis`, in any shape.
        axis: The axis, negative ones count from the end.
        num_bits: Width of the codes.
        unsigned: Codes start at 0.
        narrow_range: Leave out the most negative code.

    Raises:
        TypeError: The axis is not an integer.
        ValueError: Axis and amax do not fit the inputs.
    """
    if not isinstance(axis, int):
        raise ArgumentTypeError(
            f"axis is {axis!r}; expected an int.", "0 gives one range for each index of axis 0."
        )
    amax = _as_tensor(amax, inputs)
    if not -inputs.dim() <= axis < inputs.dim() or amax.numel() != inputs.shape[axis]:
        raise ArgumentError(
            f"axis {axis} with amax of shape {tuple(amax.shape)} does not fit inputs of shape {tuple(inputs.shape)}.",
            "give as many ranges as the inputs have along an existing axis.",
        )
    shape = [1] * inputs.dim()
    shape[axis] = -1
    return tensor_quant.fake_tensor_quant(
        inputs, amax.reshape(shape), num_bits, unsigned, narrow_range
    )


@torch.no_grad()
def fake_e4m3fy(inputs: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of FP8 E4M3, saturating at +-448; in the type of the inputs."""
    return tensor_quant.scaled_e4m3(inputs)
