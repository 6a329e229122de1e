"""Names in messages and tables: alike ones together, and of many the first few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

_Key = TypeVar("_Key")


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
