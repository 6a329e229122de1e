"""Quantized convolutions, plain and transposed, and their base classes, from which scripts derive their own.

The constructors take the arguments of torch's, and by keyword `device`, `dtype`, `quant_desc_input`,
`quant_desc_weight`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.modules import conv as float_conv

from qdq.compat import tensor_quant
from qdq.compat.nn.modules import _utils
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.nn import QuantMixin

Size = int | tuple[int, ...]


class _QuantConvNd(_utils.QuantMixin, QuantMixin, float_conv._ConvNd):
    """Base of the quantized convolutions.

    A class of a script may derive from it, and use `_quant` in its own forward.

    Args:
        in_channels: As `torch.nn.Conv2d`.
        out_channels: As `torch.nn.Conv2d`.
        kernel_size: A tuple, like the next three.
        stride: As `torch.nn.Conv2d`.
        padding: As `torch.nn.Conv2d`, or a string.
        dilation: As `torch.nn.Conv2d`.
        transposed: Whether it is a transposed convolution.
        output_padding: As `torch.nn.ConvTranspose2d`.
        groups: As `torch.nn.Conv2d`.
        bias: As `torch.nn.Conv2d`.
        padding_mode: As `torch.nn.Conv2d`.
        quant_desc_input: How the input is quantized.
        quant_desc_weight: How the weight is quantized.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool,
        output_padding: tuple[int, ...],
        groups: int,
        bias: bool,
        padding_mode: str,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
    ) -> None:
        float_conv._ConvNd.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            bias,
            padding_mode,
        )
        self.init_quantizer(quant_desc_input, quant_desc_weight)

    def _quant(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight, quantized."""
        return self._input_quantizer(input), self._weight_quantizer(self.weight)


class _QuantConvTransposeNd(_QuantConvNd):
    """Base of the quantized transposed convolutions."""


_ConvNd = _QuantConvNd


class QuantConv1d(_QuantConvNd, float_conv.Conv1d):
    """`torch.nn.Conv1d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.Conv1d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.Conv1d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


class QuantConv2d(_QuantConvNd, float_conv.Conv2d):
    """`torch.nn.Conv2d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.Conv2d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


class QuantConv3d(_QuantConvNd, float_conv.Conv3d):
    """`torch.nn.Conv3d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.Conv3d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.Conv3d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


class QuantConvTranspose1d(_QuantConvTransposeNd, float_conv.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.ConvTranspose1d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.ConvTranspose1d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


class QuantConvTranspose2d(_QuantConvTransposeNd, float_conv.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.ConvTranspose2d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.ConvTranspose2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


class QuantConvTranspose3d(_QuantConvTransposeNd, float_conv.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with quantized input and weight, a range for each output channel."""

    float_class: ClassVar[type] = float_conv.ConvTranspose3d
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_conv.ConvTranspose3d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            **factory,
        )
        self.init_quantizer(**descriptors)


Conv1d = QuantConv1d
Conv2d = QuantConv2d
Conv3d = QuantConv3d
ConvTranspose1d = QuantConvTranspose1d
ConvTranspose2d = QuantConvTranspose2d
ConvTranspose3d = QuantConvTranspose3d
