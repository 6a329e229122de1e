"""Range-linear quantization in training: weights by their values, activations by moving averages of their range.

The modes and their formulas are those of `linear_params`. The gradient of a weight passes unchanged, that of an
activation where it is inside the range.
"""

from __future__ import annotations

import math

import torch

from qdq.distiller.ranges.linear_params import LinearParams, solve_params
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.training.gradients import pass_inside
from qdq.systems.arithmetic import pass_gradient, require_values
from qdq.systems.grid import Grid
from qdq.systems.moving_range import EMA_DECAY, MovingRange
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_bits

_SYSTEM = "range-linear"


class RangeLinearParameter(SystemQuantizer):
    """Quantizes a weight or a bias by its smallest and largest value.

    The buffers `<kind>_scale` and `<kind>_zero_point` have what the last forward used.

    Args:
        kind: "weight" or "bias".
        num_bits: The width of a code.
        mode: The mode.
        shape: Of the scales: () for one, (C, 1, ...) for one for each output channel.
        name: Name of the layer, for messages.
    """

    def __init__(
        self,
        kind: str,
        num_bits: int,
        mode: LinearQuantMode,
        shape: tuple[int, ...] = (),
        name: str = "RangeLinearParameter",
    ) -> None:
        super().__init__()
        require_bits(num_bits, name, 2 if mode.is_restricted else 1)
        self.kind = kind
        self.num_bits = num_bits
        self.mode = mode
        self.shape = shape
        self.name = name
        self.register_buffer(f"{kind}_scale", torch.ones(shape))
        self.register_buffer(f"{kind}_zero_point", torch.zeros(shape))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized parameter.

        Raises:
            ArgumentError: An empty tensor, NaN or Inf.
        """
        require_values(values, self.name)
        params = self._solve(values)
        self.get_buffer(f"{self.kind}_scale").copy_(params.scale)
        self.get_buffer(f"{self.kind}_zero_point").copy_(params.zero_point)
        return pass_gradient(values, params.fake_quantize(values))

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of a weight."""
        assert values is not None  # noqa: S101  # a weight
        return self._solve(values).describe(_SYSTEM)

    def _solve(self, values: torch.Tensor) -> LinearParams:
        rows = values.detach().float().reshape(math.prod(self.shape), -1)
        low, high = rows.aminmax(dim=1)
        return solve_params(
            low.reshape(self.shape), high.reshape(self.shape), self.num_bits, self.mode
        )


class FakeLinearQuantization(MovingRange):
    """Quantizes an activation by moving averages of its smallest and largest values, to which it is clamped.

    Args:
        num_bits: The width of a code.
        mode: The mode.
        ema_decay: The decay B of `MovingRange`.
        name: Name of the layer, for messages.
    """

    def __init__(
        self,
        num_bits: int = 8,
        mode: LinearQuantMode = LinearQuantMode.SYMMETRIC,
        ema_decay: float = EMA_DECAY,
        name: str = "FakeLinearQuantization",
    ) -> None:
        super().__init__(name, ema_decay)
        require_bits(num_bits, name, 2 if mode.is_restricted else 1)
        self.num_bits = num_bits
        self.mode = mode

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values; the values themselves in a measurement before the first step.

        Raises:
            ArgumentError: No value, NaN or Inf.
            StateError: It has seen no batch; it should move in one of several processes.
        """
        require_values(values, self.name)
        ends = self.follow(values)
        if ends is None:
            return values
        low, high = self._find_limits(*ends)
        # In float64: the ends of a symmetric range are ties, which float32 would lose.
        params = solve_params(low.double(), high.double(), self.num_bits, self.mode)
        quantized = params.fake_quantize(values.detach().float().clamp(low, high))
        return pass_inside(values, quantized, low, high)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the activation.

        Raises:
            StateError: It has seen no batch.
        """
        low, high = self._find_limits(*self.find_range())
        return solve_params(low, high, self.num_bits, self.mode).describe(_SYSTEM)

    def _find_limits(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends to which values are clamped, in float32, with 0 between them; equally far if symmetric."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if not self.mode.is_symmetric:
            return low, high
        largest = torch.maximum(-low, high)
        return -largest, largest
