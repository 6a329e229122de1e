"""The fake quantization of UINT8 training (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3).

For a range [a, b] that contains 0, codes L to H, scale S and zero point Z (`affine`), and the nudged range
[a', b'] = [S * (L - Z), S * (H - Z)]:

    value = S * (clamp(round_half_even(x / S) + Z, L, H) - Z);  the gradient passes where a' <= x <= b'

A weight has its smallest and largest value as range, and codes 1 to 255, so that codes shifted to int8 are never -128.
An input has codes 0 to 255, and averages of the smallest and largest values of the batches as range.
"""

from __future__ import annotations

import torch

from qdq.systems.affine import cast_like, solve_affine
from qdq.systems.arithmetic import pass_gradient, require_batch
from qdq.systems.grid import Grid
from qdq.systems.moving_range import EMA_DECAY, MovingRange
from qdq.systems.quantizer import SystemQuantizer

_SYSTEM = "UINT8 training"


class UInt8Weight(SystemQuantizer):
    """Quantizes a weight by its smallest and largest value.

    Args:
        name: Name of the layer, for messages.
        symmetric: Codes -127 to 127 with zero point 0 instead, which TensorRT has.
    """

    def __init__(self, name: str = "UInt8Weight", *, symmetric: bool = False) -> None:
        super().__init__(name)
        self.symmetric = symmetric
        self.codes = (-127, 127) if symmetric else (1, 255)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized weight.

        Raises:
            ArgumentError: An empty weight, NaN or Inf.
        """
        require_batch(values, self.label)
        return _fake_quantize(values, *self._solve(values), *self.codes)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of a weight."""
        assert values is not None  # noqa: S101  # a weight
        scale, zero_point = self._solve(values)
        return Grid(_SYSTEM, scale.reshape(1), zero_point.reshape(1), *self.codes)

    def _solve(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = values.detach().aminmax()
        return solve_affine(low, high, *self.codes, is_symmetric=self.symmetric)


class UInt8Activation(MovingRange):
    """Quantizes an input by averages of the smallest and largest values of the batches, see `MovingRange`.

    Args:
        name: Name of the layer, for messages.
        symmetric: Codes -128 to 127 with zero point 0 instead, which TensorRT has.
        decay: As for `MovingRange`.
        delay: Likewise.
    """

    def __init__(
        self,
        name: str = "UInt8Activation",
        *,
        symmetric: bool = False,
        decay: float = EMA_DECAY,
        delay: int = 0,
    ) -> None:
        super().__init__(name, decay, delay)
        self.symmetric = symmetric
        self.codes = (-128, 127) if symmetric else (0, 255)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized input; the input itself during the delay.

        Raises:
            ArgumentError: An empty batch, NaN or Inf.
            StateError: It has seen no batch; it should move in a replica or in one of several processes.
        """
        require_batch(values, self.label)
        ends = self.follow(values)
        if ends is None:
            return values
        return _fake_quantize(values, *self._solve(*ends), *self.codes)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the input.

        Raises:
            StateError: It has seen no more batches than the delay.
        """
        scale, zero_point = self._solve(*self.find_range())
        return Grid(_SYSTEM, scale.reshape(1), zero_point.reshape(1), *self.codes)

    def _solve(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        require_batch(torch.stack([low, high]), f"{self.label}, the range of its input")
        return solve_affine(low, high, *self.codes, is_symmetric=self.symmetric)


def _fake_quantize(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """The quantized values; the gradient passes inside the nudged range, ends included."""
    inputs = values.float()
    codes = (inputs / scale).round() + zero_point
    quantized = scale * (codes.clamp(lowest, highest) - zero_point)
    low, high = scale * (lowest - zero_point), scale * (highest - zero_point)
    is_inside = (inputs >= low) & (inputs <= high)
    # Not torch.clamp: its gradient at an end is 1/2.
    return cast_like(
        pass_gradient(torch.where(is_inside, inputs, inputs.detach()), quantized), values
    )
