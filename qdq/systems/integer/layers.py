"""The layers with weights for integer-only inference: `QConv2d`, `QConvBNReLU` and `QLinear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qdq.systems.integer.checks import require_layer, require_statistics
from qdq.systems.integer.qparam import QParam
from qdq.systems.integer.weighted import QWeighted


class QConv2d(QWeighted):
    """A convolution.

    Args:
        conv_module: The float layer, which keeps its place in the model; `freeze` changes it.
        qi: As for `QModule`.
        qo: As for `QModule`.
        num_bits: Width of all codes.
        options: scheme, axis and groups, as for `QWeighted`.
    """

    conv_module: nn.Conv2d
    attribute = "conv_module"

    def __init__(
        self,
        conv_module: nn.Conv2d,
        qi: bool = True,
        qo: bool = True,
        num_bits: int = 8,
        **options: Any,
    ) -> None:
        require_layer(conv_module, nn.Conv2d, type(self).__name__)
        super().__init__(conv_module, qi, qo, num_bits, **options)
        is_plain = conv_module.padding_mode == "zeros" and set(conv_module.dilation) == {1}
        self.has_integer_kernel = is_plain

    def operate(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The convolution with another weight; a padded zero is code Zx."""
        result: torch.Tensor = self.conv_module._conv_forward(x, weight, bias)
        return result

    def per_channel(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers `[]` or `[C]` in a shape that fits `[N, C, H, W]`."""
        return numbers.reshape(-1, 1, 1)


class QConvBNReLU(QConv2d):
    """A convolution, BatchNorm and ReLU; the BatchNorm is folded into the weight before it is quantized.

    In training mode the statistics of the batch are folded, and the running statistics follow them.

    Args:
        conv_module: The float convolution.
        bn_module: The BatchNorm after it.
        qi: As for `QModule`.
        qo: As for `QModule`.
        num_bits: Width of all codes.
        options: scheme, axis and groups, as for `QWeighted`.

    Raises:
        ArgumentError: The BatchNorm has no running statistics, or other channels.
        ArgumentTypeError: Layers of another kind.
    """

    has_relu = True

    def __init__(
        self,
        conv_module: nn.Conv2d,
        bn_module: nn.BatchNorm2d,
        qi: bool = True,
        qo: bool = True,
        num_bits: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(conv_module, qi, qo, num_bits, **options)
        require_layer(bn_module, nn.BatchNorm2d, self.label)
        require_statistics(bn_module, conv_module.out_channels, self.label)
        self.bn_module = bn_module
        self.qb = QParam(None)  # an entry of the state dicts of users; it has no range

    def fold(self, x: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight w * g / sqrt(var + eps) and the bias beta + (b - mean) * g / sqrt(var + eps)."""
        layer, batchnorm = self.conv_module, self.bn_module
        mean, variance = require_statistics(batchnorm, layer.out_channels, self.label)
        if x is not None and batchnorm.training:
            with torch.no_grad():
                result = layer(x)
                batchnorm(result)
            variance, mean = torch.var_mean(result, (0, 2, 3), unbiased=False)
        gain = (variance + batchnorm.eps).rsqrt()
        if batchnorm.weight is not None:
            gain = gain * batchnorm.weight
        bias = -mean if layer.bias is None else layer.bias - mean
        bias = bias * gain
        if batchnorm.bias is not None:
            bias = bias + batchnorm.bias
        return layer.weight * gain.reshape(-1, 1, 1, 1), bias


class QLinear(QWeighted):
    """A linear layer.

    Args:
        fc_module: The float layer, which keeps its place in the model; `freeze` changes it.
        qi: As for `QModule`.
        qo: As for `QModule`.
        num_bits: Width of all codes.
        options: scheme, axis and groups, as for `QWeighted`.
    """

    fc_module: nn.Linear
    attribute = "fc_module"

    def __init__(
        self,
        fc_module: nn.Linear,
        qi: bool = True,
        qo: bool = True,
        num_bits: int = 8,
        **options: Any,
    ) -> None:
        require_layer(fc_module, nn.Linear, type(self).__name__)
        super().__init__(fc_module, qi, qo, num_bits, **options)

    def operate(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The linear layer with another weight."""
        return F.linear(x, weight, bias)
