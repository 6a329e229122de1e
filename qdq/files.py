"""Files: what a command may read, what it may write and replace; atomic writes; JSON."""

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
"""What `write_atomic` may leave behind where the process is killed, on systems without nameless files."""

_MOST_LINKS = 40  # as Linux itself
_READER_SECONDS = (
    10.0  # a FIFO that nobody has opened by then is an error, not a process that waits for ever
)

File = Path | str | None
"""A file of a command; None is an option that was not given."""


def as_path(value: Path | str, what: str) -> Path:
    """The path of a file or folder that was given as `what`.

    Raises:
        ArgumentTypeError: It is neither a path nor a text.
    """
    if not isinstance(value, str | Path):
        raise ArgumentTypeError(
            f"{what} is of type {type(value).__name__}.", "give a path or the name of a file."
        )
    return Path(value)


def guard_files(
    *,
    inputs: Iterable[File] = (),
    outputs: Iterable[File] = (),
    in_place: Collection[tuple[File, File]] = (),
) -> None:
    """Refuse what a command cannot read or write, and what it would destroy, before it does any work.

    Call it once, with all files that the command reads and all that it writes. Files are the same whatever they are
    called: a relative path, a symbolic or a hard link, another case where the file system ignores case.

    Args:
        inputs: Files and folders that are read. One that does not exist is left to its reader, which knows what it
            should hold.
        outputs: Files that are written. What is no regular file (a device, a FIFO, /dev/stdout) is written into.
        in_place: Pairs of an output and an input that it may replace.

    Raises:
        ArgumentError: An output is an input, another output, a folder, where this process prints to, or cannot be
            written to.
        DataError: An input is a device, a FIFO or a socket, or its name leads nowhere.
    """
    read = [Path(path) for path in inputs if path is not None]
    written = [Path(path) for path in outputs if path is not None]
    for path in read:
        _require_readable(path)
    for path in written:
        _require_writable(path)
    for output, path in itertools.product(written, read):
        if is_same_file(output, path) and not _is_pair(output, path, in_place):
            raise ArgumentError(
                f"{printable(output)} is what is read; it would be lost.", _OTHER_OUTPUT
            )
    for first, second in itertools.combinations(written, 2):
        if is_same_file(first, second) and not _is_character_device(first):
            raise ArgumentError(
                f"{printable(first)} is written twice; one result would be lost.", _OTHER_OUTPUT
            )


_OTHER_OUTPUT = "choose another file to write."


def _is_pair(output: Path, path: Path, pairs: Collection[tuple[File, File]]) -> bool:
    return any(
        (output, path) == (Path(first), Path(second)) for first, second in pairs if first and second
    )


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two names are of one file, which need not exist."""
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
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read {printable(path)}: {reason}.", "give the name of a file."
        ) from error


def read_mode(path: Path) -> int:
    """The mode of a file or folder that is going to be read.

    Raises:
        OSError: There is none; or a device, a FIFO or a socket, which may have no end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, f"it is a {_describe_kind(mode)}, not a file")
    return mode


def read_file(path: Path | str) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: It cannot be read; or a device, a FIFO or a socket, which may have no end.
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
        elif stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        elif stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, f"it is a {'socket' if stat.S_ISSOCK(mode) else 'disk'}")
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        elif _is_read_only(_find_descriptor(path)):
            raise PermissionError(errno.EBADF, "it is open for reading only")
        elif stat.S_ISREG(mode) and _find_descriptor(path) is None:
            _require_not_printed_to(path)
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def _find_mode(path: Path) -> int | None:
    """The mode of what a path leads to; None where there is nothing yet."""
    descriptor = _find_descriptor(path)
    try:
        return os.stat(path if descriptor is None else descriptor).st_mode
    except FileNotFoundError:
        return None


def _require_free_name(path: Path) -> None:
    """Refuse a new file whose folder cannot be made or written to, or whose name is too long."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()
    if hasattr(os, "pathconf"):
        most = os.pathconf(folder, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > most for part in path.relative_to(folder).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _require_not_printed_to(path: Path) -> None:
    """Refuse the file that the shell has redirected the output to: replaced, it would lose what is printed."""
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
    """The open file that a path such as /dev/stdout or /dev/fd/3 is of, None for every other path.

    The path has to be followed link by link: /dev/stdout leads on to the file that the shell has redirected it to.
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
    """Whether the open files of this process stand in a folder; those of another one have other numbers."""
    this_process = re.escape(os.path.realpath("/proc/self"))
    return (
        folder == "/dev/fd" or re.fullmatch(rf"{this_process}(/task/\d+)?/fd", folder) is not None
    )


def write_atomic(path: Path, content: bytes | str | Callable[[], Iterable[bytes]]) -> Path:
    """Write a file so that at every moment it is absent, the old one or the whole new one.

    On Linux the new content lives in a nameless file until it is complete, so that even `kill -9` leaves
    nothing half-written behind; elsewhere in a hidden `.partial` file that is removed on any exception. A symbolic
    link is followed, and a file that is replaced hands its mode and owner on. What is no regular file (a device, a
    FIFO, /dev/stdout) is written into.

    Args:
        path: The file.
        content: All of it, or what gives it part by part where it is large; that is called again after a failure. Of a
            text, what UTF-8 cannot write (a part of the name of a file) is escaped as in Python's strings.

    Raises:
        ArgumentError: It cannot be written.
        BrokenPipeError: It is the standard output, and nobody reads it any more.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    parts = (lambda: [data]) if isinstance(data, bytes) else data
    write = _replace if is_replaceable(path) else _write_into
    try:
        write(path, parts)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _find_descriptor(path) == 1:
            raise  # as of all that is printed: who reads has enough
        raise _unwritable(path, error) from error
    return path


def is_replaceable(path: Path) -> bool:
    """Whether `write_atomic` makes a new file there or replaces one; not where it writes into a device or the like.

    Raises:
        ArgumentError: The path leads nowhere.
    """
    try:
        mode = _find_mode(path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    return _find_descriptor(path) is None and (mode is None or stat.S_ISREG(mode))


def _replace(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    path = Path(os.path.realpath(path))
    # without the name of the file, which may be as long as a name may be
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
    """Write to an unnamed inode of the folder and link it under its name once it is whole."""
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
    with contextlib.suppress(OSError):  # another owner's file, in a folder of ours
        former = old.stat()
        if (former.st_uid, former.st_gid) != (new.stat().st_uid, new.stat().st_gid):
            os.chown(new, former.st_uid, former.st_gid)
    shutil.copymode(old, new)


def _write_into(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    """Write to what cannot be replaced; of an open file go on where it is, behind what was printed so far."""
    descriptor = _find_descriptor(path)
    if descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    with os.fdopen(
        os.dup(descriptor) if descriptor is not None else _open_for_writing(path), "wb"
    ) as file:
        file.writelines(parts())


def _open_for_writing(path: Path) -> int:
    """Open a device, or a FIFO as soon as somebody reads it."""
    deadline = time.monotonic() + _READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, "nobody reads it") from None
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def _unwritable(path: Path, error: OSError | ValueError) -> ArgumentError:
    reason = getattr(error, "strerror", None) or error
    return ArgumentError(
        f"cannot write {printable(path)}: {reason}.", "choose a file that you may write to."
    )


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
