"""Quantized pooling: only the input is quantized."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn.modules import pooling as float_pooling

from qdq.compat.nn.modules import _utils
from qdq.nn import QuantInputMixin

Size = int | tuple[int, ...]


class QuantMaxPool1d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.MaxPool1d):
    """`torch.nn.MaxPool1d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.MaxPool1d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.MaxPool1d.__init__(
            self, kernel_size, stride, padding, dilation, return_indices, ceil_mode
        )
        self.init_quantizer(descriptor)


class QuantMaxPool2d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.MaxPool2d):
    """`torch.nn.MaxPool2d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.MaxPool2d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.MaxPool2d.__init__(
            self, kernel_size, stride, padding, dilation, return_indices, ceil_mode
        )
        self.init_quantizer(descriptor)


class QuantMaxPool3d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.MaxPool3d):
    """`torch.nn.MaxPool3d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.MaxPool3d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.MaxPool3d.__init__(
            self, kernel_size, stride, padding, dilation, return_indices, ceil_mode
        )
        self.init_quantizer(descriptor)


class QuantAvgPool1d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.AvgPool1d):
    """`torch.nn.AvgPool1d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AvgPool1d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AvgPool1d.__init__(
            self, kernel_size, stride, padding, ceil_mode, count_include_pad
        )
        self.init_quantizer(descriptor)


class QuantAvgPool2d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.AvgPool2d):
    """`torch.nn.AvgPool2d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AvgPool2d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AvgPool2d.__init__(
            self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        self.init_quantizer(descriptor)


class QuantAvgPool3d(_utils.QuantInputMixin, QuantInputMixin, float_pooling.AvgPool3d):
    """`torch.nn.AvgPool3d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AvgPool3d

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        **kwargs: Any,
    ) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AvgPool3d.__init__(
            self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        self.init_quantizer(descriptor)


class QuantAdaptiveAvgPool1d(
    _utils.QuantInputMixin, QuantInputMixin, float_pooling.AdaptiveAvgPool1d
):
    """`torch.nn.AdaptiveAvgPool1d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AdaptiveAvgPool1d

    def __init__(self, output_size: Any, **kwargs: Any) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AdaptiveAvgPool1d.__init__(self, output_size)
        self.init_quantizer(descriptor)


class QuantAdaptiveAvgPool2d(
    _utils.QuantInputMixin, QuantInputMixin, float_pooling.AdaptiveAvgPool2d
):
    """`torch.nn.AdaptiveAvgPool2d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AdaptiveAvgPool2d

    def __init__(self, output_size: Any, **kwargs: Any) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AdaptiveAvgPool2d.__init__(self, output_size)
        self.init_quantizer(descriptor)


class QuantAdaptiveAvgPool3d(
    _utils.QuantInputMixin, QuantInputMixin, float_pooling.AdaptiveAvgPool3d
):
    """`torch.nn.AdaptiveAvgPool3d` with quantized input; `**kwargs` is `quant_desc_input`."""

    float_class: ClassVar[type] = float_pooling.AdaptiveAvgPool3d

    def __init__(self, output_size: Any, **kwargs: Any) -> None:
        descriptor = _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        float_pooling.AdaptiveAvgPool3d.__init__(self, output_size)
        self.init_quantizer(descriptor)


MaxPool1d = QuantMaxPool1d
MaxPool2d = QuantMaxPool2d
MaxPool3d = QuantMaxPool3d
AvgPool1d = QuantAvgPool1d
AvgPool2d = QuantAvgPool2d
AvgPool3d = QuantAvgPool3d
AdaptiveAvgPool1d = QuantAdaptiveAvgPool1d
AdaptiveAvgPool2d = QuantAdaptiveAvgPool2d
AdaptiveAvgPool3d = QuantAdaptiveAvgPool3d
