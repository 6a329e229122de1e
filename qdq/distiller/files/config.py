"""The YAML files that configure quantizers: sections, names of classes, and arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qdq.distiller.files.file_kinds import SECTIONS, describe_kind
from qdq.distiller.files.quantizer_classes import (
    CLASSES,
    POST_TRAINING,
    build_quantizer,
    find_class,
    require_arguments,
)
from qdq.distiller.settings.values import describe_value
from qdq.errors import DataError
from qdq.files import as_path
from qdq.schema import read_yaml
from qdq.text import printable

_FIX = "see docs/distiller.md for the form of the file."


@dataclass(frozen=True)
class QuantizerConfig:
    """A quantizer in a configuration.

    Args:
        class_name: Name of its class.
        arguments: Its arguments, apart from the model and the optimizer.
        place: Where it stands, for messages.
    """

    class_name: str
    arguments: Mapping[str, Any]
    place: str

    def build(self, model: nn.Module, **objects: Any) -> Any:
        """Make the quantizer.

        Args:
            model: The model to quantize.
            objects: Other arguments that no file has, such as the optimizer.

        Raises:
            ArgumentError: An argument has an invalid value.
            ArgumentTypeError: An argument has a value of another type.
        """
        return build_quantizer(self.class_name, model, self.arguments, self.place, **objects)


def read_sections(path: Path | str) -> dict[str, Any]:
    """The sections of a configuration.

    Args:
        path: The YAML file.

    Returns:
        Section -> its content; sections that are left out or empty are empty.

    Raises:
        DataError: The file cannot be read, is of another kind, or has unknown sections.
    """
    path = as_path(path, "path")
    label = printable(path)
    content = read_yaml(path, _FIX, aliases=True)
    kind = describe_kind(content)
    if not isinstance(content, Mapping) or not any(section in content for section in SECTIONS):
        what = f"It is {kind}." if kind else f"It is {describe_value(content)}."
        raise DataError(f"{label} is no configuration of quantizers. {what}", _FIX)
    unknown = [name for name in content if name not in SECTIONS]
    if unknown:
        raise DataError(
            f"{label}: the section {describe_value(unknown[0])} is unknown; expected {', '.join(SECTIONS)}.",
            "remove it; qdq quantizes, and does not prune.",
        )
    return {section: content.get(section) or {} for section in SECTIONS}


def read_quantizers(sections: Mapping[str, Any], label: str) -> dict[str, QuantizerConfig]:
    """The quantizers of a configuration, by the names that they have there.

    Args:
        sections: From `read_sections`.
        label: Name of the file, for messages.

    Raises:
        ArgumentError: An unknown class.
        ArgumentTypeError: An unknown argument.
        DataError: The section has another form.
    """
    section = sections["quantizers"]
    if not isinstance(section, Mapping):
        raise DataError(f"{label}: quantizers is {describe_value(section)}; expected names.", _FIX)
    quantizers = {}
    for name, entry in section.items():
        quantizers[name] = _read_quantizer(entry, f"{label}: quantizers.{printable(name)}")
    return quantizers


def _read_quantizer(entry: Any, place: str) -> QuantizerConfig:
    if not isinstance(entry, Mapping) or "class" not in entry:
        raise DataError(
            f"{place} has no class; expected class and arguments.",
            f"write class: one of {', '.join(CLASSES)}.",
        )
    arguments = dict(entry)
    class_name = arguments.pop("class")
    require_arguments(find_class(class_name, place), arguments, place)
    overrides = arguments.get("overrides")
    if isinstance(overrides, Mapping):
        arguments["overrides"] = OrderedDict(overrides)
    return QuantizerConfig(class_name, arguments, place)


def read_post_training(path: Path | str) -> QuantizerConfig:
    """The quantizer in a configuration for quantization after training.

    Args:
        path: The YAML file.

    Raises:
        ArgumentError: An unknown class.
        ArgumentTypeError: An unknown argument.
        DataError: The file cannot be read, is of another kind, or has no such quantizer, or several.
    """
    label = printable(path)
    quantizers = read_quantizers(read_sections(path), label)
    configs = [config for config in quantizers.values() if config.class_name == POST_TRAINING]
    if len(configs) != 1:
        raise DataError(
            f"{label} has {len(configs)} quantizers of the class {POST_TRAINING}; expected one.",
            "write one, or give a file for training to --compress.",
        )
    return configs[0]
