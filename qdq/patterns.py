"""Patterns that select modules or calls by class, by a test, or by dotted name.

A pattern is a class, a callable `(name, module) -> bool`, or a string: a glob ("layer1.*") or, after "re:", a regular
expression for the full dotted name. A name that matches includes everything below it.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from qdq.errors import ArgumentError, ArgumentTypeError

logger = logging.getLogger(__name__)

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]

_Test = Callable[[list[str], nn.Module], bool]
_REGEX_PREFIX = "re:"


class _CompiledPattern(NamedTuple):
    """The text of a pattern for messages, and its test."""

    description: str
    test: _Test


class Patterns:
    """Patterns that remember whether they matched anything.

    Args:
        patterns: One or more.
        option: Name of the option that they were passed as, for messages.

    Raises:
        ArgumentTypeError: A pattern of another kind.
        ArgumentError: A regular expression that cannot be compiled.
    """

    def __init__(self, patterns: Iterable[Pattern], option: str) -> None:
        if isinstance(patterns, str | type) or not isinstance(patterns, Iterable):
            patterns = (patterns,)
        self._option = option
        self._compiled = [
            _CompiledPattern(_describe(pattern), _compile(pattern)) for pattern in patterns
        ]
        self._used: set[str] = set()

    def match(self, names: list[str], module: nn.Module) -> str:
        """The first pattern that matches, described, or "".

        Args:
            names: Dotted names of a module, or of a call that it makes.
            module: The module.
        """
        first_match = ""
        for description, test in self._compiled:
            if test(names, module):
                self._used.add(description)
                if not first_match:
                    first_match = description
        return first_match

    def warn_unused(self, kind: str) -> None:
        """Log a warning for each pattern that matched nothing, as it may be misspelt.

        Args:
            kind: The things that were matched, for the message: "module".
        """
        for description, _ in self._compiled:
            if description not in self._used:
                logger.warning("%s pattern %s matches no %s", self._option, description, kind)


def _describe(pattern: Pattern) -> str:
    """A pattern as messages show it: its text, or the name of the class or function."""
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__name__", repr(pattern))


def _compile(pattern: Pattern) -> _Test:
    """The test for a pattern of any kind.

    Raises:
        ArgumentTypeError: A pattern of another kind.
        ArgumentError: A regular expression that cannot be compiled.
    """
    if isinstance(pattern, str):
        return _test_of_name(pattern)
    if isinstance(pattern, type):
        return lambda _, module: isinstance(module, pattern)
    if callable(pattern):
        return lambda names, module: any(pattern(name, module) for name in names)
    raise ArgumentTypeError(
        f"pattern {pattern!r} is of type {type(pattern).__name__}.",
        "give a dotted name, a glob, 're:...', a module class or a callable (name, module) -> bool.",
    )


def _test_of_name(pattern: str) -> _Test:
    """Whether a glob or regular expression matches one of several names, or a module around it."""
    matches = _compile_name(pattern)

    def test(names: list[str], module: nn.Module) -> bool:
        prefixes: list[str] = []
        for name in names:
            prefixes += _list_prefixes(name)
        return any(map(matches, prefixes))

    return test


def _compile_name(pattern: str) -> Callable[[str], bool]:
    """A test of one dotted name.

    Raises:
        ArgumentError: A regular expression that cannot be compiled.
    """
    if not pattern.startswith(_REGEX_PREFIX):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern.removeprefix(_REGEX_PREFIX))
    except re.error as error:
        raise ArgumentError(
            f"pattern {pattern!r} is not a regular expression: {error}.",
            "correct it, or leave out 're:' for a glob.",
        ) from error
    return lambda name: expression.fullmatch(name) is not None


def _list_prefixes(name: str) -> list[str]:
    """The names of the modules around a name, the outermost first, and the name itself."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
