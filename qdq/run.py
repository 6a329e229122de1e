"""The run folder: its files, which of them a new run removes, seed, log file, environment."""

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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qdq.errors import ArgumentError, ArgumentTypeError
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
"""The entry in `run.json` that proves that a folder is a run folder."""

STATE_FILE = "run.json"
LOG_FILE = "run.log"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
TEXT_FILE = "report.txt"
PLAN_FILE = "plan.yaml"
MODEL_FILE = "model.onnx"
JOURNAL_FILE = "analysis.jsonl"
STATISTICS_FILE = "calibration.safetensors"
REFERENCES_FILE = "references.safetensors"
QUANTIZED_FILE = "quantized.safetensors"
RECOVERY_FILE = "recovery.safetensors"
TUNING_FOLDER = "tuning"

_PROBE_SECONDS = 10.0  # no process takes longer to check whether a folder is in use

# A new run keeps these files of any earlier run: their lines say what was measured.
_JOURNALS = (JOURNAL_FILE, "analysis.*.jsonl")

# A run that continues an interrupted one with the same settings keeps these files, too.
_STATISTICS = (STATISTICS_FILE, "calibration.json", "calibration.rank*of*.safetensors")
_CONTINUED = (*_STATISTICS, RECOVERY_FILE)

_RUN_FILES = (
    STATE_FILE,
    LOG_FILE,
    *_JOURNALS,
    *_STATISTICS,
    "calibration*.damaged.safetensors",
    PLAN_FILE,
    MODEL_FILE,
    "model.onnx.data",
    "model.engine",
    "model.rtx.engine",
    REFERENCES_FILE,
    QUANTIZED_FILE,
    RECOVERY_FILE,
    REPORT_FILE,
    PAGE_FILE,
    TEXT_FILE,
    PARTIAL_GLOB,  # of a process that was killed
    ".model.onnx.data.partial",
)
"""Globs of the files that a run writes into its folder; no other file in it is ever removed."""

_TUNING_FILES = (
    "state.safetensors",
    "best.safetensors",
    "last.safetensors",
    "tuning.json",
    "tensorboard/events.out.tfevents.*",
    PARTIAL_GLOB,
)
"""Globs of the files that fine-tuning writes into its own folder."""

# Keys of run.json in versions that did not yet write a format.
_FORMER_KEYS = {"status", "stage", "seed", "settings", "environment", "seconds"}

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
    """The number of this process and how many processes torchrun started; (0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and "RANK" in os.environ:
        return int(os.environ["RANK"]), size
    return 0, 1


class Run:
    """A run folder while it is being filled; made by `start_run`.

    Args:
        folder: The folder of all files.
        settings: The settings of the run, for the report.
        seed: The seed of all random numbers.

    Attributes:
        environment: From `describe_environment`.
        command: From `describe_command`.
        seconds: Stage -> how long it took.
        is_first: Whether this process writes the report: it is alone, or the first that torchrun started.
        targets: The targets that each have a folder below this one; () if all files are in this one.
        target: The target whose folder this is; "" if it is the folder of the run itself.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], seed: int) -> None:
        self.is_first = find_announced()[0] == 0
        self.folder = folder
        self.settings = settings
        self.seed = seed
        self.environment = describe_environment()
        self.command = describe_command()
        self.seconds: dict[str, float] = {}
        self.targets: tuple[str, ...] = ()
        self.target = ""
        self._parent: Run | None = None
        self._is_continued = False
        self._stage = ""
        self._stage_began = time.perf_counter()
        self._lock: _Lock | None = None
        self._log: logging.Handler | None = None

    @property
    def model_file(self) -> Path:
        """The exported model."""
        return self.folder / MODEL_FILE

    @property
    def plan_file(self) -> Path:
        """The precision of each layer, for `save_plan`."""
        return self.folder / PLAN_FILE

    @property
    def statistics_file(self) -> Path:
        """The statistics of calibration, one file for all targets; `write_report` reads them."""
        return self._shared_folder / STATISTICS_FILE

    @property
    def references_file(self) -> Path:
        """Inputs and the outputs that belong to them, for `save_references`; `make_bundle` reads them."""
        return self.folder / REFERENCES_FILE

    @property
    def quantized_file(self) -> Path:
        """Weights and ranges of the model that was exported, for `save_tuned`; `qdq diverge` reads them."""
        return self.folder / QUANTIZED_FILE

    @property
    def journal_file(self) -> Path:
        """The measurements of the analysis, one file for all targets: those with the same formats share them.

        A run that was killed and started again reads them, too.
        """
        return self._shared_folder / JOURNAL_FILE

    @property
    def recovery_file(self) -> Path:
        """The state after the last accuracy pass, for `recover_accuracy`; only an unfinished run has it."""
        return self.folder / RECOVERY_FILE

    @property
    def tuning_folder(self) -> Path:
        """The folder of fine-tuning."""
        return self.folder / TUNING_FOLDER

    @property
    def report_file(self) -> Path:
        """The report as JSON."""
        return self.folder / REPORT_FILE

    @property
    def page_file(self) -> Path:
        """The report as a page."""
        return self.folder / PAGE_FILE

    @property
    def text_file(self) -> Path:
        """The report as text."""
        return self.folder / TEXT_FILE

    def start_target(self, target: str) -> Run:
        """Open the folder of one of several targets: the next stages are for it.

        It has the files of a run with this target alone, except the statistics and the measurements of the analysis,
        which all targets share.

        Args:
            target: One of those that `start_run` got.

        Returns:
            The run of this target; the run itself if it has one target.

        Raises:
            ArgumentError: The folder cannot be used.
        """
        if not self.targets:
            return self
        run = Run(self.folder / target, self.settings, self.seed)
        run.environment = self.environment
        run.is_first = self.is_first
        run.target = target
        run._parent = self
        self.stage(target)
        run._open()
        return run

    def stage(self, name: str) -> None:
        """Begin the next stage. Its time runs until the next call or `finish`."""
        self._end_stage()
        self._stage = name
        self._stage_began = time.perf_counter()
        title = f"{self.target}: {name}" if self.target else name
        logger.info("stage %s", title)
        if self.is_first:
            print(f"== {title}", flush=True)
        self._save("running")

    def finish(self) -> None:
        """End the last stage: the folder is complete, and another run may use it."""
        self._end_stage()
        self._stage = ""
        self._save("finished")
        if self._parent is None:  # until then a run that is killed continues each of its targets
            self.recovery_file.unlink(missing_ok=True)
            for target in self.targets:
                (self.folder / target / RECOVERY_FILE).unlink(missing_ok=True)
        if self._log is not None:
            _close_log(self._log)
        if self._lock is not None:
            self._lock.release()

    def is_begun(self) -> bool:
        """Whether the folder holds an unfinished run with the same settings, seed and environment."""
        earlier = _read_state(self.folder)
        is_unfinished = earlier.get("status") == "running"
        if self._parent is not None:  # a target may be finished before its run is
            is_unfinished = self._parent._is_continued
        return is_unfinished and earlier | self._describe() == earlier

    @property
    def _shared_folder(self) -> Path:
        """The folder of what all targets share."""
        return self.folder if self._parent is None else self._parent.folder

    def _open(self) -> None:
        """Lock the folder, remove the files of an earlier run from it, and write the log into it.

        Raises:
            ArgumentError: The folder cannot be used.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.folder / LOG_FILE)
            self._log = _log_to(self.folder / LOG_FILE)
            self._is_continued = self.is_begun()
            # Before any file is removed: if the process is killed, the folder is still known as a run folder.
            self._save("running")
            _empty(self.folder, _find_inputs(self.folder, self.settings), self._is_continued)
        except OSError as error:
            raise _refuse_folder(self.folder, error) from error

    def _describe(self) -> dict[str, Any]:
        """The facts that tell runs apart."""
        facts: dict[str, Any] = to_jsonable(
            {"seed": self.seed, "settings": self.settings, "environment": self.environment}
        )
        if self.targets:
            facts["targets"] = list(self.targets)
        if self.target:
            facts["target"] = self.target
        return facts

    def _end_stage(self) -> None:
        """Note how long the stage took."""
        if self._stage:
            self.seconds[self._stage] = round(time.perf_counter() - self._stage_began, 2)

    def _save(self, status: str) -> None:
        """Write `run.json`."""
        state = {
            "format": RUN_FORMAT,
            "status": status,
            "stage": self._stage,
            **self._describe(),
            "seconds": self.seconds,
        }
        write_json(self.folder / STATE_FILE, state)


def start_run(
    folder: Path | str,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    device: str | None = None,
    targets: Sequence[str] = (),
) -> Run:
    """Open a run folder, set the seeds and write the log of qdq to `run.log` in it.

    Files that an earlier run wrote into the folder are removed, so that a folder never mixes two runs. All other files
    stay. The analysis of the earlier run stays, too. So do the statistics that it collected and the state of its
    accuracy passes, if it was interrupted and had the same settings, seed, versions and device. A file that a setting
    names, such as the plan, stays until the run writes its own; a copy is kept beside it, as `plan.input.yaml`.

    Until `Run.finish` or the end of this process no other run can start in the folder.

    Of the processes that torchrun starts, the first one uses the folder. Each of the others uses a temporary folder,
    prints no stages and logs only errors.

    Args:
        folder: Created if it does not exist.
        seed: For Python, numpy and torch.
        settings: The settings of the run, for the report.
        device: The device that the model runs on, in words (`describe_device`). It is printed, and it is part of the
            environment: on another device, an interrupted run starts again.
        targets: Names of the targets. If there are two or more, each has a folder of its own below this one
            (`Run.start_target`).

    Raises:
        ArgumentError: As for `check_run_folder`; a seed below 0 or above 2^32 - 1.
        DataError: As for `check_run_folder`.
    """
    require_seed(seed)
    folder = as_path(folder, "folder")
    rank, _ = find_announced()
    if rank > 0:
        return _start_silent_run(settings or {}, seed)
    check_run_folder(folder, settings, targets)

    run = Run(folder, settings or {}, seed)
    if device is not None:
        run.environment["device"] = device
        print(f"device: {device}", flush=True)
    run.targets = _list_folders_of(targets)
    _release_locks()
    _close_logs()
    run._open()
    set_seed(seed)
    return run


def _list_folders_of(targets: Sequence[str]) -> tuple[str, ...]:
    """The folders of targets below that of the run; one target alone has none."""
    return tuple(targets) if len(targets) > 1 else ()


def check_run_folder(
    folder: Path | str, settings: dict[str, Any] | None = None, targets: Sequence[str] = ()
) -> None:
    """Refuse a folder in which no run can start, before any work is done for it. Nothing is changed.

    Args:
        folder: As for `start_run`.
        settings: As for `start_run`; settings that are paths, and `weights`, are checked as well.
        targets: As for `start_run`; their folders are checked as well.

    Raises:
        DataError: A setting names a device, a FIFO or a broken link.
        ArgumentError: A target that cannot be the name of a folder, or that is named twice. The folder holds files and
            is not a run folder, is in use by another run, has a link or a folder where a run writes a file, has a link
            in place of the folder of a target, or cannot be written to.
    """
    folder = as_path(folder, "folder")
    _require_target_names(targets)
    guard_files(inputs=[path for path in _list_paths(settings or {}) if os.path.lexists(path)])
    try:
        present = _list_folder(folder)
        _require_writable(folder)
    except (OSError, ValueError) as error:
        raise _refuse_folder(folder, error) from error

    if _is_locked(folder / LOG_FILE):
        raise ArgumentError(
            f"another run is writing to {printable(folder)}.",
            "wait until it ends, or choose another folder.",
        )
    if not _is_run_folder(folder, present):
        raise ArgumentError(
            f"{printable(folder)} holds files and is not a run folder: it has no {STATE_FILE} that qdq wrote.",
            "choose a new folder with --output; a run removes the files of an earlier run.",
        )
    for path in present:
        if not _is_usable(path):
            raise ArgumentError(
                f"{printable(path)} is a link or folder, but a run writes a file there; "
                "or it is not a folder, but a run needs one.",
                "move it away, or choose another folder.",
            )
    for target in _list_folders_of(targets):
        target_folder = folder / target
        if target_folder.is_symlink():  # the files that it leads to may be those of another run
            raise ArgumentError(
                f"{printable(target_folder)} is a link, but a run writes the files of {printable(target)} there.",
                "move it away, or choose another folder.",
            )
        check_run_folder(target_folder)


def _require_target_names(targets: Sequence[str]) -> None:
    """Refuse names of targets that cannot each be a folder of their own below that of the run.

    Raises:
        ArgumentError: With the name.
    """
    for name in targets:
        is_plain = bool(name) and "\0" not in name and Path(name).name == name
        if not is_plain or name in {os.curdir, os.pardir, TUNING_FOLDER} or _is_run_file(name):
            raise ArgumentError(
                f"target {name!r} cannot be the name of a folder in the run folder.",
                "name it with letters and digits, such as l4.",
            )
        if list(targets).count(name) > 1:
            raise ArgumentError(f"targets has {name} twice.", "name each target once.")


def _require_writable(folder: Path) -> None:
    """Write a temporary file into a folder, or into the innermost parent that exists.

    Raises:
        OSError: The folder cannot be written to.
    """
    for parent in (folder, *folder.absolute().parents):
        if parent.exists():
            tempfile.TemporaryFile(dir=parent).close()
            return


def _is_usable(path: Path) -> bool:
    """Whether a run can start with this entry in its folder.

    A link where a run writes a file is not usable: the file that it leads to belongs to somebody else.
    """
    mode = path.lstat().st_mode
    if path.name == TUNING_FOLDER:
        return stat.S_ISDIR(mode)
    return stat.S_ISREG(mode) or not _is_run_file(path.name)


def list_run_files(run: Path) -> list[Path]:
    """The files of a run that a command must not overwrite while it reads them.

    The page is not among them: it can be written again from the report.

    Args:
        run: A run folder, or the report in it.
    """
    folder = run if os.path.isdir(run) else run.parent
    files = [] if folder == run else [run]
    try:
        for path in _list_folder(folder):
            if _is_run_file(path.name) and path.name != PAGE_FILE:
                files.append(path)
        for target_folder in _list_target_folders(folder):
            files += list_run_files(target_folder)

        return files + _list_tuning(folder / TUNING_FOLDER)
    except OSError:
        return [run]


def list_targets(run: Path) -> tuple[str, ...]:
    """The targets that each have a folder below that of a run; () if the run has its files in its own folder.

    Args:
        run: A run folder, or another path.
    """
    targets = _read_state(run).get("targets")
    return tuple(map(str, targets)) if isinstance(targets, list) else ()


def require_one_target(run: Path) -> None:
    """Refuse a run of several targets where the files of one are read.

    Args:
        run: A run folder, or another path.

    Raises:
        ArgumentError: It has the folders of several targets.
    """
    targets = list_targets(run)
    if targets:
        raise ArgumentError(
            f"{printable(run)} is a run for several targets: {printable(', '.join(targets))}.",
            f"give the folder of one of them, such as {printable(run / targets[0])}.",
        )


def guard_command(
    *,
    inputs: Iterable[File] = (),
    outputs: Iterable[File] = (),
    in_place: Collection[tuple[File, File]] = (),
) -> None:
    """As `guard_files`, for a command that is not a run: it must not replace files of a run either.

    Args:
        inputs: As for `guard_files`.
        outputs: As for `guard_files`.
        in_place: As for `guard_files`. The second file of a pair may also be one that is made again from the files that
            are read, such as the engine beside a model.

    Raises:
        ArgumentError: As for `guard_files`; or an output is in a run folder, where a run writes a file.
        DataError: As for `guard_files`.
    """
    written = [Path(path) for path in outputs if path is not None]
    guard_files(inputs=inputs, outputs=written, in_place=in_place)
    for path in written:
        if _is_replaced_in_place(path, in_place) or not is_replaceable(path):
            continue
        if _is_of_a_run(path):
            raise ArgumentError(
                f"{printable(path)} is a file of a run and would be overwritten.",
                "choose another file to write.",
            )


def _is_replaced_in_place(path: Path, in_place: Collection[tuple[File, File]]) -> bool:
    """Whether a command may replace a file because it reads the same file.

    Args:
        path: The file that it writes.
        in_place: As for `guard_files`; None in a pair means that an option was not given.
    """
    for output, source in in_place:
        if not output or not source:
            continue
        if path == Path(output) and is_same_file(Path(output), Path(source)):
            return True

    return False


def _is_of_a_run(path: Path) -> bool:
    """Whether a file, which need not exist, is one that the run of its folder writes."""
    path = Path(os.path.realpath(path))
    tuning_globs = tuple(f"{TUNING_FOLDER}/{glob}" for glob in _TUNING_FILES)
    for folder in list(path.parents)[:3]:  # a curve of fine-tuning is two folders down
        name = path.relative_to(folder).as_posix()
        is_written = _matches_any(name, _RUN_FILES + tuning_globs)
        if is_written and _is_state_of_a_run(_read_state(folder)):
            return True

    return False


def _matches_any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _list_folder(folder: Path) -> list[Path]:
    """The entries of a folder; none if it does not exist."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _list_tuning(folder: Path) -> list[Path]:
    """The files that fine-tuning wrote into its folder."""
    files: list[Path] = []
    for glob in _TUNING_FILES:
        files += folder.glob(glob)

    return files


def _list_target_folders(folder: Path) -> list[Path]:
    """The folders of targets below that of a run, also of an earlier run with other targets."""
    folders = []
    for path in _list_folder(folder):
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and _read_state(path).get("target") == path.name:
            folders.append(path)
    return folders


def _is_run_file(name: str) -> bool:
    """Whether a run writes a file of this name into its folder."""
    return _matches_any(name, _RUN_FILES)


def _is_run_folder(folder: Path, present: list[Path]) -> bool:
    """Whether a run may use a folder: it is empty, or a run wrote its files.

    Args:
        folder: The folder, which need not exist.
        present: The entries in it.
    """
    if _is_state_of_a_run(_read_state(folder)):
        return True
    # A run that was killed before it wrote run.json leaves at most an empty log.
    return all(_is_empty_log(path) for path in present)


def _is_empty_log(path: Path) -> bool:
    """Whether a path is the log of a run that has not logged anything."""
    return path.name == LOG_FILE and path.is_file() and path.stat().st_size == 0


def _is_state_of_a_run(state: dict[str, Any]) -> bool:
    """Whether this version of qdq or an earlier one wrote a `run.json`."""
    if state.get("format") == RUN_FORMAT:
        return True
    if state.keys() != _FORMER_KEYS:
        return False
    environment = state["environment"]
    return isinstance(environment, dict) and "qdq" in environment


def _read_state(folder: Path) -> dict[str, Any]:
    """The content of `run.json`; empty if it is absent or damaged."""
    try:
        state = json.loads(read_file(folder / STATE_FILE))
    except (OSError, ValueError, RecursionError):
        return {}

    return state if isinstance(state, dict) else {}


def _find_inputs(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The files in or below a folder that a setting names.

    Args:
        folder: The run folder.
        settings: The settings of the run; every string in them could be a path.
    """
    root = os.path.realpath(folder)
    inputs = []
    for text in _list_texts(to_jsonable(settings)):
        if not text or "\0" in text:
            continue
        if _is_below(text, root) and os.path.isfile(text):
            inputs.append(Path(text))

    return inputs


def _is_below(path: str, root: str) -> bool:
    """Whether a path is in a folder or below it."""
    return os.path.realpath(path).startswith(os.path.join(root, ""))


def _list_paths(settings: dict[str, Any]) -> Iterator[Path]:
    """The settings that are paths.

    A string does not count, because a file may have the name of a model; `weights` is the exception.
    """
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


def _list_texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _list_texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _list_texts(item)


def _empty(folder: Path, inputs: list[Path], is_begun: bool) -> None:
    """Remove the files of an earlier run.

    Args:
        folder: The run folder.
        inputs: Files that the run reads; copies of them are kept.
        is_begun: Whether the run continues the earlier one; then its statistics, the state of its accuracy passes and
            its fine-tuning are kept.
    """
    kept_globs: tuple[str, ...] = (STATE_FILE, LOG_FILE, *_JOURNALS)
    if is_begun:
        kept_globs += _CONTINUED

    for path in _list_folder(folder):
        if not _is_run_file(path.name):
            continue
        if _is_among(path, inputs):
            _keep_copy(path, is_begun)
        elif not _matches_any(path.name, kept_globs):
            path.unlink()

    if not is_begun:
        _empty_tuning(folder / TUNING_FOLDER, inputs)
        for target_folder in _list_target_folders(folder):
            _empty_target(target_folder, inputs)


def _empty_target(folder: Path, inputs: list[Path]) -> None:
    """Remove the files of an earlier run from the folder of a target, and the folder if nothing else is in it.

    Args:
        folder: The folder of the target.
        inputs: Files that the run reads; copies of them are kept.
    """
    _empty(folder, inputs, is_begun=False)
    (folder / LOG_FILE).unlink(missing_ok=True)
    if [path.name for path in _list_folder(folder)] == [STATE_FILE]:  # else it marks what is left
        (folder / STATE_FILE).unlink()
        folder.rmdir()


def _empty_tuning(folder: Path, inputs: list[Path]) -> None:
    """Remove the files of an earlier fine-tuning, and its folders if nothing else is in them.

    Args:
        folder: The folder of fine-tuning.
        inputs: Files that the run reads; copies of them are kept.
    """
    for path in _list_tuning(folder):
        if _is_among(path, inputs):
            _keep_copy(path, is_begun=False)
        else:
            path.unlink()

    for subfolder in (folder / "tensorboard", folder):
        with contextlib.suppress(OSError):  # absent, or holds files that no run wrote
            subfolder.rmdir()


def _is_among(path: Path, files: list[Path]) -> bool:
    return any(is_same_file(path, file) for file in files)


def _keep_copy(path: Path, is_begun: bool) -> None:
    """Copy a file that the run reads and will replace.

    A run that continues may read its own result; then the copy of the earlier start stays.

    Args:
        path: The file.
        is_begun: Whether the run continues an earlier one.
    """
    copy = path.with_name(f"{path.stem}.input{path.suffix}")
    if is_begun and copy.exists():
        return
    shutil.copyfile(path, copy)


def _start_silent_run(settings: dict[str, Any], seed: int) -> Run:
    """A run in a temporary folder, whose files nobody will read."""
    folder = tempfile.TemporaryDirectory(prefix="qdq-")
    atexit.register(folder.cleanup)
    logging.getLogger("qdq").setLevel(logging.ERROR)
    set_seed(seed)
    return Run(Path(folder.name), settings, seed)


def _refuse_folder(folder: Path, error: OSError | ValueError) -> ArgumentError:
    """The error for a folder that cannot be read or written."""
    reason = getattr(error, "strerror", None) or error
    return ArgumentError(
        f"cannot use {printable(folder)} as a run folder: {reason}.",
        "choose a folder that you may write to.",
    )


def _log_to(path: Path) -> logging.Handler:
    """Send the log of qdq to a file, too."""
    root = logging.getLogger("qdq")
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.setLevel(logging.INFO)
    return file


def _close_logs() -> None:
    """Send the log of qdq no longer to the files of an earlier run."""
    for handler in logging.getLogger("qdq").handlers[:]:
        if isinstance(handler, logging.FileHandler):
            _close_log(handler)


def _close_log(handler: logging.Handler) -> None:
    logging.getLogger("qdq").removeHandler(handler)
    handler.close()


class _Lock:
    """A lock on a file until this process ends in any way. Processes that it forks do not have the lock.

    Args:
        path: The file; created if it does not exist.

    Raises:
        BlockingIOError: Another process has locked it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.name != "posix":
            return
        os.register_at_fork(after_in_child=self.release)
        try:
            _wait_for_lock(self._descriptor)
        except BlockingIOError:
            self.release()
            raise BlockingIOError(errno.EWOULDBLOCK, "another run is writing to it") from None
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s cannot be locked (%s); do not start a second run in this folder",
                path,
                error.strerror,
            )

    def is_of(self, path: Path) -> bool:
        """Whether this is the lock on a file."""
        if self._descriptor is None:
            return False
        return os.path.samestat(os.fstat(self._descriptor), path.stat())

    def release(self) -> None:
        """Give the lock up; may be called again."""
        if self._descriptor is not None:
            # In a forked process this closes a copy; an open copy would keep the lock.
            os.close(self._descriptor)
            self._descriptor = None


_process_locks: list[
    _Lock
] = []  # this process has one run at a time: of its folder, and of those of its targets


def _release_locks() -> None:
    """Give up the locks of an earlier run of this process."""
    for lock in _process_locks:
        lock.release()
    _process_locks.clear()


def _take_lock(path: Path) -> _Lock:
    """Lock the log file of a run."""
    lock = _Lock(path)
    _process_locks.append(lock)
    return lock


def _is_locked(path: Path) -> bool:
    """Whether another process has locked a log file; this process may start a second run in its own folder."""
    if not path.is_file():
        return False
    if any(lock.is_of(path) for lock in _process_locks):
        return False
    try:
        with path.open("rb") as file:
            _lock_shared(file.fileno())
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks, or a file of another user: the error comes when it is opened.
        return False

    return False


def _wait_for_lock(descriptor: int) -> None:
    """Lock a file as soon as no other process is checking whether it is locked.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: The file system has no locks.
    """
    import fcntl

    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Fails if a run has locked the file, and succeeds if other processes are only checking.
            _lock_shared(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _lock_shared(descriptor: int) -> None:
    """Take the shared lock of a process that is only checking; many processes may hold it at once.

    Raises:
        BlockingIOError: A run has locked it.
    """
    if os.name == "posix":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def describe_environment() -> dict[str, str]:
    """Versions of Python, the machine and the packages that change a result; no paths, no host names."""
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
    """The command that started this process, for a shell; a program by its name, a script by its path."""
    program = sys.argv[0] if sys.argv else ""
    if program.endswith(".py"):
        return shlex.join(["python", program, *sys.argv[1:]])
    return shlex.join([Path(program).name, *sys.argv[1:]])


def require_seed(seed: int) -> None:
    """Refuse a seed that numpy cannot take.

    Raises:
        ArgumentError: Below 0 or above 2^32 - 1.
        ArgumentTypeError: What is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"seed is {seed!r}, a {type(seed).__name__}.", "give an integer.")
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"seed is {seed}; it must be 0 to {2**32 - 1}.", "choose another seed.")


def set_seed(seed: int) -> None:
    """Seed Python, numpy, and torch if it is loaded."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
