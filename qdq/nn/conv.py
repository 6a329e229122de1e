"""Quantized convolutions."""

from torch import nn

from qdq.nn.mixin import QuantMixin
from qdq.nn.registry import register_module


@register_module(nn.Conv1d)
class QuantConv1d(QuantMixin, nn.Conv1d):
    """`nn.Conv1d` with quantized input and weight, a range for each output channel (R-CONV-1)."""


@register_module(nn.Conv2d)
class QuantConv2d(QuantMixin, nn.Conv2d):
    """`nn.Conv2d` with quantized input and weight, a range for each output channel (R-CONV-1)."""


@register_module(nn.Conv3d)
class QuantConv3d(QuantMixin, nn.Conv3d):
    """`nn.Conv3d` with quantized input and weight, a range for each output channel (R-CONV-1)."""
