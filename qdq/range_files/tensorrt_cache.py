"""TensorRT's calibration cache: a header, then a line for each tensor with its scale.

    TRT-101401-EntropyCalibration2
    input: 3c010a14

The header is `TRT-VERSION-ALGORITHM`; tools that write caches for any version of a generation write `8XXX` there.
The number is the big-endian float32 scale (amax / 127) in hexadecimal, without leading zeros; 0 if calibration found no
range. TensorRT up to 10 reads it for implicit quantization; it has no weights.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from qdq.errors import CalibrationError
from qdq.range_files.entry import Entry, add_entry, entry_of_codes, malformed
from qdq.range_files.format import Row, decode

_HEADER = "TRT-101401-EntropyCalibration2"  # of TensorRT 10.14.1; other versions expect their own number there
_LINE = re.compile(r"(?P<name>.+):\s*(?P<digits>[0-9a-fA-F]+)")


def recognize(content: bytes) -> bool:
    """Whether the first line is that of a calibration cache."""
    return re.match(rb"(\xef\xbb\xbf)?TRT-\w+-\w+", content) is not None


def read(content: bytes) -> dict[str, Entry]:
    """The entries by tensor name.

    Raises:
        CalibrationError: Not such a file, a line of another form, or two scales for one tensor.
    """
    header, *lines = decode(content).splitlines() or [""]
    if not recognize(header.encode()):
        raise malformed(
            "line 1",
            f"a calibration cache begins with TRT-VERSION-ALGORITHM, found {header[:60]!r}",
        )
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or len(match["digits"]) > 8:
            raise malformed(
                f"line {number}",
                f"expected 'TENSOR: up to 8 hexadecimal digits', found {line[:60]!r}",
            )
        (scale,) = struct.unpack("!f", bytes.fromhex(match["digits"].zfill(8)))
        place = f"line {number} ({match['name']})"
        add_entry(entries, match["name"], entry_of_codes(scale, 0, -128, 127), place)
    return entries


def write(rows: Sequence[Row]) -> str:
    """The content of a calibration cache.

    Args:
        rows: The tensors with their scales.

    Raises:
        CalibrationError: A tensor name with a line break.
    """
    lines = [_HEADER]
    for row in rows:
        if "\n" in row.tensor or "\r" in row.tensor:
            raise CalibrationError(
                f"the tensor name {row.tensor!r} contains a line break, which a calibration cache cannot represent.",
                "rename the tensor in the ONNX file.",
            )
        lines.append(f"{row.tensor}: {struct.pack('!f', float(row.scale)).hex()}")
    return "\n".join(lines) + "\n"
