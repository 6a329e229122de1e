"""`qdq VERB ...`, and `run_command` for recipes: arguments in, exit code out, errors in one line.

Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment, 130 interrupted.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

import cyclopts

import qdq
from qdq.errors import QdqError

_HELP = "From a trained PyTorch model to a verified TensorRT int8 engine."
_VERBOSE = ("-v", "--verbose")
_QUIET = ("-q", "--quiet")
_EPILOGUE = (
    "Everywhere: -v shows more, and the traceback of an error; -q shows errors only. "
    "Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment."
)


def make_app() -> cyclopts.App:
    """All subcommands; the module of each is loaded when it is called or asked for help."""
    app = cyclopts.App(name="qdq", help=_HELP, help_epilogue=_EPILOGUE, version=qdq.__version__)
    app.command(
        "qdq.cli.ptq:ptq",
        name="ptq",
        help="The whole way: fold, swap, calibrate, analyze, export, check, build, report.",
    )
    app.command("qdq.cli.check:check", name="check", help="Is a QDQ ONNX file valid, and as TensorRT wants it?")
    app.command("qdq.cli.build:build", name="build", help="Build a TensorRT engine and count what runs in int8.")
    app.command(
        "qdq.cli.eval:evaluate_files",
        name="eval",
        help="Accuracy of a model and of ONNX files on the same images.",
    )
    app.command("qdq.cli.env:env", name="env", help="Versions and what can be built here.")
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `qdq`."""
    _run(make_app(), list(sys.argv[1:] if argv is None else argv))


def run_command(command: Callable[..., int]) -> None:
    """Run a recipe from the command line: its signature is the options, its docstring the help.

    Args:
        command: Returns the exit code.
    """
    app = cyclopts.App(help_epilogue=_EPILOGUE, version=qdq.__version__)
    app.default(command)
    _run(app, sys.argv[1:])


def _run(app: cyclopts.App, argv: list[str]) -> None:
    _keep_freed_memory()
    verbose, quiet = _take(argv, _VERBOSE), _take(argv, _QUIET)
    _log_to_console(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    try:
        code = app(argv, result_action="return_value")
    except QdqError as error:
        if verbose:
            traceback.print_exc()
        print(f"error: {error.message}\n  fix: {error.fix}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted: every file written so far is complete; run the same command again",
            file=sys.stderr,
        )
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _keep_freed_memory() -> None:
    """Have glibc keep large freed blocks.

    By default it gives every activation back to the system, and the next one is paid for in page faults: a forward of
    EfficientNet-Lite0 on the CPU takes 1.5 to 2 times as long.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def _take(argv: list[str], flags: tuple[str, ...]) -> bool:
    found = [argument for argument in argv if argument in flags]
    argv[:] = [argument for argument in argv if argument not in flags]
    return bool(found)


def _log_to_console(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("qdq").addHandler(handler)
