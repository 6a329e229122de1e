"""Options by the names that the command line has for them, and which of them are set."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

logger = logging.getLogger(__name__)


def flag_of(field: str) -> str:
    """The option of a field, such as --qe-mode of qe_mode.

    Args:
        field: Name of the field.
    """
    return "--" + field.replace("_", "-")


def list_flags(names: Iterable[str]) -> str:
    """The options of fields, separated by commas.

    Args:
        names: Names of the fields.
    """
    return ", ".join(map(flag_of, names))


def list_changed(group: Any) -> list[str]:
    """The fields of a group of options that are not as by default.

    Args:
        group: The group.
    """
    changed = []
    for option in fields(group):
        if getattr(group, option.name) != option.default:
            changed.append(option.name)
    return changed


def log_ignored(names: Iterable[str], reason: str) -> None:
    """Log options without an effect.

    Args:
        names: Names of their fields.
        reason: Why they have none.
    """
    ignored = list(names)
    if ignored:
        logger.warning("ignored, because %s: %s", reason, list_flags(ignored))
