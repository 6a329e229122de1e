"""Measurements that survive `kill -9`: one line each, in files that several processes and several runs may share.

Each line has a checksum. One that is damaged, or of a version without checksums, is not used: what it says is measured
again. Nor is the line that a killed process left half written.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import IO, Any

from qdq.analyze.ranks import Ranks
from qdq.errors import ArgumentError

logger = logging.getLogger(__name__)


class Journal:
    """Measurements by key, of one fingerprint; those of others stay in the file and are not seen.

    Args:
        path: The file, made if it does not exist; None keeps nothing.
        fingerprint: What the measurements depend on: model, data, options.
        ranks: The processes that share the work; each but the first writes into a file of its own beside `path`, and
            each knows what any of them has read, for they may have other disks.

    Raises:
        ArgumentError: The file cannot be written.
    """

    def __init__(self, path: Path | None, fingerprint: str, ranks: Ranks) -> None:
        self._fingerprint = fingerprint
        self._known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        for other in (
            sorted(path.parent.glob(f"{glob.escape(path.stem)}*{glob.escape(path.suffix)}"))
            if path
            else ()
        ):
            self._known |= self._read(other)
        self._known = ranks.unite(self._known)
        if path is None:
            return
        own = path.with_suffix(f".{ranks.rank}{path.suffix}") if ranks.rank else path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_torn = (
                own.is_file() and own.stat().st_size > 0 and not own.read_bytes().endswith(b"\n")
            )
            self._file = own.open("a", encoding="utf-8")
            if is_torn:
                self._file.write("\n")
        except OSError as error:
            raise ArgumentError(
                f"cannot write {own}: {error.strerror or error}.",
                "choose a file that you may write to.",
            ) from error

    def _read(self, path: Path) -> dict[str, Any]:
        known: dict[str, Any] = {}
        unreadable, suspects = 0, set()
        text = ""
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                fingerprint, key, value = entry["fingerprint"], entry["key"], entry["value"]
                is_sound = entry.get("checksum") == _checksum(fingerprint, key, value)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if line.endswith("}"):  # another end is that of a killed process
                    unreadable += 1
                    known.clear()  # it may be a line that forgets
                continue
            if key is None and (fingerprint == self._fingerprint or not is_sound):
                known.clear()
            if fingerprint != self._fingerprint:
                continue
            if not is_sound:
                suspects.add(_as_key(key))
            elif key is not None:
                known[_as_key(key)] = value
        if count := unreadable + len(suspects - known.keys()):
            logger.warning(
                "%s: %d lines are damaged or of an earlier version; what they say is measured again",
                path,
                count,
            )
        return known

    def get(self, key: list[Any]) -> Any:
        """What was measured, None if nothing was."""
        return self._known.get(_as_key(key))

    def learn(self, key: list[Any], value: Any) -> None:
        """Know what another process measured, and has in its own file."""
        self._known[_as_key(key)] = value

    def add(self, key: list[Any], value: Any) -> None:
        """Keep a measurement; it is in the file when this returns."""
        self.learn(key, value)
        self._write(key, value)

    def forget(self) -> None:
        """Know nothing any more; nor does whoever reads the file later."""
        self._known.clear()
        self._write(None, None)

    def _write(self, key: list[Any] | None, value: Any) -> None:
        if self._file is not None:
            entry = {"fingerprint": self._fingerprint, "key": key, "value": value}
            entry["checksum"] = _checksum(**entry)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _as_key(key: list[Any]) -> str:
    return json.dumps(key)


def _checksum(fingerprint: Any, key: Any, value: Any) -> str:
    """What changes with any bit of a line, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([fingerprint, key, value]).encode()).hexdigest()[:16]
