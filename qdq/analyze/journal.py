"""Measurements that survive `kill -9`: one line each, in files that processes and runs may share.

Each line has a checksum. A line that is damaged, incomplete or without a checksum (from an earlier version) is not
used: its value is measured again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qdq.analyze.ranks import Ranks
from qdq.errors import ArgumentError

logger = logging.getLogger(__name__)


class Journal:
    """Measurements by key, for one fingerprint; those of other fingerprints stay in the file and are ignored.

    Args:
        path: The file, created if it does not exist; None stores nothing.
        fingerprint: Identifies everything that the measurements depend on: model, data, options.
        ranks: The processes that share the work. Each except the first writes to its own file next to `path`. All of
            them get everything that any of them has read, because they may have different disks.

    Raises:
        ArgumentError: The file cannot be written.
    """

    def __init__(self, path: Path | None, fingerprint: str, ranks: Ranks) -> None:
        self._fingerprint = fingerprint
        self._values: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if path is not None:
            for file in _find_files(path):
                self._values |= self._read(file)
        self._values = ranks.unite(self._values)
        if path is not None:
            self._file = _open_to_append(_file_of_rank(path, ranks.rank))

    def get(self, key: list[Any]) -> Any:
        """The measured value, or None."""
        return self._values.get(_as_key(key))

    def learn(self, key: list[Any], value: Any) -> None:
        """Remember a measurement that another process has stored in its file."""
        self._values[_as_key(key)] = value

    def add(self, key: list[Any], value: Any) -> None:
        """Store a measurement; it is in the file when this returns."""
        self.learn(key, value)
        self._write(key, value)

    def forget(self) -> None:
        """Drop all measurements, also for later readers of the file."""
        self._values.clear()
        self._write(None, None)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> dict[str, Any]:
        """Read the intact measurements of this fingerprint from a file.

        A warning gives the number of damaged lines.
        """
        values: dict[str, Any] = {}
        unreadable = 0
        suspects: set[str] = set()
        for line in _read_lines(path):
            entry = _parse(line)
            if entry is None:
                if line.endswith("}"):  # otherwise a killed process left it incomplete
                    unreadable += 1
                    values.clear()  # it may be a line that drops all earlier ones
                continue

            is_relevant = entry.fingerprint == self._fingerprint
            if entry.key is None and (is_relevant or not entry.is_sound):
                values.clear()
            if not is_relevant:
                continue
            if not entry.is_sound:
                suspects.add(_as_key(entry.key))
            elif entry.key is not None:
                values[_as_key(entry.key)] = entry.value

        unusable = unreadable + len(suspects - values.keys())
        if unusable:
            logger.warning(
                "%s: %d lines are damaged or of an earlier version; their values are measured again",
                path,
                unusable,
            )
        return values

    def _write(self, key: list[Any] | None, value: Any) -> None:
        """Append a line, and wait until it is on the disk."""
        if self._file is None:
            return
        entry = {"fingerprint": self._fingerprint, "key": key, "value": value}
        entry["checksum"] = _checksum(**entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class _Entry:
    """A line of a journal.

    Args:
        fingerprint: What the measurement depends on.
        key: Key of the measurement; None drops all measurements before it.
        value: The measurement.
        is_sound: Whether the checksum matches.
    """

    fingerprint: Any
    key: Any
    value: Any
    is_sound: bool


def _parse(line: str) -> _Entry | None:
    """The entry in a line.

    Returns:
        None if the line is not JSON, or has another form.
    """
    try:
        content = json.loads(line)
        fingerprint, key, value = content["fingerprint"], content["key"], content["value"]
        is_sound = content.get("checksum") == _checksum(fingerprint, key, value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _Entry(fingerprint, key, value, is_sound)


def _find_files(path: Path) -> list[Path]:
    """The files of all processes, sorted by name."""
    pattern = f"{glob.escape(path.stem)}*{glob.escape(path.suffix)}"
    return sorted(path.parent.glob(pattern))


def _file_of_rank(path: Path, rank: int) -> Path:
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a file; none if it cannot be read."""
    with contextlib.suppress(OSError):
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def _open_to_append(path: Path) -> IO[str]:
    """Open a file for new lines; an incomplete line of a killed process is ended first.

    Raises:
        ArgumentError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = path.is_file() and path.stat().st_size > 0 and not _ends_a_line(path)
        file = path.open("a", encoding="utf-8")
        if is_torn:
            file.write("\n")
    except OSError as error:
        raise ArgumentError(
            f"cannot write {path}: {error.strerror or error}.",
            "choose a file that you may write to.",
        ) from error
    return file


def _ends_a_line(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


def _as_key(key: list[Any]) -> str:
    return json.dumps(key)


def _checksum(fingerprint: Any, key: Any, value: Any) -> str:
    """A hash that changes with any bit of the content, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([fingerprint, key, value]).encode()).hexdigest()[:16]
