"""Output files: what may be written where, atomic writes, JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdq.errors import ArgumentError


def write_atomic(path: Path, content: bytes | str | Callable[[], Iterable[bytes]]) -> Path:
    """Write a file so that at every moment it is absent, the old one or the whole new one.

    On Linux the new content lives in a nameless file until it is complete, so that even `kill -9` leaves
    nothing half-written behind; elsewhere in a hidden `.partial` file that is removed on any exception.

    Args:
        path: The file.
        content: All of it, or what gives it part by part where it is large; that is called again after a failure.

    Raises:
        ArgumentError: The folder cannot be written to.
    """
    data = content.encode() if isinstance(content, str) else content
    parts = (lambda: [data]) if isinstance(data, bytes) else data
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_nameless(partial, parts())
        except (AttributeError, OSError):  # no O_TMPFILE on this system or file system
            with partial.open("wb") as file:
                file.writelines(parts())
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def _write_nameless(path: Path, parts: Iterable[bytes]) -> None:
    """Write to an unnamed inode of the folder and link it under its name once it is whole."""
    descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
        # With a folder descriptor (unused: the path is absolute) Python calls linkat, which follows the link in /proc.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)


def require_writable(path: Path, *inputs: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is.

    Args:
        path: The file.
        inputs: Files that the work reads, and that must stay as they are.

    Raises:
        ArgumentError: It is a folder, its folder cannot be written to, or it is one of the inputs.
    """
    if path.resolve() in {each.resolve() for each in inputs}:
        raise ArgumentError(f"{path} is what is read; it would be lost.", "choose another file to write.")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ArgumentError:
    return ArgumentError(f"cannot write {path}: {error.strerror or error}.", "choose a file that you may write to.")


def to_jsonable(value: Any) -> Any:
    """Dataclasses, paths and numpy numbers as plain JSON values; what JSON has no word for becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return to_jsonable(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> Path:
    """Write a dataclass or plain value as indented JSON, atomically."""
    return write_atomic(path, json.dumps(to_jsonable(value), indent=2) + "\n")
