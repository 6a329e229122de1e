"""A run folder: what is in it and may be removed from it, seed, log file, environment."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import platform
import random
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qdq.errors import ArgumentError
from qdq.files import (
    PARTIAL_GLOB,
    File,
    as_path,
    guard_files,
    is_replaceable,
    is_same_file,
    read_file,
    to_jsonable,
    write_json,
)
from qdq.text import PrintableFormatter, printable

logger = logging.getLogger(__name__)

RUN_FORMAT = "qdq run 1"
"""Stands in `run.json` and proves that a folder is a run's."""

_LOOKER_SECONDS = 10.0  # nobody looks that long whether a folder is in use

STATE_FILE = "run.json"
LOG_FILE = "run.log"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
JOURNAL_FILE = "analysis.jsonl"
STATISTICS_FILES = ("calibration.safetensors", "calibration.json")
TUNING_FOLDER = "tuning"

_JOURNALS = (
    JOURNAL_FILE,
    "analysis.*.jsonl",
)  # kept from any earlier run: their lines say what they were measured on
_STATISTICS = (
    *STATISTICS_FILES,
    "calibration.rank*of*.safetensors",
)  # kept where the same run is begun again
_RUN_FILES = (
    STATE_FILE,
    LOG_FILE,
    *_JOURNALS,
    *_STATISTICS,
    "calibration*.damaged.safetensors",
    "plan.yaml",
    "model.onnx",
    "model.onnx.data",
    "model.engine",
    "model.rtx.engine",
    REPORT_FILE,
    PAGE_FILE,
    "report.txt",
    PARTIAL_GLOB,  # of a process that was killed
    ".model.onnx.data.partial",
)
"""Globs of what a run writes into its folder; nothing else in it is ever removed."""

_TUNING_FILES = (
    "state.safetensors",
    "best.safetensors",
    "last.safetensors",
    "tuning.json",
    "tensorboard/events.out.tfevents.*",
    PARTIAL_GLOB,
)
"""Likewise what fine-tuning writes into its own."""

_FORMER_KEYS = {
    "status",
    "stage",
    "seed",
    "settings",
    "environment",
    "seconds",
}  # of run.json before it had a format
_PACKAGES = (
    "qdq",
    "torch",
    "torchvision",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
)


def find_announced() -> tuple[int, int]:
    """The number of this process and how many torchrun has started: (0, 1) without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), size) if size > 1 and "RANK" in os.environ else (0, 1)


class Run:
    """A run folder while it is being filled; made by `start_run`.

    Args:
        folder: Where everything goes.
        settings: What the run was asked to do, for the report.
        seed: The seed of all random numbers.

    Attributes:
        environment: From `describe_environment`.
        command: From `describe_command`.
        seconds: Stage -> how long it took.
        is_first: Whether this process is the one that reports: alone, or the first that torchrun started.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], seed: int) -> None:
        self.is_first = find_announced()[0] == 0
        self.folder = folder
        self.settings = settings
        self.seed = seed
        self.environment = describe_environment()
        self.command = describe_command()
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._stage_began = time.perf_counter()
        self._lock: _Lock | None = None

    def stage(self, name: str) -> None:
        """Say that the next stage begins; its time is taken until the next call or `finish`."""
        self._end_stage()
        self._stage, self._stage_began = name, time.perf_counter()
        logger.info("stage %s", name)
        if self.is_first:
            print(f"== {name}", flush=True)
        self._save("running")

    def finish(self) -> None:
        """Say that the last stage is over and the folder complete; another run may have it now."""
        self._end_stage()
        self._stage = ""
        self._save("finished")
        if self._lock is not None:
            self._lock.release()

    def is_begun(self) -> bool:
        """Whether the folder holds this very run, not finished."""
        earlier = _read_state(self.folder)
        return earlier.get("status") == "running" and earlier | self._describe() == earlier

    def _describe(self) -> dict[str, Any]:
        described: dict[str, Any] = to_jsonable(
            {"seed": self.seed, "settings": self.settings, "environment": self.environment}
        )
        return described

    def _end_stage(self) -> None:
        if self._stage:
            self.seconds[self._stage] = round(time.perf_counter() - self._stage_began, 2)

    def _save(self, status: str) -> None:
        write_json(
            self.folder / STATE_FILE,
            {
                "format": RUN_FORMAT,
                "status": status,
                "stage": self._stage,
                **self._describe(),
                "seconds": self.seconds,
            },
        )


def start_run(folder: Path | str, *, seed: int = 0, settings: dict[str, Any] | None = None) -> Run:
    """Open a run folder, set the seeds and send the log of qdq to `run.log` in it.

    What an earlier run wrote into the folder is removed, so that a folder never mixes two; every other file stays. So
    does what the earlier run had measured: its analysis, and, where it was cut off and had the same settings, seed and
    versions, what it had collected. A file that a setting names, such as the plan, stays until the run writes its own;
    a copy of it is kept beside it, as `plan.input.yaml`.

    Until `Run.finish` or the end of this process no other run can start in the folder.

    Of the processes that torchrun starts the first has the folder. The others have one each, which is removed when they
    end; they print no stages and log errors only.

    Args:
        folder: Made if it does not exist.
        seed: For Python, numpy and torch.
        settings: What the run was asked to do, for the report.

    Raises:
        ArgumentError: As for `check_run_folder`, and DataError; a seed below 0 or above 2^32 - 1.
    """
    require_seed(seed)
    folder = as_path(folder, "folder")
    if find_announced()[0]:
        return _start_silent_run(settings or {}, seed)
    check_run_folder(folder, settings)
    run = Run(folder, settings or {}, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run._lock = _take_lock(folder / LOG_FILE)
        _log_to(folder / LOG_FILE)
        is_begun = run.is_begun()
        run._save(
            "running"
        )  # before anything else is touched: killed at any moment, the folder is known as a run's
        _empty(folder, _find_inputs(folder, run.settings), is_begun)
    except OSError as error:
        raise _unusable(folder, error) from error
    set_seed(seed)
    return run


def check_run_folder(folder: Path | str, settings: dict[str, Any] | None = None) -> None:
    """Refuse a folder in which no run can start, before the work whose results it is for; changes nothing.

    Args:
        folder: As for `start_run`.
        settings: Likewise; those that are paths are looked at too, and `weights`.

    Raises:
        DataError: A setting names a device, a FIFO or a link that leads nowhere.
        ArgumentError: The folder holds files and is no run's, is in use by another run, holds a link or the like where
            a run writes a file, or cannot be written to.
    """
    folder = as_path(folder, "folder")
    guard_files(inputs=[path for path in _list_paths(settings or {}) if os.path.lexists(path)])
    try:
        present = _list_folder(folder)
        existing = next(
            parent for parent in (folder, *folder.absolute().parents) if parent.exists()
        )
        tempfile.TemporaryFile(dir=existing).close()
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    if _is_locked(folder / LOG_FILE):
        raise ArgumentError(
            f"another run is writing to {printable(folder)}.",
            "wait for its end, or choose another folder.",
        )
    if not _is_run_folder(folder, present):
        raise ArgumentError(
            f"{printable(folder)} holds files and is not a run folder: it has no {STATE_FILE} that qdq wrote.",
            "choose a new folder with --output; a run removes what an earlier run wrote.",
        )
    for path in present:
        if not _is_what_a_run_writes(path):
            raise ArgumentError(
                f"{printable(path)} is a link or a folder where a run writes a file, or no folder where it makes one.",
                "move it away, or choose another folder.",
            )


def _is_what_a_run_writes(path: Path) -> bool:
    """Whether an entry of a run folder may stay or go; not a link, for what it leads to is somebody else's."""
    mode = path.lstat().st_mode
    if path.name == TUNING_FOLDER:
        return stat.S_ISDIR(mode)
    return stat.S_ISREG(mode) or not _is_run_file(path.name)


def list_run_files(run: Path) -> list[Path]:
    """What a run has written, but for the page that can be made again: what must not be overwritten where it is read.

    Args:
        run: A run folder, or the report in it.
    """
    folder = run if os.path.isdir(run) else run.parent
    with contextlib.suppress(OSError):
        files = [
            path
            for path in _list_folder(folder)
            if _is_run_file(path.name) and path.name != PAGE_FILE
        ]
        return [*([] if folder == run else [run]), *files, *_list_tuning(folder / TUNING_FOLDER)]
    return [run]


def guard_command(
    *,
    inputs: Iterable[File] = (),
    outputs: Iterable[File] = (),
    in_place: Collection[tuple[File, File]] = (),
) -> None:
    """As `guard_files`, for a command that is no run: it does not replace what a run wrote either.

    Args:
        inputs: As for `guard_files`.
        outputs: Likewise.
        in_place: Likewise; the second file of a pair may also be one that is made again from what is read, such as the
            engine beside a model.

    Raises:
        ArgumentError: As for `guard_files`; or an output is in a run folder, where a run writes a file.
        DataError: As for `guard_files`.
    """
    written = [Path(path) for path in outputs if path is not None]
    guard_files(inputs=inputs, outputs=written, in_place=in_place)
    pairs = [(Path(first), Path(second)) for first, second in in_place if first and second]
    for path in written:
        replaces = any(path == first and is_same_file(first, second) for first, second in pairs)
        if not replaces and is_replaceable(path) and _is_of_a_run(path):
            raise ArgumentError(
                f"{printable(path)} is a file of a run; it would be lost.",
                "choose another file to write.",
            )


def _is_of_a_run(path: Path) -> bool:
    """Whether a file, which need not exist, is one that the run of its folder writes."""
    path = Path(os.path.realpath(path))
    globs = (*_RUN_FILES, *(f"{TUNING_FOLDER}/{glob}" for glob in _TUNING_FILES))
    for folder in list(path.parents)[:3]:
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(name, glob) for glob in globs) and _is_state_of_a_run(
            _read_state(folder)
        ):
            return True
    return False


def _list_folder(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _list_tuning(folder: Path) -> list[Path]:
    return [path for glob in _TUNING_FILES for path in folder.glob(glob)]


def _is_run_file(name: str) -> bool:
    """Whether a run writes a file of this name into its folder."""
    return any(fnmatchcase(name, glob) for glob in _RUN_FILES)


def _is_run_folder(folder: Path, present: list[Path]) -> bool:
    if _is_state_of_a_run(_read_state(folder)):
        return True
    # a run that was killed before it wrote run.json has left an empty log at the most
    return all(
        path.name == LOG_FILE and path.is_file() and path.stat().st_size == 0 for path in present
    )


def _is_state_of_a_run(state: dict[str, Any]) -> bool:
    """Whether qdq, this version or an earlier one, wrote a `run.json`."""
    if state.get("format") == RUN_FORMAT:
        return True
    return (
        state.keys() == _FORMER_KEYS
        and isinstance(state["environment"], dict)
        and "qdq" in state["environment"]
    )


def _read_state(folder: Path) -> dict[str, Any]:
    """What `run.json` says, nothing where it is absent or damaged."""
    try:
        state = json.loads(read_file(folder / STATE_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _find_inputs(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The files below a folder that any of the settings names."""
    root = os.path.realpath(folder)
    return [
        Path(name)
        for name in _list_names(settings)
        if _is_below(name, root) and os.path.isfile(name)
    ]


def _list_paths(settings: dict[str, Any]) -> Iterator[Path]:
    """The settings that are meant as paths; another text, such as the name of a model, may have a namesake."""
    weights = settings.get("weights")
    if isinstance(weights, str):
        yield Path(weights)
    values = list(settings.values())
    while values:
        value = values.pop()
        if isinstance(value, Path):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            values.append(asdict(value))
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value


def _list_names(settings: dict[str, Any]) -> list[str]:
    """The texts among settings that could be paths."""
    return [text for text in _list_texts(to_jsonable(settings)) if text and "\0" not in text]


def _list_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _list_texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _list_texts(item)


def _is_below(name: str, root: str) -> bool:
    return os.path.realpath(name).startswith(os.path.join(root, ""))


def _empty(folder: Path, inputs: list[Path], is_begun: bool) -> None:
    """Remove what an earlier run wrote and this one does not go on with."""
    staying = (STATE_FILE, LOG_FILE, *_JOURNALS, *(_STATISTICS if is_begun else ()))
    files = [path for path in _list_folder(folder) if _is_run_file(path.name)]
    for path in files:
        if any(is_same_file(path, file) for file in inputs):
            _keep_copy(path, is_begun)
        elif not any(fnmatchcase(path.name, glob) for glob in staying):
            path.unlink()
    if is_begun:
        return
    for path in _list_tuning(folder / TUNING_FOLDER):
        if any(is_same_file(path, file) for file in inputs):
            _keep_copy(path, is_begun)
        else:
            path.unlink()
    for place in (folder / TUNING_FOLDER / "tensorboard", folder / TUNING_FOLDER):
        with contextlib.suppress(OSError):  # it is not there, or holds what a run has not written
            place.rmdir()


def _keep_copy(path: Path, is_begun: bool) -> None:
    """A copy of what the run reads and will replace; begun again, it may be reading its own result."""
    copy = path.with_name(f"{path.stem}.input{path.suffix}")
    if not (is_begun and copy.exists()):
        shutil.copyfile(path, copy)


def _start_silent_run(settings: dict[str, Any], seed: int) -> Run:
    """A run whose files nobody will read."""
    folder = tempfile.TemporaryDirectory(prefix="qdq-")
    atexit.register(folder.cleanup)
    logging.getLogger("qdq").setLevel(logging.ERROR)
    set_seed(seed)
    return Run(Path(folder.name), settings, seed)


def _unusable(folder: Path, error: OSError | ValueError) -> ArgumentError:
    reason = getattr(error, "strerror", None) or error
    return ArgumentError(
        f"cannot use {printable(folder)} as run folder: {reason}.",
        "choose a folder that you may write to.",
    )


def _log_to(path: Path) -> None:
    root = logging.getLogger("qdq")
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.setLevel(logging.INFO)


class _Lock:
    """A lock on a file until this process ends, however it ends; processes that it forks do not have it.

    Args:
        path: The file, made if it does not exist.

    Raises:
        BlockingIOError: Another process has locked it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.name != "posix":
            return
        os.register_at_fork(after_in_child=self.release)
        try:
            _wait_for(self._descriptor)
        except BlockingIOError:
            self.release()
            raise BlockingIOError(errno.EWOULDBLOCK, "another run is writing to it") from None
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s cannot be locked (%s); let no second run use the folder", path, error.strerror
            )

    def is_of(self, path: Path) -> bool:
        """Whether it is held on this file."""
        return self._descriptor is not None and os.path.samestat(
            os.fstat(self._descriptor), path.stat()
        )

    def release(self) -> None:
        """Let others have it; may be called again."""
        if self._descriptor is not None:
            os.close(
                self._descriptor
            )  # of a forked process this is a copy, without which the lock stays
            self._descriptor = None


_held: _Lock | None = None  # this process has one run at a time


def _take_lock(path: Path) -> _Lock:
    global _held
    if _held is not None:
        _held.release()
    _held = _Lock(path)
    return _held


def _is_locked(path: Path) -> bool:
    """Whether another process has locked a log file; this one may start a second run in its own folder."""
    if not path.is_file() or (_held is not None and _held.is_of(path)):
        return False
    try:
        with path.open("rb") as file:
            _lock_shared(file.fileno())
    except BlockingIOError:
        return True
    except (
        OSError
    ):  # a file of another user, which is said when it is opened; or a file system without locks
        return False
    return False


def _wait_for(descriptor: int) -> None:
    """Lock a file, as soon as no other process is looking whether it is locked.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: The file system has no locks.
    """
    import fcntl

    deadline = time.monotonic() + _LOOKER_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _lock_shared(
                descriptor
            )  # fails where a run has locked it, and not where others are looking
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _lock_shared(descriptor: int) -> None:
    """As who is looking does; many may at a time.

    Raises:
        BlockingIOError: Another process has locked it for itself.
    """
    if os.name == "posix":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def describe_environment() -> dict[str, str]:
    """Versions of Python, of the machine and of the packages that change a result; no paths, no host names."""
    versions = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_command() -> str:
    """How this process was called, for a shell; of a program only its name, of a script what was typed."""
    program = sys.argv[0] if sys.argv else ""
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*start, *sys.argv[1:]])


def require_seed(seed: int) -> None:
    """Refuse a seed that numpy cannot take.

    Raises:
        ArgumentError: Below 0 or above 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"seed is {seed}; it must be 0 to {2**32 - 1}.", "choose another seed.")


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (where it is loaded)."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
