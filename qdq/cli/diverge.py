"""`qdq diverge`: the first tensor in which a file or an engine differs from torch."""

from __future__ import annotations

from pathlib import Path

from cyclopts.types import PositiveInt


def diverge(
    run: Path,
    /,
    *,
    dumps: Path | None = None,
    samples: PositiveInt = 1,
    json: Path | None = None,
) -> int:
    """Name the first tensor in which the file of a run, or its engine, differs from the torch model, and why.

    Prints the input of every quantizer and the output of every layer with weights, in order of execution, with their
    distances in steps of their scales. Differences that come from rounding ties do not count. Without --dumps the file
    runs in ONNX Runtime, and the trtexec line that makes the dumps is printed. The exit code is 1 if a tensor differs.

    For example:

        qdq diverge runs/ptq
        qdq diverge runs/ptq --dumps bundle/dumps

    Args:
        run: Run folder of `qdq ptq` or `qdq qat`. Its model and data are loaded again as its settings say.
        dumps: Folder with the debug tensors that trtexec wrote; they are compared instead.
        samples: Number of calibration samples; of dumps there is one.
        json: Also write the table to this file.
    """
    import shlex

    from qdq.diverge.of_run import diverge_run
    from qdq.files import write_json
    from qdq.run import guard_command, list_run_files
    from qdq.text import make_printable

    guard_command(inputs=list_run_files(run), outputs=[json])
    result = diverge_run(run, dumps=dumps, samples=samples)
    print(make_printable(result.divergence).format_table())
    if result.trtexec:
        print("to compare an engine, make a bundle of the run (`qdq bundle`), and on the target")
        print("in a new folder dumps in it run the line of its TensorRT:")
        for version, flags in result.trtexec.items():
            print(f"TensorRT {version}: {shlex.join(['trtexec', *flags])}")
    if json is not None:
        write_json(json, result.divergence.list_facts())
    return 1 if result.divergence.beyond else 0
