"""Plain values as YAML, in the order in which they come."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import yaml

try:  # libyaml is ten times as fast, and PyYAML may be built without it
    from yaml import CSafeDumper as _SafeDumper
except ImportError:
    from yaml import SafeDumper as _SafeDumper  # type: ignore[assignment]


class _PlainDumper(_SafeDumper):
    """Writes a value that occurs twice in full both times: the readers of qdq refuse aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value is written in full."""
        return True


_PlainDumper.add_representer(OrderedDict, _PlainDumper.represent_dict)  # overrides are one


def write_yaml(content: Any, *, flow: bool = False) -> str:
    """The text of a YAML file.

    Args:
        content: Mappings, lists, text and numbers.
        flow: Write the innermost mappings and lists on one line.
    """
    text: str = yaml.dump(
        content,
        Dumper=_PlainDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None if flow else False,
    )
    return text
