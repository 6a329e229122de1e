"""`qdq check`."""

from __future__ import annotations

from pathlib import Path


def check(onnx: Path, /, *, json: Path | None = None) -> int:
    """Check a QDQ ONNX file: valid ONNX, and Q/DQ as TensorRT wants it. Needs no torch.

    Args:
        onnx: The file.
        json: Also write the report there.
    """
    from qdq.check import check_onnx
    from qdq.run import write_json

    report = check_onnx(onnx)
    print(report.format_table())
    if json:
        write_json(json, report)
    return 1 if report.findings else 0
