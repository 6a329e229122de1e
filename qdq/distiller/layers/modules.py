"""Modules for operations that networks call as functions, so that each has a name, statistics and a quantizer.

Users of Distiller put them into their networks. `modularize` does it by machine.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import nn


class EltwiseAdd(nn.Module):
    """The sum of tensors.

    Args:
        inplace: Add to the first one in place.

    Attributes:
        feeds_float: Whether only layers that TensorRT computes in float read the sum. Its inputs are then not rounded.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.feeds_float = False

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The sum of one or more tensors, of any shapes that broadcast."""
        return functools.reduce(operator.iadd if self.inplace else operator.add, inputs)


class EltwiseSub(nn.Module):
    """The difference of two tensors.

    Args:
        inplace: Subtract from the first one in place.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, minuend: torch.Tensor, subtrahend: torch.Tensor) -> torch.Tensor:
        """The first tensor without the second."""
        return minuend.sub_(subtrahend) if self.inplace else minuend - subtrahend


class EltwiseMult(nn.Module):
    """The product of tensors, element by element.

    Args:
        inplace: Multiply the first one in place.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The product of one or more tensors, of any shapes that broadcast."""
        return functools.reduce(operator.imul if self.inplace else operator.mul, inputs)


class EltwiseDiv(nn.Module):
    """The quotient of two tensors, element by element.

    Args:
        inplace: Divide the first one in place.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, dividend: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        """The first tensor by the second."""
        return dividend.div_(divisor) if self.inplace else dividend / divisor


class Concat(nn.Module):
    """The concatenation of tensors.

    Args:
        dim: Along this axis.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The tensors one behind the other."""
        return torch.cat(inputs, self.dim)


class Matmul(nn.Module):
    """The matrix product of two tensors."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The product, as of `torch.matmul`."""
        return torch.matmul(first, second)


class BatchMatmul(nn.Module):
    """The matrix products of two batches of matrices."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The products `[B, n, m]` of `[B, n, k]` and `[B, k, m]`, as of `torch.bmm`."""
        return torch.bmm(first, second)
