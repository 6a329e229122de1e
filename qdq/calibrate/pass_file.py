"""`PassFile`: the file from which a killed pass over the data continues."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import safetensors

from qdq.distributed import failing_together, find_rank, gather_bytes
from qdq.errors import ArgumentError, DataError
from qdq.files import guard_files
from qdq.statistics import STATISTICS_FORMAT, Statistics, require_place_of_summary, require_suffix

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 5.0


class PassFile:
    """The file of one pass.

    With several processes, each saves its statistics in a separate file until all are done. Without a path nothing is
    saved.

    Args:
        path: The file, ending in `.safetensors`; or None.
        model: Fingerprint of the model.
        limit: Upper limit on the number of batches; None: no limit.

    Raises:
        ArgumentError: The file cannot be written there, or another file would be replaced.
    """

    def __init__(self, path: Path | str | None, model: str, limit: int | None) -> None:
        self._path = None if path is None else require_suffix(path)
        self._model = model
        self.limit = limit
        self._saved_at = time.monotonic()
        self._rank, self._size = find_rank()
        self._process_path = self._path
        if self._path and self._size > 1:
            suffix = f".rank{self._rank}of{self._size}{self._path.suffix}"
            self._process_path = self._path.with_suffix(suffix)
        if self._process_path:
            guard_files(outputs=[self._process_path, self._process_path.with_suffix(".json")])
            require_place_of_summary(self._process_path)

    def load_finished(self) -> Statistics | None:
        """The statistics in the file if no batch is missing; the first process reads them for all.

        Raises:
            ArgumentError: It is for another model, contains more batches, or contains a pass of one process, which
                several processes cannot continue.
            DataError: It is another kind of file.
        """
        content = b""
        with failing_together():
            if self._path and self._rank == 0 and self._path.is_file():
                loaded = _load_or_set_aside(self._path)
                content = loaded.to_bytes() if loaded else b""
        content = gather_bytes(content)[0]
        if not content:
            return None
        statistics = Statistics.from_bytes(content)
        self._require_same_model(statistics)
        if self.limit is not None and statistics.batches > self.limit and self._size == 1:
            raise ArgumentError(
                f"{self._path} holds {statistics.batches} batches, but {self.limit} were requested.",
                "request as many or more, or choose another file.",
            )
        if statistics.complete and statistics.limit in (None, self.limit):
            return statistics
        if self._size > 1:
            raise ArgumentError(
                f"{self._path} holds a pass of one process that is not complete.",
                "finish it with one process, or remove it.",
            )
        return None

    def load_begun(self) -> Statistics | None:
        """The statistics that an earlier run of this process saved.

        Raises:
            ArgumentError: They are of another model.
            DataError: It is another kind of file.
        """
        if self._process_path is None or not self._process_path.is_file():
            return None
        begun = _load_or_set_aside(self._process_path)
        if begun is None:
            return None
        self._require_same_model(begun)
        logger.info(
            "%s holds %d batches; continuing with the next", self._process_path, begun.batches
        )
        return begun

    def _require_same_model(self, statistics: Statistics) -> None:
        """Refuse statistics of another model."""
        if statistics.model != self._model:
            raise ArgumentError(
                f"{self._path} was collected with another model: names, formats or shapes differ.",
                "swap and rewire the model as in that run, or choose another file.",
            )

    def require_sources(self, earlier: Statistics | None, digest: str) -> None:
        """Refuse weights or a first batch that differ from those of the earlier run.

        Args:
            earlier: The statistics of that run, if there was one.
            digest: From `digest_sources`, of the weights and the first batch now.

        Raises:
            ArgumentError: They differ.
        """
        if earlier and earlier.data and earlier.data != digest:
            raise ArgumentError(
                f"{self._path} was collected with other weights or other data: their digest differs.",
                "give the same weights and the same batches in the same order (no shuffling without a seed), or "
                "remove the file, or choose another one.",
            )

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        if self._process_path is None:
            return False
        return time.monotonic() - self._saved_at >= _SAVE_SECONDS

    def save(self, statistics: Statistics) -> None:
        """Save the statistics of this process."""
        assert self._process_path is not None  # noqa: S101  # `is_due` has checked it
        statistics.save(self._process_path)
        self._saved_at = time.monotonic()

    def finish(self, statistics: Statistics) -> None:
        """Save the statistics of all processes in one file, and remove the file of each process."""
        with failing_together():
            if self._path and self._rank == 0:
                statistics.save(self._path)
        if self._process_path and self._process_path != self._path:
            self._process_path.unlink(missing_ok=True)


def _load_or_set_aside(path: Path) -> Statistics | None:
    """The statistics in a file; a damaged file is renamed, and the pass starts over.

    Raises:
        DataError: It is another kind of file.
    """
    try:
        return Statistics.load(path)
    except DataError as error:
        if _is_of_another_kind(path):
            raise
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        os.replace(path, aside)
        logger.warning(
            "%s It was renamed to %s, and everything is collected again.", error.message, aside.name
        )
        return None


def _is_of_another_kind(path: Path) -> bool:
    """Whether a file is undamaged but does not contain statistics: then it must not be changed."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return STATISTICS_FORMAT not in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False
