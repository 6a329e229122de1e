"""Settings and arguments as plain values, which files can hold: names of modes, numbers, text, tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from qdq.distiller.ranges.modes import ModePair
from qdq.distiller.settings.input_settings import InputSettings
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.statistics.records import LayerStatistics
from qdq.distiller.statistics.statistics_file import plain_layer
from qdq.errors import ArgumentTypeError

_SETTINGS = (LayerSettings, InputSettings, ModePair)


def to_plain(value: Any, name: str) -> Any:
    """A copy of a value without classes: mappings stay ordered, modes become their names.

    Args:
        value: Settings, arguments of a quantizer, statistics or plain values.
        name: Name of the value, for messages.

    Raises:
        ArgumentTypeError: No file can hold it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, LayerStatistics):
        return plain_layer(value)
    if isinstance(value, _SETTINGS):
        return to_plain(_fields_of(value), name)
    if isinstance(value, Mapping):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, to_plain(item, f"{name}.{key}")) for key, item in value.items())
    if isinstance(value, list | tuple):
        items = [to_plain(item, name) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise ArgumentTypeError(
        f"{name} is of type {type(value).__name__}, which a file cannot hold.",
        "use numbers, text, tensors, lists and dictionaries of them.",
    )


def _fields_of(settings: Any) -> dict[str, Any]:
    """The fields of settings, which may be settings."""
    return {name: getattr(settings, name) for name in vars(settings)}
