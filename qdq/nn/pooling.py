"""Quantized average pooling: only the input is quantized; the next layer quantizes the output (R-AP)."""

from torch import nn

from qdq.nn.mixin import QuantInputMixin
from qdq.nn.registry import register_module


@register_module(nn.AvgPool1d)
class QuantAvgPool1d(QuantInputMixin, nn.AvgPool1d):
    """`nn.AvgPool1d` with quantized input."""


@register_module(nn.AvgPool2d)
class QuantAvgPool2d(QuantInputMixin, nn.AvgPool2d):
    """`nn.AvgPool2d` with quantized input."""


@register_module(nn.AvgPool3d)
class QuantAvgPool3d(QuantInputMixin, nn.AvgPool3d):
    """`nn.AvgPool3d` with quantized input."""


@register_module(nn.AdaptiveAvgPool1d)
class QuantAdaptiveAvgPool1d(QuantInputMixin, nn.AdaptiveAvgPool1d):
    """`nn.AdaptiveAvgPool1d` with quantized input."""


@register_module(nn.AdaptiveAvgPool2d)
class QuantAdaptiveAvgPool2d(QuantInputMixin, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` with quantized input."""


@register_module(nn.AdaptiveAvgPool3d)
class QuantAdaptiveAvgPool3d(QuantInputMixin, nn.AdaptiveAvgPool3d):
    """`nn.AdaptiveAvgPool3d` with quantized input."""
