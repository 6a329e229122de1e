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
    """`nn.MultiheadAttention` with quantized inputs and input projections; `out_proj` is a layer of its own.

    The float module hands all its weights to one function, so this one has a forward of its own: the same numbers,
    and `out_proj` is called as the module it is. Its options are those of the float module; nested tensors, which
    that takes in evaluation only, are not supported.

    Query, key and value that are one tensor are quantized once, by `_input_quantizer`. The quantizers of key and value
    collect their ranges in any case, so that each has one however the module is called later.
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
        self._key_quantizer = TensorQuantizer(quant_desc_input or self.default_quant_desc_input)
        self._value_quantizer = TensorQuantizer(quant_desc_input or self.default_quant_desc_input)
        for attribute in list(self.weights_of(self))[1:]:
            setattr(
                self,
                attribute,
                TensorQuantizer(quant_desc_weight or self.default_quant_desc_weight),
            )

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, str]:
        """One packed weight, or three where key or value have another size than the query."""
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
        """As the float module's."""
        is_batched = F._mha_shape_check(  # type: ignore[attr-defined]  # refuses what the float module refuses
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch
        is_hint_enough = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (self._split_heads(x, is_batched) for x in self._project(query, key, value))
        mask = None if is_hint_enough else self._merge_masks(query, attn_mask, key_padding_mask)
        k, v, mask = self._append_tokens(k, v, mask)
        weights = None
        if need_weights:
            output, weights = self._attend(q, k, v, mask)
        else:
            dropout = self.dropout if self.training else 0.0
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_hint_enough)
        output = output.transpose(1, 2).flatten(-2)
        if is_batched and not self.batch_first:
            output = output.transpose(0, 1)
        output = self.out_proj(output)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if is_batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """The three projections, in as few products as there are tensors."""
        q, k, v = self._quantize(query, key, value)
        weights = [
            getattr(self, a)(getattr(self, name)) for a, name in self.weights_of(self).items()
        ]
        bias = self.in_proj_bias
        if len(weights) == 1 and q is k and k is v:
            return _unpack(F.linear(q, weights[0], bias), 3)
        if len(weights) == 1 and k is v:
            first, rest = slice(None, self.embed_dim), slice(self.embed_dim, None)
            b_q, b_kv = (None, None) if bias is None else (bias[first], bias[rest])
            return [
                F.linear(q, weights[0][first], b_q),
                *_unpack(F.linear(k, weights[0][rest], b_kv), 2),
            ]
        if len(weights) == 1:
            weights = [
                weights[0][n * self.embed_dim : (n + 1) * self.embed_dim] for n in range(3)
            ]  # no Split
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True)]

    def _quantize(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """Each tensor once: one that is given twice has one Q/DQ in the graph."""
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        result = []
        quantizers = (self._input_quantizer, self._key_quantizer, self._value_quantizer)
        for given, quantizer in zip((query, key, value), quantizers, strict=True):
            same = next((quantized for tensor, quantized in done if tensor is given), None)
            if same is None or quantizer.is_collecting:
                quantized = quantizer(given)
                same = quantized if same is None else same
            done.append((given, same))
            result.append(same)
        return result

    def _split_heads(self, x: torch.Tensor, is_batched: bool) -> torch.Tensor:
        """To `[batch, heads, length, head_dim]`, whatever the layout of the inputs."""
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
        """One mask to be added to the scores, `[1 or batch, 1 or heads, 1 or length, keys]`; None if there is none."""
        padding = _canonical(key_padding_mask, "key_padding_mask", query, attn_mask)
        mask = _canonical(attn_mask, "attn_mask", query)
        if mask is not None:
            mask = (
                mask[None, None]
                if mask.dim() == 2
                else mask.reshape(-1, self.num_heads, *mask.shape[-2:])
            )
        if padding is None:
            return mask
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        return padding if mask is None else mask + padding

    def _append_tokens(
        self, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The learned key and value and the zero ones, where the module has them; nothing masks them."""
        tokens = [] if self.bias_k is None or self.bias_v is None else [(self.bias_k, self.bias_v)]
        if self.add_zero_attn:
            zeros = k.new_zeros(self.embed_dim)
            tokens.append((zeros, zeros))
        for key, value in tokens:
            k, v = (
                torch.cat(
                    [
                        x,
                        token.reshape(1, self.num_heads, 1, self.head_dim).expand(
                            x.shape[0], -1, -1, -1
                        ),
                    ],
                    2,
                )
                for x, token in ((k, key), (v, value))
            )
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

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
    """The parts of a packed projection, as torch takes them apart.

    Not with `chunk`: TensorRT moves a Split in front of the product, to the weight, which is float then.
    """
    parts = packed.reshape(*packed.shape[:-1], count, -1).movedim(-2, 0).contiguous()
    return [parts[index] for index in range(count)]


def _canonical(
    mask: torch.Tensor | None, name: str, query: torch.Tensor, other: Any = None
) -> torch.Tensor | None:
    """A mask as floats to be added: minus infinity where a boolean one is true."""
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other),
        other_name="attn_mask",
        target_type=query.dtype,
        check_other=name == "key_padding_mask",
    )
