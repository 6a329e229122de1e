"""Products of signs on packed bits: the reference for binary layers (arXiv 1603.05279, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    """
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
    """
    size = weight.shape[2:]
    # Unfolding fills the padding with 0, which tells it from signs.
    signs = torch.where(values >= 0, 1.0, -1.0)
    # [N, C * taps, positions]
    columns = F.unfold(signs, size, dilation, padding, stride)
    columns = columns.reshape(len(values), groups, 1, -1, columns.shape[-1]).transpose(-1, -2)
    kernels = weight.reshape(1, groups, -1, 1, weight[0].numel())
    sums = xnor_dot(columns, kernels, columns != 0)  # [N, groups, out / groups, positions]
    probe = torch.empty(1, 1, *values.shape[2:], device="meta")
    kernel = torch.empty(1, 1, *size, device="meta")
    output_size = F.conv2d(probe, kernel, None, stride, padding, dilation).shape[2:]
    return sums.reshape(len(values), len(weight), *output_size)
