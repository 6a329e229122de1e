"""`qdq VERB ...`, and `run_command` for recipes: arguments in, exit code out, errors in one line.

Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment (or a bug in qdq), 130 interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

import cyclopts

# For the signatures of recipes: Parameter turns the fields of a dataclass into separate flags; the number types
# refuse an invalid number before any work begins.
from cyclopts import Parameter as Parameter
from cyclopts.types import NonNegativeInt as NonNegativeInt
from cyclopts.types import PositiveInt as PositiveInt
from cyclopts.types import UInt32 as UInt32

import qdq
from qdq.cli.console import (
    comes_from_interrupt,
    discard_output,
    print_error,
    report_interrupt,
)
from qdq.errors import DataError, QdqError
from qdq.text import MOST_CHARACTERS, PrintableFormatter, printable

_HELP = """From a trained PyTorch model to a verified TensorRT int8 engine.

For example:

    qdq ptq --model resnet50 --data /data/imagenet --output runs/resnet50
    qdq check runs/resnet50/model.onnx
    qdq build runs/resnet50/model.onnx --sm 86
    qdq eval runs/resnet50/model.onnx --model resnet50 --data /data/imagenet
"""
_EPILOGUE = (
    "Every command: -v shows the log, and the traceback of an error; -q hides warnings. "
    "Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment, 130 interrupted."
)
_VERBOSE = ("-v", "--verbose")
_QUIET = ("-q", "--quiet")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_LARGEST_NUMBER = 2**32 - 1  # a seed; nobody has that many images

_STOPPED_READING = 128 + signal.SIGPIPE
_LOST_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def make_app() -> cyclopts.App:
    """The app with all subcommands; each of them imports its stage when it is called."""
    from qdq.cli import calibrate
    from qdq.cli.bisect import bisect
    from qdq.cli.build import build
    from qdq.cli.bundle import bundle
    from qdq.cli.check import check
    from qdq.cli.diverge import diverge
    from qdq.cli.env import env
    from qdq.cli.eval import evaluate_files
    from qdq.cli.explain import explain
    from qdq.cli.gate import gate
    from qdq.cli.plan import plan
    from qdq.cli.ptq import ptq  # the recipe, which imports this module
    from qdq.cli.qat import qat
    from qdq.cli.report import report

    app = _new_app("qdq", help=_HELP)
    statistics = _new_app(
        "calibrate",
        help="Show or merge saved calibration statistics, or compute ranges from them. Needs no torch.",
    )
    for command in (calibrate.show, calibrate.merge, calibrate.solve):
        statistics.command(command)
    verbs = {
        "ptq": ptq,
        "qat": qat,
        "calibrate": statistics,
        "check": check,
        "build": build,
        "bundle": bundle,
        "eval": evaluate_files,
        "diverge": diverge,
        "bisect": bisect,
        "report": report,
        "explain": explain,
        "gate": gate,
        "plan": plan,
        "env": env,
    }
    for position, (name, command) in enumerate(verbs.items()):
        if isinstance(command, cyclopts.App):
            command.sort_key = position
            app.command(command)
        else:
            app.command(command, name=name, sort_key=position)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qdq` and end the process with its exit code.

    Args:
        argv: Arguments; those of this process by default.
    """
    _run(make_app(), list(sys.argv[1:] if argv is None else argv))


def run_command(command: Callable[..., int]) -> None:
    """Run a recipe from the command line: its signature gives the options, its docstring the help.

    Args:
        command: Recipe that returns the exit code.
    """
    app = _new_app(Path(sys.argv[0]).name)
    app.default(command)
    _run(app, sys.argv[1:])


def _new_app(name: str, help: str | None = None) -> cyclopts.App:
    return cyclopts.App(
        name=name,
        help=help,
        help_epilogue=_EPILOGUE,
        version=qdq.__version__,
        default_parameter=cyclopts.Parameter(
            negative=(), consume_multiple=True, show_default=_show_default, converter=_convert
        ),
        suppress_keyboard_interrupt=False,  # it is reported in `_run`
    )


def _show_default(value: object) -> str | None:
    if value in (None, ()):
        return None  # the text of the help says what happens without a value
    return str(value)


def _convert(type_: Any, tokens: Any) -> Any:
    """Convert arguments as cyclopts does, but more strictly.

    cyclopts would round 1.5 to a whole number, and accept numbers of any length. Python would accept `model.onnx/` as
    the file `model.onnx`.
    """
    if int in (type_, *get_args(type_)):
        for token in tokens:
            _require_whole_number(token)
    if Path in (type_, *get_args(type_)):
        for token in tokens:
            _require_folder_before_slash(token)
    return cyclopts.convert(type_, tokens)


def _require_whole_number(token: Any) -> None:
    if not _WHOLE_NUMBER.fullmatch(token.value):
        raise cyclopts.CoercionError(token=token, target_type=int)
    if abs(int(token.value)) > _LARGEST_NUMBER:
        raise ValueError(f"{token.value} is more than {_LARGEST_NUMBER}.")


def _require_folder_before_slash(token: Any) -> None:
    name = token.value.rstrip("/")
    if name != token.value and os.path.lexists(name) and not os.path.isdir(name):
        raise ValueError(f"{printable(name)} is not a folder, but its name ends with a slash.")


def _run(app: cyclopts.App, argv: list[str]) -> None:
    """Run the command that the arguments name, and end the process with its exit code."""
    _keep_freed_memory()
    _prepare_streams()
    verbose = _take_flag(argv, _VERBOSE)
    quiet = _take_flag(argv, _QUIET)
    logger = logging.getLogger("qdq")
    former_level = logger.level
    handler = _log_to_console(logger, _choose_level(verbose, quiet))
    try:
        _require_working_directory()
        code = app(argv, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()  # here, where its errors are caught
    except KeyboardInterrupt:
        code = report_interrupt()
    except SystemExit as error:
        # rich prints the help, and ends the process if nobody reads it.
        is_pipe_closed = isinstance(error.__context__, BrokenPipeError)
        code = _STOPPED_READING if is_pipe_closed else error.code
    except Exception as error:  # Python's exit code 1 would say "findings"
        code = _report_error(error, app.name[0], verbose)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former_level)
    sys.exit(code if isinstance(code, int) else 0)


def _take_flag(argv: list[str], names: tuple[str, ...]) -> bool:
    """Remove a flag from the arguments, and say whether it was there."""
    remaining = [argument for argument in argv if argument not in names]
    is_set = len(remaining) < len(argv)
    argv[:] = remaining
    return is_set


def _choose_level(verbose: bool, quiet: bool) -> int:
    if verbose:
        return logging.INFO
    return logging.ERROR if quiet else logging.WARNING


def _log_to_console(logger: logging.Logger, level: int) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)  # a run folder logs more, and lowers it
    return handler


def _require_working_directory() -> None:
    """Refuse to run in a deleted folder, where native libraries end the process without a message."""
    try:
        os.getcwd()
    except OSError as error:
        raise DataError(
            f"the working directory cannot be used: {error.strerror}; it may have been deleted.",
            "change to a folder that exists, and run the command again.",
        ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks.

    By default it returns the memory of every activation to the system, and the next activation costs page faults: a
    forward of EfficientNet-Lite0 on the CPU takes 1.5 to 2 times as long.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def _prepare_streams() -> None:
    """Make sure that the output streams exist and can print every text, even if the shell has closed them."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed by `>&-`. The next file to be opened would get this number, and so the output of libraries.
            discard_output(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _report_error(error: Exception, program: str, verbose: bool) -> int:
    """Print what is wrong and what to do, and return the exit code."""
    if comes_from_interrupt(error):
        return report_interrupt()
    if isinstance(error, cyclopts.CycloptsError):
        message = str(error)
        command = " ".join([program, *(error.command_chain or ())])
        return _print_failure(message[:1].lower() + message[1:], f"see {command} --help")
    if _is_lost_output(error):
        return _report_lost_output(error)
    if verbose or not _is_expected(error):
        print_error("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, QdqError):
        return _print_failure(error.message, error.fix)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"cannot use {printable(error.filename)}: {error.strerror}."
        return _print_failure(message, "choose another file.")
    return _print_failure(
        f"{type(error).__name__}: {error}",
        "this is a bug in qdq; please report it with the lines above.",
    )


def _is_lost_output(error: Exception) -> TypeGuard[OSError]:
    """Whether an open file takes no more data."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _LOST_OUTPUT


def _is_expected(error: Exception) -> bool:
    """Whether the message alone says enough: an error of qdq, or a file that the system refuses."""
    if isinstance(error, QdqError):
        return True
    return isinstance(error, OSError) and error.filename is not None


def _report_lost_output(error: OSError) -> int:
    """Report that an open file, usually the standard output, takes no more data."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output(sys.stdout.fileno())  # Python flushes once more at its end
    if error.errno == errno.EPIPE:  # as in `qdq explain ... | head`: the reader has enough
        return _STOPPED_READING
    return _print_failure(
        f"cannot write or print the result: {error.strerror}.",
        "free some space, or write the result elsewhere.",
    )


def _print_failure(message: str, fix: str) -> int:
    """Print what is wrong and what to do, one line each, and return the exit code."""
    error_line = printable(" ".join(message.split()), most=MOST_CHARACTERS)
    fix_line = printable(" ".join(fix.split()), most=MOST_CHARACTERS)
    print_error(f"error: {error_line}\n  fix: {fix_line}")
    return 2
