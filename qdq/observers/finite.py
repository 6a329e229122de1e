"""The one place that refuses what no range can be taken from: NaN, Inf, and what is no tensor."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ArgumentTypeError, CalibrationError


def require_tensor(inputs: Any) -> None:
    """Refuse anything but a tensor.

    Raises:
        ArgumentTypeError: With the type that was found.
    """
    if not isinstance(inputs, torch.Tensor):
        raise ArgumentTypeError(
            f"the input is a {type(inputs).__name__}, not a tensor.", "pass a torch.Tensor."
        )


def require_finite(maximum: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse a batch whose maximum of |x| in float32 is NaN or Inf.

    Only `maximum` is read on the way through; the elements are counted when there is something to say.

    Raises:
        CalibrationError: With how many elements are not finite.
    """
    if bool(torch.isfinite(maximum).all()):
        return
    bad = int((~torch.isfinite(inputs.float())).sum())
    raise CalibrationError(
        f"{bad} of {inputs.numel()} values are NaN or Inf; a range needs finite ones.",
        "run the float model on this batch: either the data or a layer before this one is broken.",
    )
