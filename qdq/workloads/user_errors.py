"""An error in code of the user, in one line."""

from __future__ import annotations

import traceback
from pathlib import Path

from qdq.text import printable
from qdq.weights import first_line

_PACKAGE = str(Path(__file__).parents[1])


def describe_user_error(error: BaseException) -> str:
    """An error with the last line of the user's own files that was reached.

    Args:
        error: What the code of the user raised.
    """
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        is_foreign = "site-packages" in frame.filename or frame.filename.startswith("<")
        if not is_foreign and not frame.filename.startswith(_PACKAGE):
            place = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return printable(f"{type(error).__name__}: {first_line(error)}{place}")
