"""`FoldedLater`: keeps `to_tensorrt` from a weight that is not yet the one that is quantized."""

from __future__ import annotations

import torch

from qdq.errors import StateError
from qdq.systems.grid import Grid
from qdq.systems.quantizer import SystemQuantizer


class FoldedLater(SystemQuantizer):
    """The quantizer of a weight before the BatchNorm after it is folded into it, so that it has no grid.

    Args:
        system: The quantizer of the folded weight.
    """

    def __init__(self, system: SystemQuantizer) -> None:
        super().__init__()
        self.system = system

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """As the quantizer."""
        quantized: torch.Tensor = self.system(values)
        return quantized

    def describe(self, values: torch.Tensor | None) -> Grid:
        """No grid.

        Raises:
            StateError: Always.
        """
        raise StateError(
            "a BatchNorm is simulated until qdq.distiller.fold_simulated_batchnorm(model) is called.",
            "call it first.",
        )
