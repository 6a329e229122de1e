"""Importing a recipe: it is in `qdq/_recipes` in a wheel, and in `recipes` in a checkout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from qdq.errors import DependencyError

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")


def load_recipe(name: str) -> ModuleType:
    """Import a recipe script by its name.

    Raises:
        DependencyError: The installation does not contain it.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.py"
        if path.is_file():
            return _import_file(path)
    raise DependencyError(
        f"recipe {name} is not installed.", "reinstall qdq from a wheel or a checkout."
    )


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"qdq_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
