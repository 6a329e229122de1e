"""Quantized multi-head attention: the projections in int8, the products of activations in float (R-MHA-2)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qdq.nn.mixin import QuantMixin
from qdq.nn.registry import register_module
from qdq.quantizer import QuantDescriptor, TensorQuantizer


@register_module(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantMixin, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with quantized inputs and input projections; `out_proj` is a separate layer.

    The float module passes all its weights to one function. The forward here computes the same numbers, but calls
    `out_proj` as a module. It has the options of the float module. Nested tensors, which the float module takes only in
    evaluation, are not supported.

    If query, key and value are one tensor, `_input_quantizer` quantizes it once. The quantizers of key and value
    collect statistics even then, so that they have ranges for a later call with other tensors.
    """

    replaces_forward = True
    called_children = ("out_proj",)
    _key_quantizer: TensorQuantizer
    _value_quantizer: TensorQuantizer
    _key_weight_quantizer: TensorQuantizer
    _value_weight_quantizer: TensorQuantizer

    def init_quantizer(
        self,
        quant_desc_input: QuantDescriptor | None = None,
        quant_desc_weight: QuantDescriptor | None = None,
    ) -> None:
        """Attach the quantizers: three for inputs, one for each weight."""
        super().init_quantizer(quant_desc_input, quant_desc_weight)
        input_desc = quant_desc_input or self.default_quant_desc_input
        weight_desc = quant_desc_weight or self.default_quant_desc_weight
        self._key_quantizer = TensorQuantizer(input_desc)
        self._value_quantizer = TensorQuantizer(input_desc)
        for attribute in self.weights_of(self):
            if attribute != "_weight_quantizer":
                setattr(self, attribute, TensorQuantizer(weight_desc))

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, str]:
        """One packed weight, or three if the size of key or value differs from that of the query."""
        if getattr(module, "_qkv_same_embed_dim", True):
            return {"_weight_quantizer": "in_proj_weight"}
        return {
            "_weight_quantizer": "q_proj_weight",
            "_key_weight_quantizer": "k_proj_weight",
            "_value_weight_quantizer": "v_proj_weight",
        }

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The quantizers of this layer by attribute name."""
        names = ("_input_quantizer", "_key_quantizer", "_value_quantizer", *self.weights_of(self))
        return {name: getattr(self, name) for name in names}

    def forward(  # type: ignore[override]  # the mixin's takes any arguments
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward of the float module.

        Args:
            query: `[length, batch, embed_dim]`, with `batch_first` `[batch, length, embed_dim]`, or without a batch
                `[length, embed_dim]`.
            key: As `query`, with the length and the size of the keys.
            value: As `key`.
            key_padding_mask: Keys to ignore, `[batch, keys]`.
            need_weights: Also return the attention weights.
            attn_mask: `[length, keys]` or `[batch * heads, length, keys]`.
            average_attn_weights: Return the mean of the weights over the heads.
            is_causal: `attn_mask` is the causal mask.

        Returns:
            The output, of the shape of `query`, and the weights or None.
        """
        is_batched = F._mha_shape_check(  # type: ignore[attr-defined]  # the same errors as the float module
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch
        is_hint_enough = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (self._split_heads(x, is_batched) for x in self._project(query, key, value))
        mask = None
        if not is_hint_enough:
            mask = self._merge_masks(query, attn_mask, key_padding_mask)
        k, v, mask = self._append_tokens(k, v, mask)

        if not need_weights:
            dropout = self.dropout if self.training else 0.0
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_hint_enough)
            return self._merge_heads(output, is_batched), None
        output, weights = self._attend(q, k, v, mask)
        output = self._merge_heads(output, is_batched)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            weights = weights.squeeze(0)
        return output, weights

    def _merge_heads(self, output: torch.Tensor, is_batched: bool) -> torch.Tensor:
        """The projected output in the layout of the query, from `[batch, heads, length, head_dim]`."""
        output = output.transpose(1, 2).flatten(-2)
        if is_batched and not self.batch_first:
            output = output.transpose(0, 1)
        output = self.out_proj(output)
        if not is_batched:
            output = output.squeeze(0)
        return output

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """The three projections, with one product for each tensor."""
        q, k, v = self._quantize(query, key, value)
        weights = []
        for attribute, name in self.weights_of(self).items():
            quantizer = getattr(self, attribute)
            weights.append(quantizer(getattr(self, name)))
        bias = self.in_proj_bias
        if len(weights) == 1:
            if q is k and k is v:
                return _unpack(F.linear(q, weights[0], bias), 3)
            if k is v:
                return self._project_query_and_memory(q, k, weights[0])
            weights = self._cut_weight(weights[0])
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (q, k, v)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _project_query_and_memory(
        self, query: torch.Tensor, memory: torch.Tensor, weight: torch.Tensor
    ) -> list[torch.Tensor]:
        """The three projections if key and value are one tensor."""
        size = self.embed_dim
        query_bias, memory_bias = None, None
        if self.in_proj_bias is not None:
            query_bias, memory_bias = self.in_proj_bias[:size], self.in_proj_bias[size:]
        q = F.linear(query, weight[:size], query_bias)
        k, v = _unpack(F.linear(memory, weight[size:], memory_bias), 2)
        return [q, k, v]

    def _cut_weight(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a packed weight as slices, because TensorRT moves a Split (see `_unpack`)."""
        size = self.embed_dim
        return [weight[:size], weight[size : 2 * size], weight[2 * size : 3 * size]]

    def _quantize(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """Quantize each tensor once: a tensor that is passed twice has one Q/DQ in the graph."""
        quantized_query = self._input_quantizer(query)
        if key is not query:
            quantized_key = self._key_quantizer(key)
        else:
            quantized_key = quantized_query
            _collect(self._key_quantizer, key)
        if value is not query and value is not key:
            quantized_value = self._value_quantizer(value)
        else:
            quantized_value = quantized_query if value is query else quantized_key
            _collect(self._value_quantizer, value)
        return [quantized_query, quantized_key, quantized_value]

    def _split_heads(self, x: torch.Tensor, is_batched: bool) -> torch.Tensor:
        """`[batch, heads, length, head_dim]` from any layout of the inputs."""
        if not is_batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _merge_masks(
        self,
        query: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """One mask to add to the scores, `[1 or batch, 1 or heads, 1 or length, keys]`; None if there is none."""
        padding = _to_float_mask(key_padding_mask, "key_padding_mask", query, attn_mask)
        mask = _to_float_mask(attn_mask, "attn_mask", query)
        if mask is not None and mask.dim() == 2:
            mask = mask[None, None]
        elif mask is not None:
            mask = mask.reshape(-1, self.num_heads, *mask.shape[-2:])
        if padding is None:
            return mask
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        if mask is None:
            return padding
        return mask + padding

    def _append_tokens(
        self, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Append the learned and the zero key and value, if the module has them; no mask hides them."""
        if self.bias_k is not None and self.bias_v is not None:
            k = self._append_token(k, self.bias_k)
            v = self._append_token(v, self.bias_v)
            if mask is not None:
                mask = F.pad(mask, (0, 1))
        if self.add_zero_attn:
            zeros = k.new_zeros(self.embed_dim)
            k = self._append_token(k, zeros)
            v = self._append_token(v, zeros)
            if mask is not None:
                mask = F.pad(mask, (0, 1))
        return k, v, mask

    def _append_token(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, length + 1, head_dim]`, the token last in every sample."""
        by_head = token.reshape(1, self.num_heads, 1, self.head_dim)
        return torch.cat([x, by_head.expand(x.shape[0], -1, -1, -1)], 2)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention with its weights `[batch, heads, length, keys]`, which the fused function does not return."""
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return weights @ v, weights


def _unpack(packed: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The parts of a packed projection, computed as in torch.

    It does not use `chunk`: TensorRT moves a Split before the product, to the weight, which is then float.
    """
    parts = packed.reshape(*packed.shape[:-1], count, -1).movedim(-2, 0).contiguous()
    return [parts[index] for index in range(count)]


def _collect(quantizer: TensorQuantizer, tensor: torch.Tensor) -> None:
    """Collect statistics of a tensor that another quantizer quantizes."""
    if quantizer.is_collecting:
        quantizer(tensor)


def _to_float_mask(
    mask: torch.Tensor | None, name: str, query: torch.Tensor, attn_mask: Any = None
) -> torch.Tensor | None:
    """A mask as floats to add to the scores: minus infinity where a boolean mask is true."""
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(attn_mask),
        other_name="attn_mask",
        target_type=query.dtype,
        check_other=name == "key_padding_mask",
    )
