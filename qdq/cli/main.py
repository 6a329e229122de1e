"""`qdq VERB ...`, and `run_command` for recipes: arguments in, exit code out, errors in one line.

Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment (or a fault of qdq), 130 interrupted.
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
from typing import Any, get_args

import cyclopts

# For the signatures of recipes: the fields of a dataclass as flags of their own; and numbers, of which one that cannot
# be meant is refused before any work begins.
from cyclopts import Parameter as Parameter
from cyclopts.types import NonNegativeInt as NonNegativeInt
from cyclopts.types import PositiveInt as PositiveInt
from cyclopts.types import UInt32 as UInt32

import qdq
from qdq.errors import QdqError
from qdq.text import MOST_CHARACTERS, PrintableFormatter, printable

_HELP = """From a trained PyTorch model to a verified TensorRT int8 engine.

Such as:

    qdq ptq --model resnet50 --data-dir /data/imagenet --output runs/resnet50
    qdq check runs/resnet50/model.onnx
    qdq build runs/resnet50/model.onnx --sm 86
    qdq eval runs/resnet50/model.onnx --model resnet50 --data-dir /data/imagenet
"""
_VERBOSE = ("-v", "--verbose")
_QUIET = ("-q", "--quiet")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_LARGEST_NUMBER = 2**32 - 1  # a seed; nobody has as many images
_EPILOGUE = (
    "Everywhere: -v shows the log, and the traceback of an error; -q hides warnings. "
    "Exit codes: 0 clean, 1 findings, 2 wrong usage, data or environment, 130 interrupted."
)


def make_app() -> cyclopts.App:
    """All subcommands; what they need is imported when they are called."""
    from qdq.cli import calibrate
    from qdq.cli.build import build
    from qdq.cli.check import check
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
        "calibrate", help="Show, merge or solve again what calibration saved. Needs no torch."
    )
    for command in (calibrate.show, calibrate.merge, calibrate.solve):
        statistics.command(command)
    verbs = {
        "ptq": ptq,
        "qat": qat,
        "calibrate": statistics,
        "check": check,
        "build": build,
        "eval": evaluate_files,
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
    """Entry point of `qdq`."""
    _run(make_app(), list(sys.argv[1:] if argv is None else argv))


def run_command(command: Callable[..., int]) -> None:
    """Run a recipe from the command line: its signature is the options, its docstring the help.

    Args:
        command: Returns the exit code.
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
    return None if value in (None, ()) else str(value)  # the help says what leaving it out means


def _convert(type_: Any, tokens: Any) -> Any:
    """As cyclopts, but a whole number is one: cyclopts rounds 1.5, and takes numbers of any length.

    Nor is `model.onnx/` the file `model.onnx`, which is what Python makes of it.
    """
    if int in (type_, *get_args(type_)):
        for token in tokens:
            if not _WHOLE_NUMBER.fullmatch(token.value):
                raise cyclopts.CoercionError(token=token, target_type=int)
            if abs(int(token.value)) > _LARGEST_NUMBER:
                raise ValueError(f"{token.value} is more than {_LARGEST_NUMBER}.")
    if Path in (type_, *get_args(type_)):
        for token in tokens:
            name = token.value.rstrip("/")
            if name != token.value and os.path.lexists(name) and not os.path.isdir(name):
                raise ValueError(f"{printable(name)} is no folder, as the slash behind it says.")
    return cyclopts.convert(type_, tokens)


def _run(app: cyclopts.App, argv: list[str]) -> None:
    _keep_freed_memory()
    _prepare_streams()
    verbose, quiet = _take(argv, _VERBOSE), _take(argv, _QUIET)
    handler = _log_to_console(
        logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    )
    try:
        code = app(argv, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()  # here, where an error of it is seen
    except KeyboardInterrupt:
        code = _report_interrupt()
    except (
        SystemExit
    ) as error:  # rich, which prints the help, ends the process where nobody reads on
        code = _STOPPED_READING if isinstance(error.__context__, BrokenPipeError) else error.code
    except Exception as error:  # Python's exit code 1 would say "findings"
        code = (
            _report_interrupt()
            if _comes_from_interrupt(error)
            else _report_error(error, app.name[0], verbose)
        )
    finally:
        logging.getLogger("qdq").removeHandler(handler)
    sys.exit(code if isinstance(code, int) else 0)


_STOPPED_READING = 128 + signal.SIGPIPE
_LOST_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _prepare_streams() -> None:
    """Have a place for all that is printed, whatever the shell has left of it, and print every text somehow."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except (
            OSError
        ):  # `>&-`: the next file that is opened would get this number, and what libraries print
            _discard(number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard(number: int) -> None:
    """Send what is printed to an open file nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _report_error(error: Exception, program: str, verbose: bool) -> int:
    if isinstance(error, cyclopts.CycloptsError):
        message = str(error)
        command = " ".join([program, *(error.command_chain or ())])
        return _fail(message[:1].lower() + message[1:], f"see {command} --help")
    if isinstance(error, OSError) and error.filename is None and error.errno in _LOST_OUTPUT:
        return _report_lost_output(error)
    if verbose or not _is_foreseen(error):
        _print_error("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, QdqError):
        return _fail(error.message, error.fix)
    if isinstance(error, OSError) and error.filename is not None:
        return _fail(
            f"cannot use {printable(error.filename)}: {error.strerror}.", "choose another file."
        )
    fix = "this is a fault of qdq; please report it with the lines above."
    return _fail(f"{type(error).__name__}: {error}", fix)


def _is_foreseen(error: Exception) -> bool:
    """Whether the message alone says enough: ours, or that the system refuses a file."""
    return isinstance(error, QdqError) or (
        isinstance(error, OSError) and error.filename is not None
    )


def _report_lost_output(error: OSError) -> int:
    """A file that is open takes nothing any more: the standard output, most of all."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout.fileno())  # Python flushes once more at its end
    if error.errno == errno.EPIPE:  # as in `qdq explain ... | head`: who reads has enough
        return _STOPPED_READING
    return _fail(
        f"cannot write or print the result: {error.strerror}.", "make room, or send it elsewhere."
    )


def _report_interrupt() -> int:
    _print_error("\ninterrupted: every file written so far is complete; run the same command again")
    return 130


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: native code that is being loaded makes an ImportError of it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, fix: str) -> int:
    """Print what is wrong and what to do, each on one line."""
    texts = [printable(" ".join(text.split()), most=MOST_CHARACTERS) for text in (message, fix)]
    _print_error(f"error: {texts[0]}\n  fix: {texts[1]}")
    return 2


def _print_error(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # there is no place left to say it
        _discard(sys.stderr.fileno())


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
    matches = [argument for argument in argv if argument in flags]
    argv[:] = [argument for argument in argv if argument not in flags]
    return bool(matches)


def _log_to_console(level: int) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("qdq")
    logger.addHandler(handler)
    logger.setLevel(level)  # a run folder, which logs more, lowers it
    return handler
