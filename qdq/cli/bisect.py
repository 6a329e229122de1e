"""`qdq bisect`: which Q/DQ pair keeps a file from building, or changes its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts.types import PositiveInt


def bisect(
    onnx: Path,
    /,
    *,
    numbers: Path | None = None,
    backend: Literal["auto", "rtx", "tensorrt"] = "auto",
    sm: PositiveInt = 89,
    json: Path | None = None,
) -> int:
    """Find by halving which Q/DQ pairs keep a file from building. Needs no torch.

    Engines are built of copies that have only some of the pairs. With --numbers nothing is built: the pairs are found
    with which ONNX Runtime's default session computes something else than the file says (QDQ191). The exit code is 1 if
    the file fails.

    For example:

        qdq bisect model.onnx
        qdq bisect model.onnx --numbers samples.npz

    Args:
        onnx: The ONNX file with Q/DQ.
        numbers: File .npz with an array for each input, one batch.
        backend: rtx (TensorRT-RTX, needs no GPU), tensorrt (needs a GPU), or auto.
        sm: Compute capability that TensorRT-RTX builds for; 89 is 8.9.
        json: Also write the result to this file.
    """
    from qdq.bisect import bisect_pairs
    from qdq.cli.arrays import load_arrays
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.text import make_printable

    guard_command(inputs=[onnx, *list_data_files(onnx), numbers], outputs=[json])
    inputs = None if numbers is None else load_arrays(numbers)
    result = bisect_pairs(onnx, inputs=inputs, backend=backend, sm=sm)
    print(make_printable(result).format_table())
    if json is not None:
        write_json(json, result)
    return 1 if result.culprits or result.reason else 0
