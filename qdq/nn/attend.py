"""Attention with quantized operands: the function that takes the place of `F.scaled_dot_product_attention`.

TensorRT fuses FP8 attention to one kernel if the queries, the keys, the values and the output of the softmax are
quantized, with the scale and the transpose of the keys before their quantizers (section "Where" of docs/formats.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qdq.quantizer import TensorQuantizer

QUERY, KEY, VALUE = 0, 1, 2
"""Positions of the operands of `F.scaled_dot_product_attention`."""

SOFTMAX = -1
"""The place of the softmax, which is no operand of the function."""


def attend(
    quantizers: Mapping[int, TensorQuantizer],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention, written out, with quantized operands.

    Args:
        quantizers: Those of QUERY, KEY, VALUE and SOFTMAX.
        query: `[..., queries, features]`.
        key: `[..., keys, features]`.
        value: `[..., keys, outputs]`.
        attn_mask: As for `F.scaled_dot_product_attention`, and so are all further arguments.
        dropout_p: Probability of dropping a weight.
        is_causal: No query sees a later key.
        scale: Factor of the scores; by default 1 / sqrt(features).
        enable_gqa: Fewer heads of keys and values than of queries.

    Returns:
        `[..., queries, outputs]`.
    """
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if enable_gqa:
        num_groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(num_groups, -3)
        value = value.repeat_interleave(num_groups, -3)
    query = quantizers[QUERY](query * scale)
    key = quantizers[KEY](key.transpose(-2, -1))
    scores = _add_mask(query @ key, attn_mask, is_causal=is_causal)
    weights = quantizers[SOFTMAX](scores.softmax(-1))
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    outputs: torch.Tensor = weights @ quantizers[VALUE](value)
    if attn_mask is None:
        return outputs
    return outputs.masked_fill(_sees_nothing(attn_mask), 0.0)


def _sees_nothing(attn_mask: torch.Tensor) -> torch.Tensor:
    """Which queries may see no key, boolean `[..., queries or 1, 1]`; `F.scaled_dot_product_attention` gives them 0."""
    if attn_mask.dtype == torch.bool:
        return ~attn_mask.any(-1, keepdim=True)
    return attn_mask.amax(-1, keepdim=True) == -math.inf


def _add_mask(
    scores: torch.Tensor, attn_mask: torch.Tensor | None, *, is_causal: bool
) -> torch.Tensor:
    """The scores, minus infinity where a query must not see a key.

    A query that may see none sees all, because the softmax of minus infinity alone is NaN; `attend` sets its outputs to
    0 behind the last product, so that nothing comes between the operators that TensorRT fuses.
    """
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask & ~_sees_nothing(attn_mask), -math.inf)
    return scores + attn_mask.masked_fill(_sees_nothing(attn_mask), 0.0)


def takes_place(function: str, operands: Mapping[int, Any]) -> bool:
    """Whether `attend` is called instead of a function.

    Args:
        function: Name of the function that the forward calls.
        operands: What is quantized, by position.
    """
    return function == "scaled_dot_product_attention" and SOFTMAX in operands
