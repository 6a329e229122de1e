"""WRPN (Mishra et al., arXiv 1709.01134): weights clipped to [-1, 1]; activations are those of DoReFa.

For k bits and h = 2^(k-1) - 1, the value is round(h * clip(w, -1, 1)) / h, with round half to even; with 1 bit the sign
of w, with sign(0) = 1. The gradient passes where |w| <= 1. The wider layers of the paper are the user's.
"""

from __future__ import annotations

import torch

from qdq.distiller.training.gradients import pass_inside
from qdq.systems.arithmetic import require_values
from qdq.systems.fixed_point import describe_sign, sign_quantize
from qdq.systems.grid import Grid, name_width
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_bits

_SYSTEM = "WRPN"


class WRPNWeight(SystemQuantizer):
    """Quantizes a weight.

    Args:
        num_bits: The width k.
        name: Name of the layer, for messages.
    """

    def __init__(self, num_bits: int, name: str = "WRPNWeight") -> None:
        super().__init__()
        require_bits(num_bits, name)
        self.num_bits = num_bits
        self.name = name

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized weight.

        Raises:
            ArgumentError: An empty weight, NaN or Inf.
        """
        require_values(values, self.name)
        clipped = self.transform(values.detach())
        if self.num_bits == 1:
            quantized = sign_quantize(clipped, alpha=1.0)
        else:
            quantized = (clipped * self._num_steps).round() / self._num_steps
        return pass_inside(values, quantized, -1, 1)

    def transform(self, values: torch.Tensor) -> torch.Tensor:
        """The weight clipped to [-1, 1], in float32."""
        return values.float().clamp(-1, 1)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid, with the scale 1 / h."""
        assert values is not None  # noqa: S101  # a weight
        if self.num_bits == 1:
            return describe_sign(values, _SYSTEM, alpha=1.0)
        scale = torch.full((1,), 1 / self._num_steps, device=values.device)
        obstacle = name_width(self.num_bits)
        return Grid(
            _SYSTEM, scale, torch.zeros_like(scale), -self._num_steps, self._num_steps, obstacle
        )

    @property
    def _num_steps(self) -> int:
        """H, the largest code."""
        return int(2 ** (self.num_bits - 1)) - 1
