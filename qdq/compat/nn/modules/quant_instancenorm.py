"""Quantized instance normalisation: only the input is quantized. It has no alias without `Quant`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn.modules import instancenorm as float_instancenorm

from qdq.compat.nn.modules import _utils
from qdq.nn import QuantInputMixin


class QuantInstanceNorm1d(
    _utils.QuantInputMixin, QuantInputMixin, float_instancenorm.InstanceNorm1d
):
    """`torch.nn.InstanceNorm1d` with quantized input; `**kwargs` are `device`, `dtype` and `quant_desc_input`."""

    float_class: ClassVar[type] = float_instancenorm.InstanceNorm1d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_instancenorm.InstanceNorm1d.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, **factory
        )
        self.init_quantizer(**descriptors)


class QuantInstanceNorm2d(
    _utils.QuantInputMixin, QuantInputMixin, float_instancenorm.InstanceNorm2d
):
    """`torch.nn.InstanceNorm2d` with quantized input; `**kwargs` are `device`, `dtype` and `quant_desc_input`."""

    float_class: ClassVar[type] = float_instancenorm.InstanceNorm2d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_instancenorm.InstanceNorm2d.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, **factory
        )
        self.init_quantizer(**descriptors)


class QuantInstanceNorm3d(
    _utils.QuantInputMixin, QuantInputMixin, float_instancenorm.InstanceNorm3d
):
    """`torch.nn.InstanceNorm3d` with quantized input; `**kwargs` are `device`, `dtype` and `quant_desc_input`."""

    float_class: ClassVar[type] = float_instancenorm.InstanceNorm3d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_instancenorm.InstanceNorm3d.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, **factory
        )
        self.init_quantizer(**descriptors)
