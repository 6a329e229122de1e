"""`qdq build`: an engine from an ONNX file, and the layers that run in int8."""

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
    """Build a TensorRT engine and list the layers that run in int8. Needs no torch.

    Prints each layer that does not run in int8 with the reason, and the trtexec commands for the target.
    The exit code is 1 when a quantized layer does not run in int8, and 2 when no engine can be built.

    For example:

        qdq build runs/ptq/model.onnx
        qdq build model.onnx -o model.engine --sm 86 --min-shapes x:1x3x224x224 --max-shapes x:32x3x224x224

    Args:
        onnx: ONNX file with Q/DQ.
        output: Engine file; by default next to the ONNX file, with a name that ends in .rtx.engine or .engine.
        backend: rtx (TensorRT-RTX, needs no GPU), tensorrt (needs a GPU), or auto.
        sm: Compute capability that TensorRT-RTX builds for; 89 is 8.9.
        min_shapes: Smallest shapes of dynamic inputs: INPUT:DIMxDIM...,INPUT:... Required if more than the batch is
            dynamic; by default a batch of 1.
        opt_shapes: Usual shapes of dynamic inputs; by default a batch of 8.
        max_shapes: Largest shapes of dynamic inputs; by default a batch of 16.
        json: Also write the report to this file.
    """
    from qdq.build import build_engine
    from qdq.files import write_json
    from qdq.text import MOST_CHARACTERS, make_printable, printable

    _guard_files(onnx, output, json)
    report = build_engine(
        onnx,
        output,
        backend=backend,
        sm=sm,
        min_shapes=_parse_option(min_shapes),
        opt_shapes=_parse_option(opt_shapes),
        max_shapes=_parse_option(max_shapes),
    )
    print(make_printable(report).format_table())
    for version, command in report.trtexec.items():
        print(f"\n# on the target, TensorRT {version.removeprefix('tensorrt')}")
        print(printable(command, MOST_CHARACTERS))
    if json is not None:
        write_json(json, report)
    return 1 if report.missing else 0


def _guard_files(onnx: Path, output: Path | None, json: Path | None) -> None:
    from qdq.build import ENGINE_SUFFIXES
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command

    default_engines = [onnx.with_suffix(suffix) for suffix in ENGINE_SUFFIXES.values()]
    engines = default_engines if output is None else [output]
    guard_command(
        inputs=[onnx, *list_data_files(onnx)],
        outputs=[json, *engines],
        in_place=list(itertools.product(engines, default_engines)),
    )


def _parse_option(text: str | None) -> dict[str, tuple[int, ...]] | None:
    from qdq.trt.profiles import parse_shapes

    return None if text is None else parse_shapes(text)
