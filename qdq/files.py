"""Files: which of them a command may read, write and replace; atomic writes; JSON."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdq.errors import ArgumentError, ArgumentTypeError, DataError
from qdq.text import printable

PARTIAL_GLOB = ".qdq-*.partial"
"""Files that `write_atomic` may leave behind if the process is killed, on systems without nameless files."""

_MOST_LINKS = 40  # as Linux itself
_READER_SECONDS = 10.0  # a FIFO that no process opens for reading within this time is an error
_OTHER_OUTPUT = "choose another file to write."

File = Path | str | None
"""A file of a command; None is an option without a value."""


def as_path(value: Path | str, option: str) -> Path:
    """Convert a parameter to a path.

    Args:
        value: The path of a file or folder.
        option: Name of the parameter, for messages.

    Raises:
        ArgumentTypeError: It is neither a path nor a string.
    """
    if not isinstance(value, str | Path):
        raise ArgumentTypeError(
            f"{option} is of type {type(value).__name__}; expected a path.",
            "pass a path or the name of a file.",
        )
    return Path(value)


def guard_files(
    *,
    inputs: Iterable[File] = (),
    outputs: Iterable[File] = (),
    in_place: Collection[tuple[File, File]] = (),
) -> None:
    """Refuse files that a command cannot read or write, or would destroy, before it does any work.

    Call it once, with all files that the command reads and all that it writes. It recognizes a file under any name: a
    relative path, a symbolic or a hard link, another case where the file system ignores case.

    Args:
        inputs: Files and folders that are read. One that does not exist is left to its reader, whose message says what
            the file should contain.
        outputs: Files that are written. If one is not a regular file (a device, a FIFO, /dev/stdout), it is not
            replaced but written into.
        in_place: Pairs of an output and an input that it may replace.

    Raises:
        ArgumentError: An output is an input, another output, a folder, the file to which this process prints, or cannot
            be written to.
        DataError: An input is a device, a FIFO or a socket, or its name leads nowhere.
    """
    input_paths = [Path(path) for path in inputs if path is not None]
    output_paths = [Path(path) for path in outputs if path is not None]
    for path in input_paths:
        _require_readable(path)
    for path in output_paths:
        _require_writable(path)
    for output, path in itertools.product(output_paths, input_paths):
        if is_same_file(output, path) and not _is_pair(output, path, in_place):
            raise ArgumentError(
                f"{printable(output)} is also an input of this command and would be overwritten.",
                _OTHER_OUTPUT,
            )
    for first, second in itertools.combinations(output_paths, 2):
        if is_same_file(first, second) and not _is_character_device(first):
            raise ArgumentError(f"{printable(first)} is the target of two outputs.", _OTHER_OUTPUT)


def _is_pair(output: Path, path: Path, pairs: Collection[tuple[File, File]]) -> bool:
    path_pairs = [(Path(first), Path(second)) for first, second in pairs if first and second]
    return (output, path) in path_pairs


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two names lead to the same file, which need not exist."""
    try:
        return os.path.samestat(first.stat(), second.stat())
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def _require_readable(path: Path) -> None:
    try:
        read_mode(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {printable(path)}: {_reason(error)}.", "pass the name of a file."
        ) from error


def read_mode(path: Path) -> int:
    """The mode of a file or folder that is about to be read.

    Raises:
        OSError: It does not exist, or is a device, a FIFO or a socket, which may have no end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, f"it is a {_describe_kind(mode)}, not a file")
    return mode


def read_file(path: Path | str) -> bytes:
    """Read the content of a regular file.

    Raises:
        OSError: It cannot be read, or is a device, a FIFO or a socket, which may have no end.
    """
    path = Path(path)
    read_mode(path)
    return path.read_bytes()


def _describe_kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "FIFO"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _require_writable(path: Path) -> None:
    try:
        mode = _find_mode(path)
        if mode is None:
            _require_free_name(Path(os.path.realpath(path)))
        else:
            _require_writable_mode(path, mode)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _require_writable_mode(path: Path, mode: int) -> None:
    """Refuse an existing path that cannot be written to.

    Raises:
        OSError: It cannot.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, "it is a socket")
    if stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a disk")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "Permission denied")
    descriptor = _find_descriptor(path)
    if _is_read_only(descriptor):
        raise PermissionError(errno.EBADF, "it is open for reading only")
    if stat.S_ISREG(mode) and descriptor is None:
        _require_not_printed_to(path)
        folder = os.path.dirname(os.path.realpath(path))
        tempfile.TemporaryFile(dir=folder).close()


def _find_mode(path: Path) -> int | None:
    """The mode of the file that a path leads to; None if there is none yet."""
    descriptor = _find_descriptor(path)
    try:
        return os.stat(path if descriptor is None else descriptor).st_mode
    except FileNotFoundError:
        return None


def _require_free_name(path: Path) -> None:
    """Refuse a new file whose folder cannot be created or written to, or whose name is too long."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()
    if hasattr(os, "pathconf"):
        most_bytes = os.pathconf(folder, "PC_NAME_MAX")
        for part in path.relative_to(folder).parts:
            if len(os.fsencode(part)) > most_bytes:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _require_not_printed_to(path: Path) -> None:
    """Refuse the file to which the shell redirects the output: replacing it would lose the printed lines."""
    for descriptor in (1, 2):
        try:
            is_same = os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError:  # it is closed
            continue
        if is_same:
            raise FileExistsError("the output of this command is printed to it")


def _is_character_device(path: Path) -> bool:
    return stat.S_ISCHR(_find_mode(path) or 0)


def _find_descriptor(path: Path) -> int | None:
    """The number of the open file for a path such as /dev/stdout or /dev/fd/3; None for every other path.

    The path is followed link by link: resolved as a whole, /dev/stdout leads to the file of the shell's redirection.
    """
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if _lists_descriptors(folder) and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def _is_read_only(descriptor: int | None) -> bool:
    if descriptor is None or os.name != "posix":
        return False
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def _lists_descriptors(folder: str) -> bool:
    """Whether a folder lists the open files of this process; those of another process have other numbers."""
    if folder == "/dev/fd":
        return True
    this_process = re.escape(os.path.realpath("/proc/self"))
    return re.fullmatch(rf"{this_process}(/task/\d+)?/fd", folder) is not None


def write_atomic(path: Path, content: bytes | str | Callable[[], Iterable[bytes]]) -> Path:
    """Write a file so that at every moment it is absent, the old file or the complete new file.

    On Linux the new content is in a nameless file until it is complete, so that even `kill -9` leaves nothing
    half-written behind. On other systems it is in a hidden `.partial` file, which is removed on any exception. Symbolic
    links are followed, and the new file gets the mode and owner of the file that it replaces. If the path is not a
    regular file (a device, a FIFO, /dev/stdout), the content is written into it.

    Args:
        path: The file.
        content: The whole content, or a function that yields the parts of a large one; it is called again if it
            fails. Characters of a string that UTF-8 cannot write (from file names) are escaped as in Python's strings.

    Raises:
        ArgumentError: It cannot be written.
        BrokenPipeError: It is the standard output, and it has no reader any more.
    """
    write = _replace if is_replaceable(path) else _write_into
    try:
        write(path, _as_parts(content))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _find_descriptor(path) == 1:
            raise  # as for all printed output: the reader wants no more
        raise _unwritable(path, error) from error
    return path


def _as_parts(
    content: bytes | str | Callable[[], Iterable[bytes]],
) -> Callable[[], Iterable[bytes]]:
    """A function that yields the content part by part."""
    if callable(content):
        return content
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content

    def parts() -> Iterable[bytes]:
        return [data]

    return parts


def is_replaceable(path: Path) -> bool:
    """Whether `write_atomic` creates or replaces a file there; it does not if it writes into a device or the like.

    Raises:
        ArgumentError: The path leads nowhere.
    """
    try:
        mode = _find_mode(path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    if _find_descriptor(path) is not None:
        return False
    return mode is None or stat.S_ISREG(mode)


def _replace(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    path = Path(os.path.realpath(path))
    # Without the name of the file, which may already have the maximum length.
    partial = path.with_name(PARTIAL_GLOB.replace("*", secrets.token_hex(4)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_nameless(partial, parts())
        except (AttributeError, OSError):  # no O_TMPFILE on this system or file system
            with partial.open("wb") as file:
                file.writelines(parts())
        _hand_on_mode(path, partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _write_nameless(path: Path, parts: Iterable[bytes]) -> None:
    """Write to an unnamed inode of the folder, and link it under its name once it is complete."""
    descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
        # With a folder descriptor (unused: the path is absolute) Python calls linkat, which follows the link in /proc.
        os.link(
            f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True
        )


def _hand_on_mode(old: Path, new: Path) -> None:
    if not old.exists():
        return
    with contextlib.suppress(OSError):  # another user's file in this user's folder
        old_status, new_status = old.stat(), new.stat()
        old_owner = (old_status.st_uid, old_status.st_gid)
        if old_owner != (new_status.st_uid, new_status.st_gid):
            os.chown(new, *old_owner)
    shutil.copymode(old, new)


def _write_into(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    """Write into a path that cannot be replaced; into an open file, after everything printed so far."""
    descriptor = _find_descriptor(path)
    if descriptor is None:
        target = _open_for_writing(path)
    else:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        target = os.dup(descriptor)
    with os.fdopen(target, "wb") as file:
        file.writelines(parts())


def _open_for_writing(path: Path) -> int:
    """Open a device, or a FIFO as soon as another process reads it."""
    deadline = time.monotonic() + _READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, "it has no reader") from None
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def _unwritable(path: Path, error: OSError | ValueError) -> ArgumentError:
    return ArgumentError(
        f"cannot write {printable(path)}: {_reason(error)}.", "choose a file that you may write to."
    )


def _reason(error: OSError | ValueError) -> object:
    """The system's text for an error, or the error itself if it has none."""
    return getattr(error, "strerror", None) or error


def to_jsonable(value: Any) -> Any:
    """Convert dataclasses, paths and numpy numbers to plain JSON values; NaN and infinity become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
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
