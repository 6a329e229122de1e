"""DoReFa (Zhou et al., arXiv 1606.06160): weights on an odd number of steps, activations clipped to [0, 1].

For k bits, n = 2^k - 1, with round half to even:

    weight      u = tanh(w) / max |tanh(w)|,  j = round((u / 2 + 1/2) * n),  value (2 j - n) / n
    1 bit       mean |w| * sign(w), with sign(0) = 1
    activation  n equal steps of clip(x, 0, 1)

The gradient passes the rounding unchanged; tanh, its scale and the clip have their own. Weights that are all 0 stay 0.
"""

from __future__ import annotations

import torch

from qdq.distiller.ranges.linear_params import LinearParams, solve_params
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.settings.values import read_value
from qdq.distiller.training.gradients import pass_inside
from qdq.systems.affine import cast_like
from qdq.systems.arithmetic import pass_gradient, require_values
from qdq.systems.fixed_point import describe_sign, sign_quantize
from qdq.systems.grid import Grid, name_width
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_bits

_SYSTEM = "DoReFa"


class DorefaWeight(SystemQuantizer):
    """Quantizes a weight.

    Args:
        num_bits: The width k.
        name: Name of the layer, for messages.
    """

    def __init__(self, num_bits: int, name: str = "DorefaWeight") -> None:
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
        if self.num_bits == 1:
            return pass_gradient(values, sign_quantize(values))
        share = self.transform(values)
        if not bool(share.any()):
            return values
        num_steps = 2**self.num_bits - 1
        codes = 2 * ((share / 2 + 0.5) * num_steps).round() - num_steps
        return cast_like(pass_gradient(share, codes / num_steps), values)

    def transform(self, values: torch.Tensor) -> torch.Tensor:
        """The quotient tanh(w) / max |tanh(w)|, in float32; weights that are all 0 stay 0."""
        squashed = values.float().tanh()
        largest = squashed.abs().max()
        return squashed / torch.where(largest == 0, 1.0, largest)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid: odd codes, with the scale 1 / n."""
        assert values is not None  # noqa: S101  # a weight
        if self.num_bits == 1:
            return describe_sign(values, _SYSTEM)
        num_steps = 2**self.num_bits - 1
        scale = torch.full((1,), 1 / num_steps, device=values.device)
        obstacle = name_width(self.num_bits)
        return Grid(_SYSTEM, scale, torch.zeros_like(scale), -num_steps, num_steps, obstacle)


class ClippedLinearQuantization(SystemQuantizer):
    """Quantizes an activation to equal steps of [0, clip_val].

    Args:
        num_bits: The width k.
        clip_val: The upper end, above 0.
        name: Name of the layer, for messages.
    """

    def __init__(
        self, num_bits: int, clip_val: float = 1.0, name: str = "ClippedLinearQuantization"
    ) -> None:
        super().__init__()
        require_bits(num_bits, name)
        self.num_bits = num_bits
        self.clip_val = read_value("clip_val", clip_val, name)
        self.name = name

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values.

        Raises:
            ArgumentError: No value, NaN or Inf.
        """
        require_values(values, self.name)
        quantized = self._solve(values.device).fake_quantize(values.float())
        return pass_inside(values, quantized, 0, self.clip_val)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid: codes from 0 to n."""
        return self._solve(None).describe(_SYSTEM)

    def _solve(self, device: torch.device | None) -> LinearParams:
        high = torch.tensor(self.clip_val, device=device)
        return solve_params(0.0 * high, high, self.num_bits, LinearQuantMode.ASYMMETRIC_UNSIGNED)
