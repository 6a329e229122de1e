"""The folder of a bundle: which one may be written to, and how an earlier bundle is replaced."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from qdq.bundle.commands import RESULTS
from qdq.errors import ArgumentError, DataError
from qdq.files import write_atomic
from qdq.pairs import digest_file
from qdq.schema import read_json, validate
from qdq.text import printable

BUNDLE_FORMAT = "qdq bundle 1"
EXPECTED_FILE = "expected.json"
RESULT_FILE = "result.json"

_FIX = "choose another folder with -o."
# ASCII: JSON escapes other letters, which verify.sh does not read.
_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


class _Listing(TypedDict):
    """The fields of `expected.json` that are read again."""

    format: str
    files: dict[str, str]


def require_place(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier bundle.

    Raises:
        ArgumentError: It is a file, or has files and is not a bundle.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArgumentError(f"{printable(folder)} is not a folder.", _FIX)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if _read_listing(folder) is None:
        raise ArgumentError(
            f"{printable(folder)} holds files and is not a bundle: it has no {EXPECTED_FILE} that qdq wrote.",
            _FIX,
        )


def require_outside(folder: Path, inputs: Iterable[Path]) -> None:
    """Refuse inputs of the command in the folder of the bundle, which would replace them.

    Raises:
        ArgumentError: One is in the folder, or is the folder.
    """
    for path in inputs:
        resolved = path.resolve()
        if folder.resolve() in (resolved, *resolved.parents):
            raise ArgumentError(
                f"{printable(path)} is in {printable(folder)}, the folder that is written, and could be overwritten.",
                _FIX,
            )


def name_arrays(folder: Path, pair: int, names: Iterable[str]) -> dict[str, Path]:
    """Name of each input or output of a pair -> its raw file, `NUMBER.POSITION.NAME.bin`.

    Args:
        folder: The folder of the files.
        pair: Number of the pair.
        names: In the order in which `load_pairs` has them.
    """
    files = {}
    for position, name in enumerate(names):
        files[name] = folder / f"{pair}.{position}.{_UNSAFE.sub('_', name)}.bin"
    return files


def list_digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, relative to it and in order -> its SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}


def replace_folder(staged: Path, folder: Path) -> dict[str, int]:
    """Move the files of a new bundle into its folder, and remove those of an earlier one and its results.

    While it works, `expected.json` lists the files of both. So after an interruption the folder can be replaced again,
    and `verify.sh` in it says that files are missing.

    Args:
        staged: The new bundle, complete, on the same file system.
        folder: The folder; `require_place` has accepted it.

    Returns:
        File, relative to the folder -> bytes.
    """
    listing = _read_listing(folder) if folder.exists() else None
    digests = list_digests(staged)
    former = {} if listing is None else listing["files"]
    unfinished = {"format": BUNDLE_FORMAT, "files": {**former, **digests}}
    folder.mkdir(exist_ok=True)
    write_atomic(folder / EXPECTED_FILE, json.dumps(unfinished, indent=1) + "\n")
    for name in [*former, RESULT_FILE] if listing is not None else []:
        path = folder / name
        if path.is_file() and folder.resolve() in path.resolve().parents:
            path.unlink()
    if listing is not None:
        shutil.rmtree(folder / RESULTS, ignore_errors=True)

    del digests[EXPECTED_FILE]
    sizes = {}
    for name in [*digests, EXPECTED_FILE]:  # the listing of both goes last
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(target)
        sizes[name] = target.stat().st_size
    return sizes


def find_parent(folder: Path) -> Path:
    """The innermost folder above that exists; the new bundle is written there first.

    Raises:
        ArgumentError: It cannot be written to.
    """
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"cannot write {printable(folder)}: {error.strerror}.", _FIX) from error
    return parent


def _read_listing(folder: Path) -> Any:
    """The fields of `expected.json` in a folder; None if there is none that qdq wrote."""
    path = folder / EXPECTED_FILE
    try:
        listing = validate(_Listing, read_json(path, _FIX), str(path), _FIX)
    except DataError:
        return None
    return listing if listing["format"] == BUNDLE_FORMAT else None
