"""The automatic swap: while it is active, `torch.nn.Conv2d` and others are quantized classes."""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qdq.compat import nn as quant_nn
from qdq.compat.onnx_export import enable_onnx_export as enable_onnx_export
from qdq.errors import ArgumentTypeError

logger = logging.getLogger(__name__)

_quant_entry = namedtuple("quant_entry", "orig_mod mod_name replace_mod")  # type: ignore[name-match]

_DEFAULT_QUANT_MAP: list[Any] = [
    _quant_entry(torch.nn, name, getattr(quant_nn, f"Quant{name}"))
    for name in (
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
        "LSTM",
        "LSTMCell",
        "AvgPool1d",
        "AvgPool2d",
        "AvgPool3d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveAvgPool3d",
    )
]


class QuantModuleReplacementHelper:
    """Rebinds names of modules such as `torch.nn` to quantized classes, and back.

    Instances are independent, and each restores the classes that it found. `orginal_func_map` (so spelt) holds the
    entries with the former classes, `quant_map` the entries to bind; `default_quant_map` is `_DEFAULT_QUANT_MAP`.
    """

    def __init__(self) -> None:
        self.orginal_func_map: list[Any] = []
        self.default_quant_map = _DEFAULT_QUANT_MAP
        self.quant_map: list[Any] = []

    def prepare_state(
        self,
        float_module_list: Iterable[str] | None = None,
        custom_map: Iterable[Sequence[Any]] | None = None,
    ) -> None:
        """Decide what to rebind.

        Args:
            float_module_list: Names that stay float; one that is not in the map draws a warning.
            custom_map: Further entries `(module, name, quantized class)`; they take precedence over the list.

        Raises:
            TypeError: An entry that is not such a triple.
        """
        custom = [_checked_entry(entry) for entry in custom_map or ()]
        if isinstance(float_module_list, str):
            raise ArgumentTypeError(
                f"float_module_list is the string {float_module_list!r}.",
                f"give a list: [{float_module_list!r}].",
            )
        float_names = set(float_module_list or ())
        if unknown := float_names - {
            entry.mod_name for entry in [*self.default_quant_map, *custom]
        }:
            logger.warning(
                "%s: not in the map of quantized modules, so they stay float anyway; known are %s.",
                ", ".join(sorted(unknown)),
                ", ".join(entry.mod_name for entry in self.default_quant_map),
            )
        chosen = [
            entry for entry in self.default_quant_map if entry.mod_name not in float_names
        ] + custom
        # a later entry for the same name wins
        self.quant_map = list(
            {(id(entry.orig_mod), entry.mod_name): entry for entry in chosen}.values()
        )

    def apply_quant_modules(self) -> None:
        """Bind the quantized classes; the classes found first are remembered once (F1)."""
        remembered = {(id(entry.orig_mod), entry.mod_name) for entry in self.orginal_func_map}
        for entry in self.quant_map:
            if (id(entry.orig_mod), entry.mod_name) not in remembered:
                original = getattr(entry.orig_mod, entry.mod_name)
                self.orginal_func_map.append(_quant_entry(entry.orig_mod, entry.mod_name, original))
            setattr(entry.orig_mod, entry.mod_name, entry.replace_mod)

    def restore_float_modules(self) -> None:
        """Bind the former classes; do nothing if nothing was applied."""
        for entry in self.orginal_func_map:
            setattr(entry.orig_mod, entry.mod_name, entry.replace_mod)
        self.orginal_func_map.clear()


def _checked_entry(entry: Sequence[Any]) -> Any:
    if not isinstance(entry, tuple) or len(entry) != 3 or not hasattr(entry[0], str(entry[1])):
        raise ArgumentTypeError(
            f"{entry!r} is not an entry for the map of quantized modules.",
            "give tuples (module, name of a class in it, quantized class).",
        )
    return _quant_entry(*entry)


_quant_module_helper_object = QuantModuleReplacementHelper()


def initialize(
    float_module_list: Iterable[str] | None = None,
    custom_quant_modules: Iterable[Sequence[Any]] | None = None,
) -> None:
    """Make `torch.nn` build quantized modules from now on.

    Each call starts from the float state; one `deactivate()` undoes any number of calls. Classes bound earlier
    (`from torch.nn import Conv2d`) do not change. A class derived from `torch.nn.Conv2d` afterwards is quantized, and a
    warning names it if its forward bypasses the quantized weight.

    Args:
        float_module_list: Names such as "Linear" that stay float.
        custom_quant_modules: Further entries `(module, name, quantized class)`.

    Raises:
        TypeError: A custom entry that is not such a triple.
    """
    _quant_module_helper_object.restore_float_modules()
    _quant_module_helper_object.prepare_state(float_module_list, custom_quant_modules)
    _quant_module_helper_object.apply_quant_modules()


def deactivate() -> None:
    """Restore the float classes of `torch.nn`; existing modules do not change."""
    _quant_module_helper_object.restore_float_modules()
