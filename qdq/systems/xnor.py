"""Products of signs on packed bits: the reference for binary layers (arXiv 1603.05279, section 3.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qdq.errors import NumberTypeError, ShapeError
from qdq.systems.arithmetic import require_values

_BITS = 8  # of a word


def pack_bits(is_set: torch.Tensor) -> torch.Tensor:
    """Eight values of the last axis as one word, the first as its lowest bit; the last word is filled with 0.

    Args:
        is_set: Bools `[..., K]`.

    Returns:
        uint8 `[..., ceil(K / 8)]`.
    """
    missing = -is_set.shape[-1] % _BITS
    padded = F.pad(is_set.to(torch.uint8), (0, missing))
    powers = torch.tensor([1 << bit for bit in range(_BITS)], device=is_set.device)
    words = padded.reshape(*padded.shape[:-1], -1, _BITS) * powers.to(torch.uint8)
    return words.sum(-1, dtype=torch.uint8)


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """Number of bits that are 1 in the words of the last axis.

    Args:
        words: uint8 `[..., N]`.
    """
    table = [word.bit_count() for word in range(1 << _BITS)]
    return torch.tensor(table, device=words.device)[words.long()].sum(-1)


def xnor_dot(
    inputs: torch.Tensor, weights: torch.Tensor, is_valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of products of signs: K - 2 * popcount(a xor w), K the number of valid pairs.

    Args:
        inputs: Values of which only the sign counts, `[..., K]`; 0 counts as +1.
        weights: Likewise; both are broadcast.
        is_valid: False where a pair does not count, such as one in the padding; None: all count.

    Returns:
        Integers, the product of the broadcast shapes without the last axis.

    Raises:
        ArgumentError: Empty or non-finite values.
        NumberTypeError: Not float tensors, or an `is_valid` that has no bools.
        ShapeError: Shapes that cannot be broadcast, or another number of values.
    """
    _require_pairs(inputs, weights, is_valid)
    return _dot(inputs, weights, is_valid)


def _require_pairs(inputs: Any, weights: Any, is_valid: Any) -> None:
    """Refuse what `xnor_dot` cannot multiply."""
    require_values(inputs, "xnor_dot, inputs")
    require_values(weights, "xnor_dot, weights")
    tensors = [inputs, weights]
    if is_valid is not None:
        if not isinstance(is_valid, torch.Tensor) or is_valid.dtype != torch.bool:
            kind = getattr(is_valid, "dtype", type(is_valid).__name__)
            raise NumberTypeError(
                f"xnor_dot: is_valid is of type {kind}.", "give a tensor of bools."
            )
        tensors.append(is_valid)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not all(shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise ShapeError(
            f"xnor_dot: the shapes are {shapes}; their last axes must have one size.",
            "give as many weights as inputs.",
        )
    try:
        np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ShapeError(
            f"xnor_dot: the shapes are {shapes}, which cannot be broadcast.",
            "make the axes before the last one equal, or 1.",
        ) from error


def _dot(
    inputs: torch.Tensor, weights: torch.Tensor, is_valid: torch.Tensor | None
) -> torch.Tensor:
    """`xnor_dot` for arguments that have been checked."""
    if is_valid is None:
        is_valid = torch.ones(inputs.shape[-1], dtype=torch.bool, device=inputs.device)
    mask = pack_bits(is_valid)
    differs = (pack_bits(inputs >= 0) ^ pack_bits(weights >= 0)) & mask
    return count_bits(mask) - 2 * count_bits(differs)


def xnor_conv2d(
    values: torch.Tensor,
    weight: torch.Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The convolution of signs; positions in the padding, which have no sign, count as 0.

    Args:
        values: `[N, C, H, W]`.
        weight: `[out, C / groups, height, width]`.
        stride: As for `torch.nn.functional.conv2d`.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.

    Returns:
        Integers `[N, out, ...]`.

    Raises:
        ArgumentError: Empty or non-finite values.
        NumberTypeError: Not float tensors.
        ShapeError: What `torch.nn.functional.conv2d` refuses.
    """
    require_values(values, "xnor_conv2d, values")
    require_values(weight, "xnor_conv2d, weight")
    options = (stride, padding, dilation, groups)
    output_size = _find_output_size(values, weight, options)
    size = weight.shape[2:]
    # Unfolding fills the padding with 0, which tells it from signs.
    signs = torch.where(values >= 0, 1.0, -1.0)
    # [N, C * taps, positions]
    columns = F.unfold(signs, size, dilation, padding, stride)
    columns = columns.reshape(len(values), groups, 1, -1, columns.shape[-1]).transpose(-1, -2)
    kernels = weight.reshape(1, groups, -1, 1, weight[0].numel())
    sums = _dot(columns, kernels, columns != 0)  # [N, groups, out / groups, positions]
    return sums.reshape(len(values), len(weight), *output_size)


def _find_output_size(
    values: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...]
) -> torch.Size:
    """Height and width of the output of a convolution.

    Raises:
        ShapeError: torch refuses the shapes or the options.
    """
    stride, padding, dilation, groups = options
    probe, kernel = torch.zeros(1, *values.shape[1:]), torch.zeros(weight.shape)
    try:
        if values.dim() != 4:
            raise ValueError("values have no four axes")
        outputs = F.conv2d(probe, kernel, None, stride, padding, dilation, groups)
        F.unfold(probe, kernel.shape[2:], dilation, padding, stride)  # takes no padding by name
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ShapeError(
            f"xnor_conv2d: values {tuple(values.shape)}, weight {tuple(weight.shape)}: {reason}",
            "give [N, C, H, W] and [out, C / groups, height, width], with options of numbers.",
        ) from error
    return outputs.shape[2:]
