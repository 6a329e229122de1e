"""Which modules or calls a user means: by class, by a test, by dotted name.

A pattern is a class, a callable `(name, module) -> bool`, or a string: a glob ("layer1.*") or, after "re:", a regular
expression for the whole dotted name. A name that matches stands for everything below it too.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable

from torch import nn

from qdq.errors import ArgumentError, ArgumentTypeError

logger = logging.getLogger(__name__)

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class Patterns:
    """Patterns that remember whether they matched anything.

    Args:
        patterns: One or several.
        option: What they are given as, for messages.

    Raises:
        ArgumentTypeError: A pattern of another kind.
        ArgumentError: A regular expression that cannot be compiled.
    """

    def __init__(self, patterns: Iterable[Pattern], option: str) -> None:
        if isinstance(patterns, str | type) or not isinstance(patterns, Iterable):
            patterns = (patterns,)
        self._option = option
        self._tests: list[tuple[str, Callable[[list[str], nn.Module], bool]]] = [
            (_describe(pattern), _compile(pattern)) for pattern in patterns
        ]
        self._used: set[str] = set()

    def match(self, names: list[str], module: nn.Module) -> str:
        """The first pattern that matches, described, or "".

        Args:
            names: Dotted names of a module, or of a call that it makes.
            module: That module.
        """
        hits = [description for description, test in self._tests if test(names, module)]
        self._used.update(hits)
        return hits[0] if hits else ""

    def warn_unused(self, kind: str) -> None:
        """Name the patterns that matched nothing of a kind, for they may be misspelt."""
        for description, _ in self._tests:
            if description not in self._used:
                logger.warning("%s pattern %s matches no %s", self._option, description, kind)


def _describe(pattern: Pattern) -> str:
    return (
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    )


def _compile(pattern: Pattern) -> Callable[[list[str], nn.Module], bool]:
    if isinstance(pattern, str):
        matches = _compile_name(pattern)
        return lambda names, _: any(
            matches(part) for name in names for part in _self_and_parents(name)
        )
    if isinstance(pattern, type):
        return lambda _, module: isinstance(module, pattern)
    if callable(pattern):
        return lambda names, module: any(pattern(name, module) for name in names)
    raise ArgumentTypeError(
        f"pattern {pattern!r} is of type {type(pattern).__name__}.",
        "give a dotted name, a glob, 're:...', a module class or a callable (name, module) -> bool.",
    )


def _compile_name(pattern: str) -> Callable[[str], bool]:
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise ArgumentError(
            f"pattern {pattern!r} is no regular expression: {error}.",
            "correct it, or leave out 're:' for a glob.",
        ) from error
    return lambda name: expression.fullmatch(name) is not None


def _self_and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
