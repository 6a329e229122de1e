"""`qdq build`: an engine from an ONNX file, and the int8 census."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def build(
    onnx: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    backend: Literal["auto", "rtx", "tensorrt"] = "auto",
    sm: int = 89,
    min_shapes: str | None = None,
    opt_shapes: str | None = None,
    max_shapes: str | None = None,
    json: Path | None = None,
) -> int:
    """Build a TensorRT engine and say which layers run in int8. Needs no torch.

    Prints each layer that does not run in int8 with the reason, and the trtexec commands for the target.
    Exit code 1 when a quantized layer does not run in int8, 2 when no engine can be built.

    Such as:

        qdq build runs/ptq/model.onnx
        qdq build model.onnx -o model.engine --sm 86 --min-shapes x:1x3x224x224 --max-shapes x:32x3x224x224

    Args:
        onnx: ONNX file with Q/DQ.
        output: Engine file. Default: beside the ONNX file, ending in .rtx.engine or .engine.
        backend: rtx (TensorRT-RTX, no GPU needed), tensorrt (needs one), or auto.
        sm: Compute capability that TensorRT-RTX builds for, 89 for 8.9.
        min_shapes: Smallest shapes of dynamic inputs, INPUT:DIMxDIM...,INPUT:... Where only the batch is dynamic
            and no shapes are given: 1, 8 and 16.
        opt_shapes: Usual shapes of dynamic inputs, likewise.
        max_shapes: Largest shapes of dynamic inputs, likewise.
        json: Also write the report to this file.
    """
    from qdq.build import ENGINE_SUFFIXES, build_engine
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.text import MOST_CHARACTERS, make_printable, printable
    from qdq.trt.profiles import parse_shapes

    defaults = [onnx.with_suffix(suffix) for suffix in ENGINE_SUFFIXES.values()]
    engines = [output] if output else defaults
    guard_command(
        inputs=[onnx, *list_data_files(onnx)],
        outputs=[json, *engines],
        in_place=list(itertools.product(engines, defaults)),
    )
    shapes = [
        None if text is None else parse_shapes(text)
        for text in (min_shapes, opt_shapes, max_shapes)
    ]
    report = build_engine(
        onnx,
        output,
        backend=backend,
        sm=sm,
        min_shapes=shapes[0],
        opt_shapes=shapes[1],
        max_shapes=shapes[2],
    )
    print(make_printable(report).format_table())
    for version, command in report.trtexec.items():
        print(
            f"\n# on the target, TensorRT {version.removeprefix('tensorrt')}\n{printable(command, MOST_CHARACTERS)}"
        )
    if json is not None:
        write_json(json, report)
    return 1 if report.missing_int8 else 0
