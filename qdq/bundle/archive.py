"""A folder as a `.tar.gz` whose bytes depend on nothing but names and contents."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from qdq.files import write_atomic

_FILE_MODE = 0o644
_SCRIPT_MODE = 0o755


def place_archive(folder: Path) -> Path:
    """The archive of a folder, beside it: `FOLDER.tar.gz`."""
    folder = folder.resolve()  # "." has no name
    return folder.with_name(f"{folder.name}.tar.gz")


def write_archive(folder: Path, names: list[str], path: Path) -> Path:
    """Write files of a folder into an archive, below the name of the folder.

    Owner, times and order are fixed, so equal files give equal bytes. Names may have any length, which needs the
    format of GNU.

    Args:
        folder: The folder.
        names: The files, relative to it.
        path: The archive.
    """
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name in sorted(names):
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{folder.resolve().name}/{name}")
            entry.size = len(content)
            entry.mode = _SCRIPT_MODE if name.endswith((".sh", ".py")) else _FILE_MODE
            archive.addfile(entry, io.BytesIO(content))
    return write_atomic(path, packed.getvalue())
