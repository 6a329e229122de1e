"""Binary quantizers: weights of two values for each channel (BWN), and inputs of two values as well (BNN)."""

from __future__ import annotations

from typing import Literal

import torch

from qdq.errors import ArgumentError
from qdq.formats import AMAX_FLOOR
from qdq.systems.arithmetic import pass_gradient, require_batch, require_values, sign_of
from qdq.systems.grid import INT8_HIGHEST, Grid
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_choice

Sampling = Literal["", "hard", "logistic"]
"""How training draws signs: "" not at all, or with a probability of +1 that is a hard or a logistic sigmoid."""

_SAMPLINGS = ("hard", "logistic")

SMALLEST_SCALE = AMAX_FLOOR / INT8_HIGHEST
"""The scale of a channel of zeros, which must be above 0."""


def sign_at_random(
    values: torch.Tensor,
    sampling: Literal["hard", "logistic"] = "hard",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """+1 with probability clip((x + 1) / 2, 0, 1), else -1 (Courbariaux et al., arXiv 1511.00363, section 2.2).

    Args:
        values: Any shape.
        sampling: "logistic": the probability is 1 / (1 + exp(-x)).
        generator: Random numbers on the device of the values; None: those of torch.

    Raises:
        ArgumentError: Empty or non-finite values, another sampling, or no generator of this device.
        NumberTypeError: Not a float tensor.
    """
    require_values(values, "sign_at_random")
    require_choice(sampling, _SAMPLINGS, "sampling", "sign_at_random")
    is_fitting = isinstance(generator, torch.Generator | None)
    if not is_fitting or (generator and generator.device.type != values.device.type):
        raise ArgumentError(
            f"sign_at_random: the generator is {generator}, the values are on {values.device}.",
            "make one with torch.Generator(values.device).",
        )
    return _draw(values, sampling, generator)


def _draw(
    values: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> torch.Tensor:
    """`sign_at_random` for arguments that have been checked."""
    values_32 = values.float()
    probability = ((values_32 + 1) / 2).clamp(0, 1)
    if sampling == "logistic":
        probability = values_32.sigmoid()
    drawn = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(drawn < probability, 1.0, -1.0).to(values.dtype)


class BinaryQuantizer(SystemQuantizer):
    """The signs of a tensor.

    Args:
        name: For messages.
        zero: The sign of 0, 1 or -1.
        sampling: How training draws signs. Evaluation, and every forward without gradients, takes the nearest one.
            The random numbers are those of torch, which `finetune` seeds.

    Attributes:
        generator: Random numbers to draw from instead, on the device of the values; None: those of torch. No
            checkpoint has its state.

    Raises:
        ArgumentError: Another `zero` or `sampling`.
    """

    def __init__(self, name: str, zero: int = 1, sampling: Sampling = "") -> None:
        super().__init__(name)
        require_choice(zero, (1, -1), "zero", name)
        require_choice(sampling, ("", *_SAMPLINGS), "sampling", name)
        self.zero = zero
        self.sampling: Sampling = sampling
        self.generator: torch.Generator | None = None
        self.is_tuned = False  # see `clipping_weights`

    def take_signs(self, values: torch.Tensor) -> torch.Tensor:
        """+1 or -1 for each value, without a gradient.

        Raises:
            ArgumentError: As for `arithmetic.require_batch`.
        """
        require_batch(values, self.label)
        is_training = (self.training or self.is_tuned) and torch.is_grad_enabled()
        if self.sampling and is_training:
            return _draw(values.detach(), self.sampling, self.generator)
        return sign_of(values.detach(), self.zero)


class BinaryWeight(BinaryQuantizer):
    """alpha_c * sign(W), alpha_c the mean of |W| in output channel c (Rastegari et al., arXiv 1603.05279, section 3.1).

    The gradient passes everywhere.

    Args:
        name: As for `BinaryQuantizer`.
        zero: As for `BinaryQuantizer`.
        sampling: As for `BinaryQuantizer`.
        scaled: Whether alpha is that mean; otherwise it is 1.
    """

    def __init__(
        self, name: str, zero: int = 1, sampling: Sampling = "", scaled: bool = True
    ) -> None:
        super().__init__(name, zero, sampling)
        self.scaled = scaled

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The binary weight."""
        signs = self.take_signs(values)
        if self.scaled:
            signs = signs * self._scale(values).to(values.dtype)
        return pass_gradient(values, signs)

    def _scale(self, values: torch.Tensor) -> torch.Tensor:
        """alpha, `[C, 1, ...]`; sums of float32 could be infinite."""
        dims = tuple(range(1, values.dim()))
        return values.detach().abs().mean(dims, keepdim=True, dtype=torch.float64).float()

    def describe(self, values: torch.Tensor | None) -> Grid:
        """Codes -1 and 1, with a scale for each channel."""
        assert values is not None  # noqa: S101  # a weight
        scale = torch.ones(1, device=values.device)
        if self.scaled:
            scale = self._scale(values).to(values.dtype).float().flatten()
        scale = scale.clamp_min(SMALLEST_SCALE)
        return Grid("binary", scale, torch.zeros_like(scale), -1, 1)


class BinaryInput(BinaryQuantizer):
    """sign(x); the gradient passes where |x| <= 1 (Hubara et al., arXiv 1602.02830, section 1.3)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The signs."""
        signs = self.take_signs(values)
        # The gradient of torch.clamp at -1 and 1 is not the same in all versions.
        passing = torch.where(values.detach().abs() <= 1, values, values.detach())
        return pass_gradient(passing, signs)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """Codes -1 and 1, with scale 1."""
        one = torch.ones(1)
        reason = "are signs: they run as int8, with no 1-bit gain"
        return Grid("binary", one, torch.zeros(1), -1, 1, on_request=reason)
