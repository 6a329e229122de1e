"""The one place that refuses NaN and Inf during calibration."""

from __future__ import annotations

import torch

from qdq.errors import CalibrationError


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
