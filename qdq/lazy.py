"""Names of a package whose modules are loaded on first use, so that importing the package is light."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def list_homes(homes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Name -> module, of a table of modules.

    Args:
        homes: Module, as seen from the package -> its public names.
    """
    return {name: module for module, names in homes.items() for name in names}


def load_name(package: str, home_of: Mapping[str, str], name: str) -> Any:
    """The object with a public name; the package has it from then on.

    Args:
        package: The package.
        home_of: As `list_homes` gives it.
        name: The name.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in home_of:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
    setattr(sys.modules[package], name, value)
    return value
