"""`qdq check`."""

from __future__ import annotations

from pathlib import Path


def check(onnx: Path, /, *, json: Path | None = None) -> int:
    """Is a QDQ ONNX file valid, and its Q/DQ as TensorRT wants it? Needs no torch.

    Prints what the file holds, then each broken rule (QDQ101 ...) with the node and the fix. A file without Q/DQ is
    valid; that nothing in it is quantized is said. Exit code 1 when a rule is broken, 2 when the file is no ONNX.

    Such as:

        qdq check runs/ptq/model.onnx --json check.json

    Args:
        onnx: The ONNX file.
        json: Also write the report to this file.
    """
    from qdq.check import check_onnx
    from qdq.run import require_writable, write_json

    if json is not None:
        require_writable(json)
    report = check_onnx(onnx)
    print(report.format_table())
    if json is not None:
        write_json(json, report)
    return 1 if report.findings else 0
