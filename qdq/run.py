"""A run folder: seed, log file, environment."""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qdq.errors import ArgumentError
from qdq.files import to_jsonable, write_json

logger = logging.getLogger(__name__)

STATE_FILE = "run.json"
REPORT_FILE = "report.json"
JOURNAL_FILE = "analysis.jsonl"  # kept from any earlier run: its lines say what they were measured on
STATISTICS_FILES = ("calibration.safetensors", "calibration.json")  # kept where a run that was cut off is begun again
TUNING_FOLDER = "tuning"  # likewise
_PACKAGES = (
    "qdq", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt",
    "tensorrt-rtx-cu13", "numpy",
)  # fmt: skip


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

    def stage(self, name: str) -> None:
        """Say that the next stage begins; its time is taken until the next call or `finish`."""
        self._end_stage()
        self._stage, self._stage_began = name, time.perf_counter()
        logger.info("stage %s", name)
        if self.is_first:
            print(f"== {name}", flush=True)
        self._save("running")

    def finish(self) -> None:
        """Say that the last stage is over and the folder complete."""
        self._end_stage()
        self._stage = ""
        self._save("finished")

    def is_begun(self) -> bool:
        """Whether the folder holds this very run, not finished."""
        try:
            earlier = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return (
            isinstance(earlier, dict) and earlier.get("status") == "running" and earlier | self._describe() == earlier
        )

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
            {"status": status, "stage": self._stage, **self._describe(), "seconds": self.seconds},
        )


def start_run(folder: Path | str, *, seed: int = 0, settings: dict[str, Any] | None = None) -> Run:
    """Open a run folder, set the seeds and send the log of qdq to `run.log` in it.

    What an earlier run left in the folder is removed, so that a folder never mixes two. What it had measured stays:
    its analysis, and, where it was cut off and had the same settings, seed and versions, what it had collected.

    Of the processes that torchrun starts the first has the folder. The others have one each, which is removed when they
    end; they print no stages and log errors only.

    Args:
        folder: Made if it does not exist.
        seed: For Python, numpy and torch.
        settings: What the run was asked to do, for the report.

    Raises:
        ArgumentError: The folder holds files that are not of a run, or cannot be written to; a seed below 0 or
            above 2^32 - 1.
    """
    if not 0 <= seed < 2**32:  # what numpy takes
        raise ArgumentError(f"seed is {seed}; it must be 0 to {2**32 - 1}.", "choose another seed.")
    folder = Path(folder)
    if find_announced()[0]:
        return _start_silent_run(settings or {}, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = list(folder.iterdir())
    except OSError as error:
        raise _unusable(folder, error) from error
    if present and not (folder / STATE_FILE).is_file():
        raise ArgumentError(
            f"{folder} holds files, but no {STATE_FILE}: it is not a run folder, and a run empties its folder.",
            "choose a new folder with --output.",
        )
    run = Run(folder, settings or {}, seed)
    kept = {STATE_FILE, JOURNAL_FILE, *((*STATISTICS_FILES, TUNING_FOLDER) if run.is_begun() else ())}
    run._save("running")  # before anything else is touched: killed at any moment, the folder is still known as a run's
    try:
        for path in present:
            if path.name == TUNING_FOLDER and path.name not in kept:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in kept:
                path.unlink()
        _log_to(folder / "run.log")
    except OSError as error:
        raise _unusable(folder, error) from error
    set_seed(seed)
    return run


def _start_silent_run(settings: dict[str, Any], seed: int) -> Run:
    """A run whose files nobody will read."""
    own = tempfile.TemporaryDirectory(prefix="qdq-")
    atexit.register(own.cleanup)
    logging.getLogger("qdq").setLevel(logging.ERROR)
    set_seed(seed)
    return Run(Path(own.name), settings, seed)


def _unusable(folder: Path, error: OSError) -> ArgumentError:
    return ArgumentError(
        f"cannot use {folder} as run folder: {error.strerror}.", "choose a folder that you may write to."
    )


def _log_to(path: Path) -> None:
    root = logging.getLogger("qdq")
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.setLevel(logging.INFO)


def describe_environment() -> dict[str, str]:
    """Versions of Python, of the machine and of the packages that change a result; no paths, no host names."""
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
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


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (where it is loaded)."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
