"""`qdq bundle`: a folder that builds, checks and times a model on the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt


def bundle(
    source: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    inputs: Path | None = None,
    pairs: PositiveInt = 8,
    with_float: bool = False,
    archive: bool = False,
    json: Path | None = None,
) -> int:
    """Make a folder that builds, checks and times the model on the target. Needs no torch.

    The target needs TensorRT 8.6 or later with its trtexec, and a shell: `sh verify.sh` there builds the engine,
    compares its outputs, counts the layers in int8 and FP8, and measures the time. What it could not check it says.

    For example:

        qdq bundle runs/ptq -o bundle --with-float
        qdq bundle model.onnx -o bundle --inputs samples.npz --archive

    Args:
        source: Run folder, or an ONNX file with Q/DQ.
        output: Folder to write: new, empty, or an earlier bundle, which is replaced.
        inputs: File .npz with an array [N, ...] for each input. A run folder has samples of its own; an ONNX file needs
            them, and its references are then what ONNX Runtime computes. A file with a fixed batch of B takes B samples
            for each pair, and a scalar is the same in all pairs.
        pairs: Most number of samples.
        with_float: Also write the network without Q/DQ; only then can the target say whether the quantized
            engine is faster.
        archive: Also write OUTPUT.tar.gz.
        json: Also write the report to this file.
    """
    from qdq.bundle import make_bundle
    from qdq.bundle.folder import require_outside
    from qdq.cli.arrays import load_arrays
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command, list_run_files
    from qdq.text import make_printable

    guard_command(
        inputs=[*list_run_files(source), *list_data_files(source), inputs], outputs=[json]
    )
    samples = None
    if inputs is not None:
        require_outside(output, [inputs])
        samples = load_arrays(inputs)
    report = make_bundle(
        source, output, inputs=samples, count=pairs, with_float=with_float, archive=archive
    )
    print(make_printable(report).format_table())
    if json is not None:
        write_json(json, report)
    return 0
