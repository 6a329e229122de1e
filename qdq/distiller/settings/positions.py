"""Arguments of layers by position, as statistics and settings count the inputs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from qdq.errors import ArgumentTypeError
from qdq.text import printable


def as_positional(
    layer: nn.Module, name: str, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with as few keywords as the forward of a layer allows.

    Args:
        layer: The layer.
        name: Its name, for messages.
        args: Its positional arguments.
        keywords: Its other arguments.

    Raises:
        ArgumentTypeError: Its forward has no such argument, or needs others.
    """
    if not keywords:
        return args, keywords
    try:
        bound = inspect.signature(layer.forward).bind(*args, **keywords)
    except TypeError as error:
        raise ArgumentTypeError(
            f"{printable(name)}, a {type(layer).__name__}, is called with other arguments than its forward has: "
            f"{error}.",
            "correct the call in the forward of the model.",
        ) from None
    return bound.args, bound.kwargs
