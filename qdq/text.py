"""Names and external text in messages and tables: grouped, shortened, and safe to print on a terminal."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

_Key = TypeVar("_Key")

MOST_CHARACTERS = 4000
"""Longest message that is shown in full; the messages of qdq with the commands for a target need half of it."""

_MOST_IN_TABLE = 500


def group_names(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """Group names by key; keys and names stay in the order in which they come.

    Args:
        pairs: A key and a name.
    """
    groups: defaultdict[_Key, list[str]] = defaultdict(list)
    for key, name in pairs:
        groups[key].append(name)
    return dict(groups)


def list_names(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first names: `a, b and 3 more`.

    Args:
        names: All names.
        most: Number of names that are listed; the others are only counted.
        separator: Text between two names.
    """
    text = separator.join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def printable(text: object, most: int = 200) -> str:
    """Escape external text, so that it stays on one line and cannot control a terminal.

    Line ends, control characters, marks of text direction and halves of surrogate pairs are escaped as in Python's
    strings.

    Args:
        text: A name, a path or a message from a file or from another library.
        most: Largest number of characters; the middle of a longer text is left out.
    """
    escaped = "".join(_escape(char) for char in str(text))
    if len(escaped) <= most:
        return escaped
    head = (most - 3) // 2
    tail = most - 3 - head
    return f"{escaped[:head]}...{escaped[len(escaped) - tail :]}"


def _escape(char: str) -> str:
    if char.isprintable():
        return char
    return char.encode("unicode_escape").decode()


def make_printable(value: Any) -> Any:
    """Copy a report for its table, with every text and path in it escaped by `printable`."""
    if isinstance(value, str):
        return printable(value, most=_MOST_IN_TABLE)
    if isinstance(value, Path):
        return Path(printable(value, most=_MOST_IN_TABLE))
    if is_dataclass(value) and not isinstance(value, type):
        changes = {}
        for field in fields(value):
            if field.init:
                changes[field.name] = make_printable(getattr(value, field.name))
        return replace(value, **changes)
    if isinstance(value, dict):
        return {make_printable(key): make_printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(make_printable(item) for item in value)
    return value


class PrintableFormatter(logging.Formatter):
    """Formats each record of the log as one line, whatever names it contains; a traceback follows on more lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Format the message of a record as one line that a terminal can show."""
        record.message = printable(record.message, most=MOST_CHARACTERS)
        return super().formatMessage(record)
