"""The codes below and above each weight, and the choice between them as a number that can be learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qdq.formats import Format

_GAMMA, _ZETA = -0.1, 1.1  # the sigmoid is stretched to this interval, then clamped to 0..1
_WEIGHT = 0.1  # weight of the regularizer; 1 is the loss of random rounding
_WARM_UP = 0.2  # fraction of the steps without regularizer
_BETA = (20.0, 2.0)
_FIXED = 1e-3  # a weight this close to a code keeps it, in steps of the scale


@dataclass(frozen=True)
class Neighbors:
    """The codes around weights, each of the shape of the weights.

    Args:
        nearest: The codes that nearest rounding gives.
        low: The lower codes.
        high: The upper codes.
    """

    nearest: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, ideal: torch.Tensor, fmt: Format) -> Neighbors:
        """The codes around weights.

        Args:
            ideal: Weights in steps of their scale, any shape.
            fmt: Their format.
        """
        nearest = clamp_codes(ideal.round(), fmt)
        # The largest weight keeps its code, so the range keeps its value.
        is_fixed = (ideal - nearest).abs() < _FIXED
        floor = ideal.floor()
        low = torch.where(is_fixed, nearest, clamp_codes(floor, fmt))
        high = torch.where(is_fixed, nearest, clamp_codes(floor + 1, fmt))
        return cls(nearest, low, high)

    @property
    def span(self) -> torch.Tensor:
        """`high - low`: 1, or 0 where the code is fixed or the weight lies outside of the range."""
        return self.high - self.low

    def flip(self, codes: torch.Tensor) -> torch.Tensor:
        """The change of each code if it goes to the other neighbor."""
        return self.low + self.high - 2 * codes


def clamp_codes(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Codes in the range of a format, which is symmetric for weights."""
    return codes.clamp(max(fmt.qmin, -fmt.qmax), fmt.qmax)


class SoftCodes:
    """For each weight a rectified sigmoid that goes from the lower code to the upper one (Nagel et al. 2020).

    Args:
        ideal: Weights in steps of their scale, any shape.
        fmt: Their format.
        start: The values that the sigmoids give first, in the same steps.

    Attributes:
        logits: The variables of the sigmoids.
    """

    def __init__(self, ideal: torch.Tensor, fmt: Format, *, start: torch.Tensor) -> None:
        neighbors = Neighbors.of(ideal, fmt)
        self._low, self._high, self._span = neighbors.low, neighbors.high, neighbors.span
        fraction = ((start - self._low) / self._span.clamp_min(1)).clamp(0, 1)
        self.logits = torch.logit((fraction - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()

    def relax(self) -> torch.Tensor:
        """The values between the codes that the sigmoids give, with gradients."""
        return self._low + self._rise() * self._span

    def harden(self) -> torch.Tensor:
        """The codes that the sigmoids are closer to."""
        is_high = torch.sigmoid(self.logits.detach()) > 0.5
        return torch.where(is_high, self._high, self._low)

    def penalize(self, step: int, steps: int) -> torch.Tensor:
        """The regularizer that pushes sigmoids to 0 or 1 (equation 24 of the paper), summed; 0 in the first steps.

        Args:
            step: The present step.
            steps: Number of steps.
        """
        if step < _WARM_UP * steps:
            return self.logits.new_zeros(())
        roundness = (2 * self._rise() - 1).abs() ** _anneal_exponent(step, steps)
        return _WEIGHT * (1 - roundness).sum()

    def _rise(self) -> torch.Tensor:
        """0 for the lower code, 1 for the upper one, or between (equation 23 of the paper)."""
        return (torch.sigmoid(self.logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def _anneal_exponent(step: int, steps: int) -> float:
    """The exponent of the regularizer, which goes from its first value to its last along half a cosine."""
    progress = (step - _WARM_UP * steps) / (steps * (1 - _WARM_UP))
    first, last = _BETA
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
