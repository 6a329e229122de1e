"""`NormalQuant`: a quantizer of activations whose range is that of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qdq.errors import ArgumentTypeError
from qdq.systems.arithmetic import pass_gradient, require_batch, require_values
from qdq.systems.grid import Grid, describe_moving
from qdq.systems.hyperbolic import describe_tanh, tanh_quantize
from qdq.systems.logarithmic import describe_log, log_minmax_quantize
from qdq.systems.min_max import (
    MIN_MAX,
    describe_min_max,
    min_max_quantize,
    quantize_between,
)
from qdq.systems.ranged import MOVING_RANGE, RangedQuantizer
from qdq.systems.settings import require_bits


class NormalQuant(RangedQuantizer):
    """Applies a function to every batch anew, so it has nothing to calibrate.

    Only `calibrate_inputs` gives it a range, if its function is `min_max_quantize`: then it clamps each batch to that
    range, and rounds in it.

    Args:
        name: Its name, for messages.
        bits: Width of a code.
        quant_func: The function of values and bits, such as `min_max_quantize`.

    Attributes:
        counter: 0.

    Raises:
        ArgumentError: `bits` is out of range.
        ArgumentTypeError: `quant_func` is no function.
        NumberTypeError: `bits` is no integer.
    """

    counter = 0

    def __init__(
        self, name: str, bits: int, quant_func: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> None:
        super().__init__(name, takes_range=quant_func is min_max_quantize)
        require_bits(bits, name)
        if not callable(quant_func):
            raise ArgumentTypeError(
                f"{name}: quant_func is of type {type(quant_func).__name__}.",
                "give a function of values and bits, such as min_max_quantize.",
            )
        self.bits = bits
        self.quant_func = quant_func

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values.

        Raises:
            ArgumentError: Empty or non-finite values.
            NumberTypeError: Not a float tensor.
        """
        if self.is_collecting:
            self.widen(values)
            return values
        if self.has_range:
            require_batch(values, self.label)
            quantized = quantize_between(values.detach(), self.bits, self.low, self.high)
        else:
            require_values(values, self.label)
            quantized = self.quant_func(values.detach(), self.bits)
        return pass_gradient(values, quantized)

    def extra_repr(self) -> str:
        """The setting, between the brackets of `repr`."""
        return f"bits={self.bits}"

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid; that of activations is constant only with a range, and log and tanh have no equal steps."""
        if self.takes_range:
            return self._describe_min_max(values)
        describe = _CURVED.get(self.quant_func)
        is_constant = values is not None or self.bits > 1
        if describe is not None and is_constant:
            return describe(values, self.bits)
        return describe_moving(_SYSTEMS.get(self.quant_func, "NormalQuant"), self.bits)

    def _describe_min_max(self, values: torch.Tensor | None) -> Grid:
        if values is None and not self.has_range:
            return describe_moving(MIN_MAX, self.bits, MOVING_RANGE)
        ends = torch.stack([self.low, self.high]) if values is None else values
        return describe_min_max(ends, self.bits)


_CURVED: dict[Any, Callable[[torch.Tensor | None, int], Grid]] = {
    log_minmax_quantize: describe_log,
    tanh_quantize: describe_tanh,
}
_SYSTEMS: dict[Any, str] = {
    log_minmax_quantize: "logarithmic",
    tanh_quantize: "tanh",
}
