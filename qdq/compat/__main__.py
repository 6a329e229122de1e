"""`python -m qdq.compat SCRIPT [ARGS]` runs an unchanged script for pytorch-quantization on qdq.

Arguments, `sys.path`, `__main__`, exit codes and tracebacks are the same as for `python SCRIPT` and `python -m MODULE`.

The names exist in this process and in those that it forks. A process that multiprocessing starts by the method "spawn"
or "forkserver" imports the script again, as ordinary Python, without them: it finds an installed pytorch-quantization,
or none. If the script needs the names there, let it call `qdq.compat.alias.register_alias()` first.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

from qdq.compat.alias import register_alias
from qdq.errors import ArgumentError

_HELP = """usage: python -m qdq.compat SCRIPT [ARGS]
       python -m qdq.compat -m MODULE [ARGS]

Run a script written for pytorch-quantization without changing it: wherever it imports
pytorch_quantization, it gets qdq.compat. The arguments after SCRIPT or MODULE are for the script.

For example:
    python -m qdq.compat ptq.py --data-dir /data/imagenet
    python -m qdq.compat -m tools.calibrate --batches 4

Exit codes: those of the script; 2 if there is nothing to run."""
_OWN_FRAMES = (__file__, importlib.util.__file__, "<frozen importlib")
_SEE_HELP = "see python -m qdq.compat --help"


def main() -> None:
    """Entry point of `python -m qdq.compat`."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_HELP)
        return
    try:
        _run(arguments)
    except _UsageError as error:
        print(f"error: {error.message}\n  fix: {error.fix}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        _report_and_exit(error)


class _UsageError(ArgumentError):
    """There is nothing to run; errors of the script itself are never of this class."""


def _run(arguments: list[str]) -> None:
    if not arguments:
        raise _UsageError(
            "no script was given.", f"name a Python file, or -m and a module; {_SEE_HELP}"
        )
    target, *rest = arguments
    if target == "-m":
        if not rest:
            raise _UsageError(
                "-m needs the name of a module.", f"name it as in python -m; {_SEE_HELP}"
            )
        _run_module(rest[0], rest[1:])
    elif target.startswith("-"):
        raise _UsageError(
            f"unknown option {target}.", f"options of the script come after its name; {_SEE_HELP}"
        )
    else:
        _run_script(target, rest)


def _run_script(script: str, arguments: list[str]) -> None:
    path = os.path.abspath(script)
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise _UsageError(
            f"cannot read the script {script!r}: {error.strerror}.",
            "give the path of a Python file",
        ) from error
    register_alias()
    sys.argv[:] = [script, *arguments]
    # An isolated or safe Python has put no folder there.
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    code = compile(source, path, "exec", dont_inherit=True)
    _execute(
        code,
        __file__=path,
        __loader__=SourceFileLoader("__main__", path),
        __package__=None,
        __spec__=None,
    )


def _run_module(name: str, arguments: list[str]) -> None:
    register_alias()
    sys.argv[:] = ["-m", *arguments]
    spec = _find_spec(name)
    if spec.submodule_search_locations is not None:
        spec = _find_spec(f"{name}.__main__")
    code = (
        spec.loader.get_code(spec.name)
        if spec.loader and hasattr(spec.loader, "get_code")
        else None
    )
    if code is None:
        raise _UsageError(
            f"module {name!r} is not written in Python.", f"name another; {_SEE_HELP}"
        )
    sys.argv[0] = spec.origin or name
    _execute(
        code, __file__=spec.origin, __loader__=spec.loader, __package__=spec.parent, __spec__=spec
    )


def _find_spec(name: str) -> ModuleSpec:
    try:
        spec = None if name.startswith(".") else importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package on the path to the module imports something missing
        spec = None
    except ValueError:  # a module in memory only
        spec = None
    if spec is None:
        fix = (
            f"check the name, and that its folder is the current one or on PYTHONPATH; {_SEE_HELP}"
        )
        raise _UsageError(f"no module named {name!r}.", fix)
    return spec


def _execute(code: CodeType, **attributes: object) -> None:
    module = ModuleType("__main__")
    vars(module).update(__builtins__=builtins, __cached__=None, **attributes)
    sys.modules["__main__"] = module
    exec(code, vars(module))  # noqa: S102 the user's own script, as python would run it


def _report_and_exit(error: Exception) -> NoReturn:
    """Do what Python does with an uncaught exception, without the frames before the script's first."""
    trace: TracebackType | None = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename.startswith(_OWN_FRAMES):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    sys.exit(1)


if __name__ == "__main__":
    main()
