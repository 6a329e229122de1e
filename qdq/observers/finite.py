"""The one place that refuses inputs without a range: NaN, Inf, and anything but a tensor."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ArgumentTypeError, CalibrationError


def require_tensor(inputs: Any) -> None:
    """Refuse anything but a tensor.

    Raises:
        ArgumentTypeError: The message names the type.
    """
    if not isinstance(inputs, torch.Tensor):
        raise ArgumentTypeError(
            f"the input is a {type(inputs).__name__}, not a tensor.", "pass a torch.Tensor."
        )


def require_finite(maximum: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse a batch whose maximum of |x| in float32 is NaN or Inf.

    Only `maximum` is read if it is finite; otherwise the elements are counted for the message.

    Raises:
        CalibrationError: The message says how many elements are not finite.
    """
    if bool(torch.isfinite(maximum).all()):
        return
    num_defects = int((~torch.isfinite(inputs.float())).sum())
    raise CalibrationError(
        f"{num_defects} of {inputs.numel()} values are NaN or Inf; a range needs finite ones.",
        "run the float model on this batch: either the data or a layer before this one is broken.",
    )
