"""The fake quantization of UINT8 training (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3).

For a range [a, b] that contains 0, codes L to H, scale S and zero point Z (`affine`), and the nudged range
[a', b'] = [S * (L - Z), S * (H - Z)]:

    value = S * (clamp(round_half_even(x / S) + Z, L, H) - Z);  the gradient passes where a' <= x <= b'

A weight has its smallest and largest value as range, and codes 1 to 255, so that codes shifted to int8 are never -128.
An input has codes 0 to 255, and averages of the smallest and largest values of the batches as range.
"""

from __future__ import annotations

import torch

from qdq.errors import StateError
from qdq.systems.affine import cast_like, solve_affine
from qdq.systems.arithmetic import pass_gradient, require_batch
from qdq.systems.grid import Grid
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_count, require_number

EMA_DECAY = 0.999
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


class UInt8Activation(SystemQuantizer):
    """Quantizes an input by averages of the smallest and largest values of the batches.

    With decay B, the average m_t = B * m_(t-1) + (1 - B) * v_t is divided by 1 - B^t. It moves in every forward in
    training mode, and in every step of an optimizer within `moving_ranges`.

    Args:
        name: Name of the layer, for messages.
        symmetric: Codes -128 to 127 with zero point 0 instead, which TensorRT has.
        decay: B.
        delay: Number of steps in which it only watches; the paper takes 50 000 to 2 million.

    Attributes:
        running_min: Average of the smallest values, not divided.
        running_max: Average of the largest values, not divided.
        num_steps: Number of batches so far.
        is_moving: Whether it also moves in evaluation mode, where there are gradients.

    Raises:
        ArgumentError: A decay outside [0, 1), or a negative delay.
        NumberTypeError: Numbers of the wrong type.
    """

    running_min: torch.Tensor
    running_max: torch.Tensor
    num_steps: torch.Tensor

    def __init__(
        self,
        name: str = "UInt8Activation",
        *,
        symmetric: bool = False,
        decay: float = EMA_DECAY,
        delay: int = 0,
    ) -> None:
        super().__init__(name)
        require_number(decay, "decay", name, 0, 1)
        require_count(delay, "delay", name)
        self.symmetric = symmetric
        self.codes = (-128, 127) if symmetric else (0, 255)
        self.decay = decay
        self.delay = delay
        self.is_moving = False
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.register_buffer("running_min", torch.zeros(()))
        self.register_buffer("running_max", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized input; the input itself during the delay.

        Raises:
            ArgumentError: An empty batch, NaN or Inf.
            StateError: It has seen no batch; it should move in a replica or in one of several processes.
        """
        require_batch(values, self.label)
        if self.training or (self.is_moving and torch.is_grad_enabled()):
            self._observe(values.detach().float())
        low, high, num_steps = self._average()
        if self.training:
            self.after_step()
        if num_steps == 0 and not self.is_moving:
            raise self._uncalibrated()
        if num_steps == 0 or num_steps <= self.delay:
            return values
        return _fake_quantize(values, *self._solve(low, high), *self.codes)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the input.

        Raises:
            StateError: It has seen no more batches than the delay.
        """
        low, high, num_steps = self._average()
        if num_steps == 0 or num_steps <= self.delay:
            raise self._uncalibrated()
        scale, zero_point = self._solve(low, high)
        return Grid(_SYSTEM, scale.reshape(1), zero_point.reshape(1), *self.codes)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the averages with the batch of this step, if the step reached the layer."""
        if self._pending is None:
            return
        low, high = self._pending
        self.running_min.mul_(self.decay).add_(low * (1 - self.decay))
        self.running_max.mul_(self.decay).add_(high * (1 - self.decay))
        self.write_number("num_steps", self.read_number("num_steps") + 1)
        self._pending = None

    def forget_step(self) -> None:
        """Drop the batch of a step that did not end."""
        self._pending = None

    def _observe(self, values: torch.Tensor) -> None:
        self.require_single("averages ranges")
        low, high = values.aminmax()
        if self._pending is not None:  # the layer runs more than once in a step
            low = torch.minimum(low, self._pending[0])
            high = torch.maximum(high, self._pending[1])
        self._pending = low, high

    def _average(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The averages with the batch of this step, divided, and the number of batches in them."""
        low, high = self.running_min, self.running_max
        num_steps = int(self.read_number("num_steps"))
        if self._pending is not None:
            low = self.decay * low + (1 - self.decay) * self._pending[0]
            high = self.decay * high + (1 - self.decay) * self._pending[1]
            num_steps = num_steps + 1
        # A tensor: on a GPU, torch divides by a Python number with another rounding.
        weight = torch.full_like(low, 1 - self.decay ** max(num_steps, 1), dtype=torch.float64)
        return low / weight, high / weight, num_steps

    def _solve(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return solve_affine(low, high, *self.codes, is_symmetric=self.symmetric)

    def _uncalibrated(self) -> StateError:
        return StateError(
            f"{self.label}: the range of its input has seen {int(self.num_steps)} batches, with a delay "
            f"of {self.delay}.",
            "train first.",
        )


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
