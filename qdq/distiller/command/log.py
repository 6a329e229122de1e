"""The lines of Distiller's log, and where they go: the console and the file of the run.

The constants are formats for `logger.info(FORMAT, values)`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from qdq.errors import ArgumentError
from qdq.files import guard_files
from qdq.text import MOST_CHARACTERS, printable

TEST = "--- test ---------------------"
VALIDATE = "--- validate (epoch=%d)-----------"
SAMPLES = "%d samples (%d per mini-batch)"
SCORES = "==> Top1: %.3f    Top5: %.3f    Loss: %.3f\n"
SAVING_CHECKPOINT = "Saving checkpoint to: %s"
LOG_FILE = "Log file for this run: %s"
DATASET_SIZES = "Dataset sizes:\n\ttest=%d"
ALL_DATASET_SIZES = "Dataset sizes:\n\ttraining=%d\n\tvalidation=%d\n\ttest=%d"
PREPARING = "Preparing model for quantization using %s"
LOADING_STATS = "Loading activation stats from: %s"
COLLECTING = "Collecting quantization calibration stats based on %s of %s dataset"
PASSES = (
    "Pass 1: Collecting min, max, avg_min, avg_max, mean",
    "Pass 2: Collecting b, std parameters",
)
STATS_SAVED = "Stats saved to %s"
UPDATED_STATS_SAVED = "Updated stats saved to %s"
PARAMETERS_SAVED = "Per-layer quantization parameters saved to %s"

_FOLDER = "logs"
_TIME = "%Y.%m.%d-%H%M%S"


def format_progress(
    scores: Mapping[str, float], step: int, num_steps: int, epoch: int | None = None
) -> str:
    """The line after some batches: `Test: [   10/  195]    Loss 1.417802    Top1 68.242188    Top5 87.656250`.

    Args:
        scores: Name -> running mean, in the order of the line.
        step: Number of batches so far.
        num_steps: Number of all batches.
        epoch: Number of the epoch in training; None is a test.
    """
    kind = "Test: " if epoch is None else f"Epoch: [{epoch}]"
    parts = [f"{kind}[{step:5d}/{num_steps:5d}]"]
    parts += [f"{name} {score:.6f}" for name, score in scores.items()]
    return "    ".join(parts)


def format_portion(portion: float) -> str:
    """A portion of a data set in the line `COLLECTING`: "5.0%".

    Args:
        portion: 0 to 1.
    """
    return f"{portion:.1%}"


class LineFormatter(logging.Formatter):
    """Formats records as lines. Names in them are escaped; the formats, which are the code's own, are not."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record; a traceback follows on more lines."""
        if isinstance(record.args, tuple) and record.args:
            escaped = tuple(map(_escape, record.args))
            text = str(record.msg) % escaped
        else:
            text = printable(record.getMessage().rstrip("\n"), MOST_CHARACTERS)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _escape(value: Any) -> Any:
    """A value of a record, in which text cannot control a terminal."""
    return value if isinstance(value, int | float) else printable(value, MOST_CHARACTERS)


def name_run(name: str | None, now: datetime) -> str:
    """The name of a run: `<name>___<time>`.

    Args:
        name: The user's name for it; None: the time alone.
        now: The time.

    Raises:
        ArgumentError: The name is a path.
    """
    time = now.strftime(_TIME)
    if not name:
        return time
    if Path(name).name != name:
        raise ArgumentError(
            f"the name of the run is {printable(name)}; it names a folder.", "leave out '/'."
        )
    return f"{name}___{time}"


def _make_folder(folder: Path, run_name: str) -> Path:
    """A new folder, also for the second run within a second."""
    run_folder = folder / run_name
    number = 1
    while True:
        try:
            run_folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            run_folder = folder / f"{run_name}-{number}"
        else:
            return run_folder


def _is_line(record: logging.LogRecord) -> bool:
    """Whether a record is no warning."""
    return record.levelno < logging.WARNING


@contextmanager
def logging_run(
    name: str | None = None, folder: Path | str = _FOLDER, now: datetime | None = None
) -> Iterator[Path]:
    """Write the log of qdq to the console and to a file in the folder of this run, and name the file.

    Args:
        name: Name of the run; None: the time alone.
        folder: Folder of all runs.
        now: The time; None: the present.

    Yields:
        The folder of the run.

    Raises:
        ArgumentError: It cannot be written to.
    """
    run_name = name_run(name, now or datetime.now())
    guard_files(outputs=[Path(folder) / run_name / f"{run_name}.log"])
    run_folder = _make_folder(Path(folder), run_name)
    path = run_folder / f"{run_folder.name}.log"
    logger = logging.getLogger("qdq")
    former_level = logger.level
    console = logging.StreamHandler(sys.stdout)
    if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        # The command line shows warnings itself. A file of another run does not.
        console.addFilter(_is_line)
    handlers: list[logging.Handler] = [console, logging.FileHandler(path, encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info(LOG_FILE, path.resolve())
        yield run_folder
    finally:
        logger.setLevel(former_level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
