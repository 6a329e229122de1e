"""Arrays from an `.npz` file on the command line."""

from __future__ import annotations

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qdq.errors import DataError
from qdq.metrics import Array
from qdq.text import printable

_FIX = "write it with numpy.savez(FILE, NAME=array), one array [N, ...] for each input."


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` file by name.

    Raises:
        DataError: It cannot be read, or is another kind of file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {printable(path)} as .npz: {error}.", _FIX) from error
