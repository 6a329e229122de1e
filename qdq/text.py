"""Names in messages and tables: what of them a terminal may show, alike ones together, of many the first few."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

_Key = TypeVar("_Key")

MOST_CHARACTERS = 4000
"""So much of a message is shown; our own with the commands for a target need half of it."""

_MOST_IN_TABLE = 500


def group_names(found: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """The names of which the same is said, together; all in the order in which they come.

    Args:
        found: What is said, and of which name.
    """
    groups: defaultdict[_Key, list[str]] = defaultdict(list)
    for key, name in found:
        groups[key].append(name)
    return dict(groups)


def list_names(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b and 3 more`: so many names at the most, then how many others there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def printable(text: object, most: int = 200) -> str:
    """Foreign text as a part of one line, in which it can do nothing to a terminal and cannot pass for another line.

    Line ends, control characters, directions of writing and halves of surrogate pairs are escaped as in Python's
    strings.

    Args:
        text: A name, a path or a message from a file, or what another library says of it.
        most: Characters; the middle of a longer text is left out.
    """
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )
    if len(escaped) <= most:
        return escaped
    head = (most - 3) // 2
    return f"{escaped[:head]}...{escaped[len(escaped) - (most - 3 - head) :]}"


def make_printable(value: Any) -> Any:
    """A copy of a report for its table: as it is, but for every text and path in it, which is printable."""
    if isinstance(value, str):
        return printable(value, most=_MOST_IN_TABLE)
    if isinstance(value, Path):
        return Path(printable(value, most=_MOST_IN_TABLE))
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: make_printable(getattr(value, name)) for name in names})
    if isinstance(value, dict):
        return {make_printable(key): make_printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(make_printable(item) for item in value)
    return value


class PrintableFormatter(logging.Formatter):
    """A record of the log is one line, whatever names are in it; only a traceback below it has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        record.message = printable(record.message, most=MOST_CHARACTERS)
        return super().formatMessage(record)
