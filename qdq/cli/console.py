"""Messages on the standard error, and Ctrl-C. Imports almost nothing, so that it works right from the start."""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130  # 128 and the number of SIGINT, as of a shell


def report_interrupt() -> int:
    """Print that the command was interrupted, and return the exit code."""
    print_error("\ninterrupted: every file written so far is complete; run the same command again")
    return _INTERRUPTED


def comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: it becomes an ImportError while native code is loaded."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def print_error(text: str) -> None:
    """Print to the standard error, or nowhere if that is closed."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr.fileno())


def discard_output(descriptor: int) -> None:
    """Redirect an open file to the null device.

    Args:
        descriptor: Number of the open file.
    """
    null_device = os.open(os.devnull, os.O_WRONLY)
    if null_device != descriptor:
        os.dup2(null_device, descriptor)
        os.close(null_device)
