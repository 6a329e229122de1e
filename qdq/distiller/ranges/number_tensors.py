"""Numbers of the user as tensors: one number, a list of numbers, or a tensor."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TypeAlias

import torch

from qdq.errors import NumberTypeError

Numbers: TypeAlias = torch.Tensor | float | Sequence[float]
"""One number, or several of them."""


def read_numbers(
    value: Numbers,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The numbers as a tensor without gradient.

    Args:
        value: The numbers.
        name: What they are, for messages.
        dtype: The type of the tensor.
        device: Its device; None: that of the value.

    Raises:
        NumberTypeError: No numbers.
    """
    try:
        return torch.as_tensor(value, dtype=dtype, device=device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = type(value).__name__
        raise NumberTypeError(
            f"{name} is {reprlib.repr(value)}, a {kind}; expected a number, or a tensor or list of numbers.",
            "give numbers.",
        ) from None


def like_given(tensor: torch.Tensor, *given: Numbers) -> torch.Tensor | float:
    """A float if only numbers were given, else the tensor.

    Args:
        tensor: A result.
        given: What it was computed from.
    """
    if all(isinstance(value, int | float) for value in given):
        return float(tensor)
    return tensor
