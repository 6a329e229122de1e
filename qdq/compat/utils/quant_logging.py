"""Logging. qdq logs only through `logging.getLogger("qdq...")` and installs no handler when it is imported."""

from __future__ import annotations

import logging


def reset_logger_handler() -> None:
    """Remove all handlers of the root logger, so that a script can set up its own."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
