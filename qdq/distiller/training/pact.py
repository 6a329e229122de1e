"""PACT (Choi et al., arXiv 1805.06085): activations with a learned upper end a; weights are those of DoReFa.

y = min(max(x, 0), a) in n = 2^k - 1 equal steps;  dy/dx = 1 where 0 < x < a;  dy/da = 1 where x >= a
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qdq.distiller.ranges.linear_params import LinearParams, solve_params
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.settings.values import read_value
from qdq.formats import AMAX_FLOOR
from qdq.systems.affine import cast_like
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_bits

ACT_CLIP_INIT_VAL = 8.0
"""Where the upper end starts."""


class _LearnedClip(torch.autograd.Function):
    """The quantized values, with the gradients of PACT."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, clip_val: torch.Tensor, params: LinearParams
    ) -> torch.Tensor:
        """Codes 0 to n, as values."""
        clip = clip_val.detach().clone()  # it may move before the backward pass
        ctx.save_for_backward(values, clip)
        return cast_like(params.fake_quantize(values), values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Of the values inside, and of the end that cuts the others."""
        values, clip = ctx.saved_tensors
        is_cut = values >= clip
        is_inside = (values > 0) & ~is_cut
        return gradient * is_inside, (gradient * is_cut).float().sum().reshape(clip.shape), None


class LearnedClippedLinearQuantization(SystemQuantizer):
    """Quantizes an activation to equal steps of [0, a].

    Args:
        num_bits: The width k.
        init_act_clip_val: Where a starts, above 0.
        name: Name of the layer, for messages.

    Attributes:
        clip_val: The parameter a, which stays above 0.

    Raises:
        ArgumentError: A start that is not above 0, or no such width.
    """

    def __init__(
        self,
        num_bits: int,
        init_act_clip_val: float = ACT_CLIP_INIT_VAL,
        name: str = "LearnedClippedLinearQuantization",
    ) -> None:
        super().__init__()
        require_bits(num_bits, name)
        start = read_value("act_clip_init_val", init_act_clip_val, name)
        self.num_bits = num_bits
        self.name = name
        self.clip_val = nn.Parameter(torch.tensor([start]))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values.

        Raises:
            ArgumentError: No value, NaN or Inf.
        """
        require_values(values, self.name)
        params = self._solve()
        result: torch.Tensor = _LearnedClip.apply(values, self.clip_val, params)
        return result

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid: codes from 0 to n."""
        return self._solve().describe("PACT")

    @torch.no_grad()
    def _solve(self) -> LinearParams:
        if bool(self.clip_val < AMAX_FLOOR):  # after a large step
            self.clip_val.fill_(AMAX_FLOOR)
        high = self.clip_val.detach()
        return solve_params(0 * high, high, self.num_bits, LinearQuantMode.ASYMMETRIC_UNSIGNED)
