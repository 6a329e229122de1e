"""`Clip`: limits its input to a range that may be learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.compat.nn.functional import Bound, clip, require_bound
from qdq.errors import ArgumentError


class Clip(nn.Module):
    """`max(min(x, clip_value_max), clip_value_min)`.

    A learnable bound is a parameter; any other bound is a plain attribute, which is not in the state dict.

    Args:
        clip_value_min: Lower bound, a number or a tensor.
        clip_value_max: Upper bound, likewise.
        learn_min: Make the lower bound a parameter; it must be a float or have one element.
        learn_max: The same for the upper bound.

    Raises:
        ArgumentError: A bound to learn that is not scalar.
        ArgumentTypeError: A bound that is neither number nor tensor.
    """

    def __init__(
        self,
        clip_value_min: Bound | np.ndarray[Any, Any],
        clip_value_max: Bound | np.ndarray[Any, Any],
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        self.clip_value_min = _make_bound("clip_value_min", clip_value_min, learn_min)
        self.clip_value_max = _make_bound("clip_value_max", clip_value_max, learn_max)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The limited input."""
        return clip(inputs, self.clip_value_min, self.clip_value_max)


def _make_bound(name: str, value: object, learn: bool) -> Bound:
    if not learn:
        return require_bound(name, value)
    if isinstance(value, float):
        return nn.Parameter(torch.tensor(float(value)))  # float32 also of numpy's float64
    if not isinstance(value, np.ndarray | np.generic | torch.Tensor) or value.reshape(-1).shape != (
        1,
    ):
        raise ArgumentError(
            f"{name} is {value!r}; a bound to learn must be scalar: a float or an array with one element.",
            "start from one float for the whole tensor, such as 1.0.",
        )
    bound = torch.as_tensor(value).detach().clone()
    return nn.Parameter(bound if bound.is_floating_point() else bound.to(torch.get_default_dtype()))
