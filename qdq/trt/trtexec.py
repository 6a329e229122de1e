"""The exact trtexec commands that build and time a file on the target."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from qdq.trt.profiles import Profile

# The defaults of TensorRT 11; with them TensorRT 10 measures the same way.
_PARITY_WITH_11 = ("--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun")


def trtexec_lines(
    onnx: Path, engine: Path, profiles: Mapping[str, Profile], *, half: bool = False
) -> dict[str, str]:
    """Commands for a shell on the target, where TensorRT and its GPU are.

    Both also write, next to the engine, a timing cache, the list of layers, a profile and the times of each run.

    Args:
        onnx: The ONNX file with Q/DQ.
        engine: The file to which trtexec saves its engine.
        profiles: Input name -> `min`, `opt` and `max` shape, for dynamic inputs only.
        half: Whether the graph has float16 tensors. Then its own types decide in TensorRT 10 as well
            (`--stronglyTyped`); a float32 graph needs `--int8 --fp16` there. TensorRT 11 has no such flags.

    Returns:
        Command by major version: `tensorrt10` and `tensorrt11`.
    """
    file_flags = [f"--onnx={onnx}", f"--saveEngine={engine}", *_list_shape_flags(profiles)]
    type_flags = ["--stronglyTyped"] if half else ["--int8", "--fp16"]
    run_flags = [
        f"--timingCacheFile={engine.with_suffix('.timing.cache')}",
        "--memPoolSize=workspace:4096",  # MiB
        "--builderOptimizationLevel=3",
        "--profilingVerbosity=detailed",
        "--dumpLayerInfo",
        f"--exportLayerInfo={engine.with_suffix('.layers.json')}",
        "--dumpProfile",
        f"--exportProfile={engine.with_suffix('.profile.json')}",
        f"--exportTimes={engine.with_suffix('.times.json')}",
        "--warmUp=500",  # ms
        "--duration=10",  # s
    ]
    return {
        "tensorrt10": shlex.join(
            ["trtexec", *file_flags, *type_flags, *run_flags, *_PARITY_WITH_11]
        ),
        "tensorrt11": shlex.join(["trtexec", *file_flags, *run_flags]),
    }


def _list_shape_flags(profiles: Mapping[str, Profile]) -> list[str]:
    """`--minShapes=x:1x3x224x224 --optShapes=... --maxShapes=...`, nothing for static inputs."""
    if not profiles:
        return []
    flags = []
    for kind in ("min", "opt", "max"):
        shapes = []
        for name, profile in profiles.items():
            sizes = "x".join(map(str, profile[kind]))
            shapes.append(f"{name}:{sizes}")
        flags.append(f"--{kind}Shapes={','.join(shapes)}")
    return flags
