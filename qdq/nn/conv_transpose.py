"""Quantized transposed convolutions."""

from typing import ClassVar

from torch import nn

from qdq.nn.mixin import QuantMixin
from qdq.nn.registry import register_module
from qdq.quantizer import QuantDescriptor

# The weight is [in, out / groups, ...]: the output channels are axis 1 (R-CT-1).
_WEIGHT = QuantDescriptor(axis=1)


@register_module(nn.ConvTranspose1d)
class QuantConvTranspose1d(QuantMixin, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with quantized input and weight."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = _WEIGHT


@register_module(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantMixin, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with quantized input and weight."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = _WEIGHT


@register_module(nn.ConvTranspose3d)
class QuantConvTranspose3d(QuantMixin, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with quantized input and weight."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = _WEIGHT
