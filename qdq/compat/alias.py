"""`pytorch_quantization` as a second name of `qdq.compat`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import qdq.compat

_ALIAS = "pytorch_quantization"
_NOT_ANSWERED = ("__main__", "alias")


def register_alias() -> None:
    """Make `import pytorch_quantization`, and every module below it, import `qdq.compat` in this process.

    The modules are registered under both names, so that a class is the same object under both. This takes precedence
    over an installed pytorch-quantization, unless that has been imported before.
    """
    package = qdq.compat.__name__
    sys.modules[_ALIAS] = qdq.compat
    for info in pkgutil.walk_packages(qdq.compat.__path__, package + "."):
        suffix = info.name.removeprefix(package)
        if suffix.removeprefix(".") not in _NOT_ANSWERED:
            sys.modules[_ALIAS + suffix] = importlib.import_module(info.name)
