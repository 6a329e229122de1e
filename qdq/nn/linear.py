"""Quantized linear layer."""

from torch import nn

from qdq.nn.mixin import QuantMixin
from qdq.nn.registry import register_module


@register_module(nn.Linear)
class QuantLinear(QuantMixin, nn.Linear):
    """`nn.Linear` with quantized input and weight, a range for each output (R-MM-1)."""
