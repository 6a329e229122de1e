"""Inputs of a model and the outputs that belong to them, in a file. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

from qdq.errors import DataError
from qdq.files import read_file, write_atomic
from qdq.metrics import Array
from qdq.text import printable

_FORMAT = "qdq references 1"
_FORMAT_KEY = "format"
_MODEL_KEY = "model_sha256"
_FIX = "run the recipe again, or give inputs."


@dataclass(frozen=True)
class Pair:
    """One set of inputs and its outputs.

    Args:
        inputs: Input name -> what the ONNX file takes.
        quantized: Output name -> the output of the quantized model.
        float: Output name -> that of the model with all quantizers off; empty if it is not known.
    """

    inputs: Mapping[str, Array]
    quantized: Mapping[str, Array]
    float: Mapping[str, Array]


class StoredPairs(NamedTuple):
    """The content of a file of pairs.

    Args:
        pairs: The pairs.
        model_sha256: Digest of the ONNX file that they belong to.
    """

    pairs: list[Pair]
    model_sha256: str


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return sha256(read_file(path)).hexdigest()


def save_pairs(pairs: Sequence[Pair], path: Path, onnx: Path) -> Path:
    """Write pairs as safetensors, atomically.

    Args:
        pairs: The pairs.
        path: The file.
        onnx: The file that takes the inputs; its digest is written as well.
    """
    arrays = {}
    for number, pair in enumerate(pairs):
        for role in ("inputs", "quantized", "float"):
            for name, array in getattr(pair, role).items():
                arrays[f"{number}/{role}/{name}"] = array
    metadata = {_FORMAT_KEY: _FORMAT, _MODEL_KEY: digest_file(onnx)}
    return write_atomic(path, safetensors.save(arrays, metadata))


def load_pairs(path: Path) -> StoredPairs:
    """Read a file that `save_pairs` wrote.

    Raises:
        DataError: It cannot be read or is another kind of file.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {printable(path)}: {printable(error)}.", _FIX) from error
    if metadata.get(_FORMAT_KEY) != _FORMAT:
        raise DataError(
            f"{printable(path)} is not a file of references: its format is "
            f"{metadata.get(_FORMAT_KEY)!r}, expected {_FORMAT!r}.",
            _FIX,
        )
    parts: dict[int, dict[str, dict[str, Array]]] = {}
    for key, array in arrays.items():
        number, role, name = key.split("/", 2)
        roles = parts.setdefault(int(number), {"inputs": {}, "quantized": {}, "float": {}})
        roles[role][name] = array
    pairs = [Pair(**roles) for _, roles in sorted(parts.items())]
    return StoredPairs(pairs, metadata[_MODEL_KEY])
