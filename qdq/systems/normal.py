"""`NormalQuant`: a quantizer of activations whose range is that of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qdq.systems.arithmetic import pass_gradient, require_bits, require_values
from qdq.systems.fixed_point import describe_moving
from qdq.systems.grid import Grid
from qdq.systems.hyperbolic import describe_tanh, tanh_quantize
from qdq.systems.layer import SystemQuantizer
from qdq.systems.logarithmic import describe_log, log_minmax_quantize
from qdq.systems.min_max import describe_min_max, min_max_quantize


class NormalQuant(SystemQuantizer):
    """Applies a function to every batch anew, so it has nothing to calibrate.

    Args:
        name: Its name, for messages.
        bits: Width of a code.
        quant_func: The function of values and bits, such as `min_max_quantize`.

    Attributes:
        counter: 0.
        path: Dotted name in the model, for messages; "" if it is not known.

    Raises:
        ArgumentError: `bits` is out of range.
        ArgumentTypeError: `bits` is no integer.
    """

    counter = 0

    def __init__(
        self, name: str, bits: int, quant_func: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> None:
        super().__init__()
        require_bits(bits, name)
        self.name = name
        self.path = ""
        self.bits = bits
        self.quant_func = quant_func

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values.

        Raises:
            ArgumentError: Empty or non-finite values.
            ArgumentTypeError: Not a float tensor.
        """
        require_values(values, self.path or self.name)
        quantized = self.quant_func(values.detach(), self.bits)
        return pass_gradient(values, quantized) if values.requires_grad else quantized

    def extra_repr(self) -> str:
        """The setting, between the brackets of `repr`."""
        return f"bits={self.bits}"

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid; of activations it is not constant, and those of log and tanh are never equally spaced."""
        if self.quant_func is min_max_quantize and values is not None:
            return describe_min_max(values, self.bits)
        describe = _CURVED.get(self.quant_func)
        is_constant = values is not None or self.bits > 1
        if describe is not None and is_constant:
            return describe(values, self.bits)
        return describe_moving(_SYSTEMS.get(self.quant_func, "NormalQuant"), self.bits)


_CURVED: dict[Any, Callable[[torch.Tensor | None, int], Grid]] = {
    log_minmax_quantize: describe_log,
    tanh_quantize: describe_tanh,
}
_SYSTEMS: dict[Any, str] = {
    min_max_quantize: "min-max affine",
    log_minmax_quantize: "logarithmic",
    tanh_quantize: "tanh",
}
