"""BatchNorm folded into a layer while both are trained (Krishnamoorthi, arXiv 1806.08342, section 3.2.2).

With the factor g and the offset of a BatchNorm, and the mean and deviation of a batch and of the running statistics:

    weight  quantize(w * g / running_deviation)
    output  conv(x) * running_deviation / deviation + quantize(offset - g * mean / deviation)

So codes do not follow the noise of batches. After a delay, or in evaluation, the running statistics take the place of
those of the batch, and the output is what one folded layer computes. `fold_simulated_batchnorm` makes it one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qdq.distiller.training.folded_later import FoldedLater
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.systems.layer import SystemLayer

FREEZE_BN_DELAY_DEFAULT = 200_000

_BATCHNORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


class SimulatedFoldedBatchNorm(nn.Module):
    """A layer and the BatchNorm after it.

    Args:
        param_module: The layer, quantized or not.
        bn: The BatchNorm.
        freeze_bn_delay: Number of batches in training after which its statistics stay.

    Raises:
        ArgumentTypeError: Modules that do not fit each other.
        ArgumentError: They differ in their number of channels, or the BatchNorm has no running statistics.
    """

    first_batch: torch.Tensor

    def __init__(
        self, param_module: Any, bn: Any, freeze_bn_delay: int = FREEZE_BN_DELAY_DEFAULT
    ) -> None:
        super().__init__()
        _require_fit(param_module, bn)
        self.param_module = param_module
        self.bn = bn
        self.freeze_bn_delay = freeze_bn_delay
        self._kernel_shape = [1] * (
            param_module.weight.dim() - 2
        )  # torch.fx knows no axes of tensors
        self.register_buffer("first_batch", bn.num_batches_tracked.clone())
        if isinstance(param_module, SystemLayer) and param_module.weight_system is not None:
            param_module.weight_system = FoldedLater(param_module.weight_system)

    @property
    def is_frozen(self) -> bool:
        """Whether the statistics stay as they are."""
        return bool(self.bn.num_batches_tracked - self.first_batch >= self.freeze_bn_delay)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The normalized output.

        Args:
            values: `[N, channels, ...]`.
        """
        layer = self.param_module
        if isinstance(layer, SystemLayer) and layer.input_system is not None:
            values = layer.input_system(values)
        if self.bn.training and not self.is_frozen:
            return self._run_live(values)
        weight, shift = self._fold()
        output = self._run_layer(values, self._quantize("weight", weight))
        return output + self._per_channel(self._quantize("bias", shift))

    def _run_live(self, values: torch.Tensor) -> torch.Tensor:
        layer, bn = self.param_module, self.bn
        sums = self._run_layer(values, layer.weight)
        axes = (0, *range(2, 2 + len(self._kernel_shape)))  # all but the channels
        variance, mean = torch.var_mean(sums, axes, correction=0)
        with torch.no_grad():
            bias = 0.0 if layer.bias is None else self._per_channel(layer.bias)
            bn(sums + bias)  # moves its statistics
        inverse = (variance + bn.eps).rsqrt()
        running_inverse = (bn.running_var + bn.eps).rsqrt()
        gain, offset = self._read_affine()
        weight = self._quantize("weight", layer.weight * self._per_row(gain * running_inverse))
        shift = self._quantize("bias", offset - gain * mean * inverse)
        output = self._run_layer(values, weight)
        output = output * self._per_channel(inverse / running_inverse)
        return output + self._per_channel(shift)

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the bias of one layer that computes the same with the running statistics."""
        layer, bn = self.param_module, self.bn
        gain, offset = self._read_affine()
        factor = gain * (bn.running_var + bn.eps).rsqrt()
        bias = 0.0 if layer.bias is None else layer.bias
        return layer.weight * self._per_row(factor), offset + (bias - bn.running_mean) * factor

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """One layer that computes the same in evaluation, with its quantizers."""
        layer: Any = self.param_module
        weight, shift = self._fold()
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter(shift)
        if isinstance(layer, SystemLayer) and isinstance(layer.weight_system, FoldedLater):
            layer.weight_system = layer.weight_system.system
        return layer  # type: ignore[no-any-return]

    def _read_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        bn = self.bn
        if bn.weight is None:
            return torch.ones_like(bn.running_var), torch.zeros_like(bn.running_var)
        return bn.weight, bn.bias

    def _quantize(self, parameter: str, values: torch.Tensor) -> torch.Tensor:
        system = getattr(self.param_module, f"{parameter}_system", None)
        return values if system is None else system(values)

    def _per_row(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number for each output channel, in a shape that broadcasts to the weight."""
        return numbers.reshape(-1, 1, *self._kernel_shape)

    def _per_channel(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number for each channel, in a shape that broadcasts to an output `[N, channels, ...]`."""
        return numbers.reshape(1, -1, *self._kernel_shape)

    def _run_layer(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer with another weight, without bias."""
        if isinstance(self.param_module, nn.Linear):
            return F.linear(values, weight)
        output: torch.Tensor = self.param_module._conv_forward(values, weight, None)
        return output


def fits_batchnorm(layer: nn.Module, bn: nn.Module) -> bool:
    """Whether a BatchNorm normalizes the channels of such a layer.

    Args:
        layer: The layer.
        bn: The module after it.
    """
    kinds = [kind for base, kind in _BATCHNORMS.items() if isinstance(layer, base)]
    return isinstance(bn, tuple(kinds))


def _require_fit(layer: Any, bn: Any) -> None:
    """Refuse modules that cannot be folded.

    Raises:
        ArgumentTypeError: Of other classes.
        ArgumentError: They differ in their number of channels, or there are no running statistics.
    """
    fix = "leave the BatchNorm as it is."
    if not fits_batchnorm(layer, bn):
        pairs = ", ".join(f"{a.__name__} + {b.__name__}" for a, b in _BATCHNORMS.items())
        raise ArgumentTypeError(
            f"{type(layer).__name__} + {type(bn).__name__} cannot be folded; expected {pairs}.", fix
        )
    if bn.running_var is None:
        raise ArgumentError("the BatchNorm has no running statistics.", fix)
    num_outputs = layer.weight.shape[0]
    if bn.num_features != num_outputs:
        raise ArgumentError(
            f"the BatchNorm has {bn.num_features} channels, the layer before it {num_outputs}.", fix
        )
