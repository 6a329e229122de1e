"""Debug tensors that trtexec has written: one `.npy` file a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qdq.errors import DataError
from qdq.graph.pairs import constant_of, is_op
from qdq.metrics import Array
from qdq.text import list_names, printable

# trtexec (samples/common/debugTensorWriter.cpp of TensorRT 10.13 to 11): NNNN_NAME.npy in the order of execution, with
# an underscore for every other character. Types that numpy lacks are converted, and the name says so.
_FILE = re.compile(r"(?:\d{4,}_)?(?P<name>.+?)(?:_to_float|_to_int8)?\.npy")
_UNSAFE = re.compile(r"[^A-Za-z0-9._,-]")
_NUMBERS = "biuf"  # kinds of numpy
_FIX = "make them with the trtexec line that `qdq diverge RUN` prints, and give the folder in which it ran."


def list_debug_tensors(model: ir.Model) -> list[str]:
    """The tensors that an engine should dump: what the Q of activations read, and their codes."""
    inputs, codes = [], []
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        if not is_op(node, "QuantizeLinear") or value is None or constant_of(value) is not None:
            continue
        if value.producer() is not None:  # trtexec has no debug tensors for inputs of the network
            inputs.append(str(value.name))
        codes.append(str(node.outputs[0].name))
    return [*dict.fromkeys(inputs), *codes]


@dataclass(frozen=True)
class Dumps:
    """The content of a folder.

    Args:
        tensors: Name of a tensor of the file -> its values in the first run.
        ignored: Files that were not recognised, each with the reason.
    """

    tensors: dict[str, Array]
    ignored: tuple[str, ...]


def read_dumps(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Dumps:
    """Read the dumps in a folder.

    Args:
        folder: The folder.
        shapes: Name of each tensor that is looked for -> its shape for the sample; others are left out.

    Raises:
        DataError: There is no such folder, or it holds no dump of these tensors with these shapes.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {printable(folder)}.", _FIX)
    by_file_name = {_UNSAFE.sub("_", name): name for name in shapes}
    tensors: dict[str, Array] = {}
    ignored = []
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        name = by_file_name.get(match["name"]) if match else None
        if name is None:
            ignored.append(f"{printable(path.name)}: no tensor of the file has this name")
            continue
        if name in tensors:
            continue  # of a later run
        array = _read_array(path)
        if array.shape == shapes[name]:
            tensors[name] = array
            continue
        ignored.append(
            f"{printable(path.name)}: its shape is {list(array.shape)}, for the first sample it is {list(shapes[name])}"
        )
    if not tensors:
        raise DataError(
            f"{printable(folder)} holds no dump of a tensor of the file: "
            f"{list_names(ignored, 3, '; ') or 'it is empty'}.",
            _FIX,
        )
    return Dumps(tensors, tuple(ignored))


def _read_array(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {printable(path)}: {printable(error)}.", _FIX) from error
    if array.dtype.kind not in _NUMBERS:
        raise DataError(
            f"the type of {printable(path)} is {array.dtype}, expected numbers or booleans.", _FIX
        )
    return array
