"""The interface of a file format of ranges, and the functions that the formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from qdq import schema
from qdq.errors import CalibrationError, DataError
from qdq.formats import Format
from qdq.quantize import compute_scale
from qdq.range_files.entry import Entry, Floats, malformed

METADATA_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
"""Exceptions that parsing the metadata of a foreign ONNX file can raise."""


@dataclass(frozen=True)
class Row:
    """One tensor in a file that is written.

    Args:
        tensor: Its name.
        amax: The range: 0-D, or one number per channel.
        axis: The axis of the channels, None for one range.
        is_weight: Whether it is a weight.
        format: The format of the codes.
        dequantize: The DequantizeLinear of its pair in the ONNX file, if there is one.
    """

    tensor: str
    amax: Floats
    axis: int | None
    is_weight: bool
    format: Format
    dequantize: ir.Node | None = None

    @property
    def scale(self) -> Floats:
        """The scale of the range, in its shape."""
        return compute_scale(torch.from_numpy(self.amax.copy()), self.format).numpy()


@dataclass(frozen=True)
class FileFormat:
    """A format of range files that name tensors.

    Args:
        recognize: Whether the content of a file is in this format.
        read: Reads the entries of a file.
        write: Writes rows to a file.
    """

    recognize: Callable[[bytes], bool]
    read: Callable[[bytes], dict[str, Entry]]
    write: Callable[[Sequence[Row]], str]


def decode(content: bytes) -> str:
    """The text of a file.

    Raises:
        CalibrationError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise malformed("the file", f"byte {error.start} is not UTF-8 text") from None


def parse_json(content: bytes) -> Any:
    """The value of a JSON file; NaN and Infinity count as numbers, because other tools write them.

    Raises:
        CalibrationError: It is not JSON, cut off, or has two values for one key.
    """
    try:
        return schema.parse_json(decode(content), "the file", "", finite=False)
    except DataError as error:
        raise CalibrationError(
            error.message,
            "write the file again with that tool, and copy all of it; it may have been joined from two files.",
        ) from error
