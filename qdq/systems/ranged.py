"""`RangedQuantizer`: a quantizer of activations with the range of each batch, or of all calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qdq.batch import require_batches
from qdq.device import without_tf32
from qdq.errors import StateError
from qdq.forward import call_model, evaluating
from qdq.systems.arithmetic import require_values
from qdq.systems.quantizer import SystemQuantizer
from qdq.text import list_names

MOVING_RANGE = (
    "its range is recomputed for every batch, until qdq.systems.calibrate_inputs(model, batches) "
    "records one"
)
"""The obstacle of a quantizer without a static range."""


class RangedQuantizer(SystemQuantizer):
    """A quantizer whose range is that of each batch, until `collect_ranges` records one.

    Args:
        name: For messages.
        takes_range: Whether its formula has a range that can be recorded.

    Attributes:
        low: Lower end of the static range; above `high` if there is none.
        high: Upper end.
        is_collecting: Whether a forward returns its input and widens the static range.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, name: str, *, takes_range: bool = True) -> None:
        super().__init__(name)
        self.takes_range = takes_range
        self.is_collecting = False
        if takes_range:
            self.register_buffer("low", torch.tensor(torch.inf))
            self.register_buffer("high", torch.tensor(-torch.inf))

    @property
    def has_range(self) -> bool:
        """Whether it has a static range."""
        return self.takes_range and self.read_number("low") <= self.read_number("high")

    def widen(self, values: torch.Tensor) -> None:
        """Widen the static range to the values of a batch.

        Args:
            values: The batch.

        Raises:
            ArgumentError: An empty batch, NaN or Inf.
            StateError: As for `require_single`.
        """
        require_values(values, self.label)
        self.require_single("calibrates")
        limit = torch.finfo(torch.float32).max
        low, high = (float(end) for end in values.detach().aminmax())
        self.write_number("low", max(min(low, self.read_number("low")), -limit))
        self.write_number("high", min(max(high, self.read_number("high")), limit))

    def forget_range(self) -> None:
        """Have no static range again."""
        self.write_number("low", torch.inf)
        self.write_number("high", -torch.inf)


def list_moving(model: nn.Module) -> dict[str, RangedQuantizer]:
    """The quantizers whose range is that of each batch and can be recorded, by dotted name.

    Args:
        model: A model of any number system.
    """
    quantizers = {}
    for name, module in model.named_modules():
        if isinstance(module, RangedQuantizer) and module.takes_range and not module.has_range:
            quantizers[name] = module
    return quantizers


def collect_ranges(
    model: nn.Module, quantizers: Mapping[str, RangedQuantizer], batches: Iterable[Any]
) -> int:
    """Record the ranges of all batches; if that fails, of none.

    Args:
        model: The model.
        quantizers: Dotted name -> quantizer without a range.
        batches: As for `qdq.calibrate_model`.

    Returns:
        The number of batches.

    Raises:
        ArgumentError: Empty or non-finite values.
        ArgumentTypeError: One tensor instead of batches.
        StateError: A quantizer that no batch reaches; several processes or replicas.
    """
    require_batches(batches)
    num_batches = 0
    for quantizer in quantizers.values():
        quantizer.is_collecting = True
    try:
        with evaluating(model), without_tf32():
            for batch in batches:
                call_model(model, batch)
                num_batches += 1
        _require_ranges(quantizers, num_batches)
    except BaseException:
        for quantizer in quantizers.values():
            quantizer.forget_range()
        raise
    finally:
        for quantizer in quantizers.values():
            quantizer.is_collecting = False
    return num_batches


def _require_ranges(quantizers: Mapping[str, RangedQuantizer], num_batches: int) -> None:
    missing = [name for name, quantizer in quantizers.items() if not quantizer.has_range]
    if missing:
        raise StateError(
            f"{list_names(missing, 5)}: no range; {num_batches} batches did not reach "
            f"{len(missing)} of {len(quantizers)} quantizers.",
            "calibrate on batches that reach them.",
        )
