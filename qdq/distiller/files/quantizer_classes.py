"""The classes of quantizers that files can name, and their arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from qdq.distiller.settings.values import describe_value
from qdq.errors import ArgumentError, ArgumentTypeError

POST_TRAINING = "PostTrainLinearQuantizer"

CLASSES = {
    POST_TRAINING: "post_training.quantizer",
    "QuantAwareTrainRangeLinearQuantizer": "training.range_training",
    "NCFQuantAwareTrainQuantizer": "training.ncf_training",
    "DorefaQuantizer": "training.quantizers",
    "PACTQuantizer": "training.quantizers",
    "WRPNQuantizer": "training.quantizers",
}
"""Class -> its module: the only classes that a file can name."""

_OBJECTS = ("model", "optimizer")  # arguments that no file has
_FORMER_KEYS = {"bits_overrides": "overrides"}


def find_class(name: Any, place: str) -> Any:
    """The class of a quantizer.

    Args:
        name: Its name in a file.
        place: Where it stands, for messages.

    Raises:
        ArgumentError: An unknown name.
    """
    if not isinstance(name, str) or name not in CLASSES:
        raise ArgumentError(
            f"{place}: class is {describe_value(name)}; expected {', '.join(CLASSES)}.", "name one."
        )
    return getattr(importlib.import_module(f"qdq.distiller.{CLASSES[name]}"), name)


def build_quantizer(
    class_name: str, model: nn.Module, arguments: Mapping[str, Any], place: str, **objects: Any
) -> Any:
    """Make a quantizer from the content of a file.

    Args:
        class_name: Name of its class.
        model: The model to quantize.
        arguments: Its other arguments.
        place: Where they stand, for messages.
        objects: Arguments that no file has, such as the optimizer.

    Raises:
        ArgumentError: An unknown class, or an argument with an invalid value.
        ArgumentTypeError: An unknown argument, or one with a value of another type.
    """
    quantizer_class = find_class(class_name, place)
    require_arguments(quantizer_class, arguments, place)
    return quantizer_class(model, **objects, **arguments)


def takes_optimizer(class_name: str, place: str) -> bool:
    """Whether a quantizer is one of training, which needs the optimizer of the model.

    Args:
        class_name: Name of its class.
        place: Where it stands, for messages.

    Raises:
        ArgumentError: An unknown name.
    """
    return "optimizer" in inspect.signature(find_class(class_name, place)).parameters


def list_keys(quantizer_class: Any) -> list[str]:
    """The arguments of a quantizer that a file may have.

    Args:
        quantizer_class: Its class.
    """
    parameters = inspect.signature(quantizer_class).parameters
    return [name for name in parameters if name not in _OBJECTS]


def require_arguments(quantizer_class: Any, arguments: Mapping[str, Any], place: str) -> None:
    """Refuse arguments that the class does not have, or that have another name now.

    Args:
        quantizer_class: The class.
        arguments: Name -> value.
        place: Where they stand, for messages.

    Raises:
        ArgumentError: A former name.
        ArgumentTypeError: An unknown name.
    """
    allowed = list_keys(quantizer_class)
    for key in arguments:
        if key in _FORMER_KEYS:
            raise ArgumentError(
                f"{place}: {key} is the former name of {_FORMER_KEYS[key]}.", "write the new name."
            )
        if key not in allowed:
            raise ArgumentTypeError(
                f"{place}: {describe_value(key)} is unknown; expected {', '.join(allowed)}.",
                "correct or remove it.",
            )
