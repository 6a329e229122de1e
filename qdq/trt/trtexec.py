"""The exact trtexec commands that build, time and check a file on the target."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdq.errors import ArgumentError
from qdq.trt.flags import HALF_SCALES, HIGHEST_OPSET_OF_8, Version, select_flags
from qdq.trt.profiles import Profile, Shape

RELEASES: Mapping[str, Version] = {
    "tensorrt8.6": (8, 6),
    "tensorrt10": (10, 0),
    "tensorrt11": (11, 0),
}
"""Key of a report -> the oldest of the versions that its line serves."""

_BUILD_FLAGS = (
    "--memPoolSize=workspace:4096",  # MiB
    "--builderOptimizationLevel=3",
    "--profilingVerbosity=detailed",
    "--dumpLayerInfo",
    "--dumpProfile",
    "--warmUp=500",  # ms
    "--duration=10",  # s
    # The defaults of TensorRT 11; with them earlier versions measure the same way.
    "--useCudaGraph",
    "--useSpinWait",
    "--noDataTransfers",
    "--separateProfileRun",
)

_RUN_ONCE_FLAGS = (
    "--warmUp=0",
    "--duration=0",
    "--iterations=1",
    "--includeDataTransfers",  # by default TensorRT 11 copies no outputs while it measures
)


@dataclass(frozen=True)
class Pair:
    """Files of one set of inputs and the outputs that belong to them.

    Args:
        inputs: Input name -> raw file: little-endian bytes in C order, of the type of the input, no header.
        references: Output name -> likewise.
        shapes: Dynamic input -> its sizes. trtexec refuses shapes of other inputs.
    """

    inputs: Mapping[str, Path]
    references: Mapping[str, Path]
    shapes: Mapping[str, Shape]


def trtexec_lines(
    onnx: Path,
    engine: Path,
    profiles: Mapping[str, Profile],
    *,
    half: bool = False,
    opset: int = HIGHEST_OPSET_OF_8,
) -> dict[str, str]:
    """Commands for a shell on the target, where TensorRT and its GPU are.

    All also write, next to the engine, a timing cache, the list of layers, a profile and the times of each run.

    Args:
        onnx: The ONNX file with Q/DQ.
        engine: The file to which trtexec saves its engine.
        profiles: Input name -> `min`, `opt` and `max` shape, for dynamic inputs only.
        half: Whether the graph has float16 tensors (see `build_flags`).
        opset: The ONNX opset of the file.

    Returns:
        Command by key of `RELEASES`; without TensorRT 8.6 if it cannot read the file.
    """
    lines = {}
    for name, version in RELEASES.items():
        if version < HALF_SCALES and (half or opset > HIGHEST_OPSET_OF_8):
            continue
        flags = build_flags(onnx, engine, profiles, version, half=half)
        lines[name] = shlex.join(["trtexec", *flags])
    return lines


def build_flags(
    onnx: Path,
    engine: Path,
    profiles: Mapping[str, Profile],
    version: Version,
    *,
    half: bool = False,
    quantized: bool = True,
) -> list[str]:
    """Flags that build an engine, time it, and write its layers, profile and times next to it.

    Args:
        onnx: The ONNX file.
        engine: The file to which trtexec saves its engine.
        profiles: Input name -> `min`, `opt` and `max` shape, for dynamic inputs only.
        version: Major and minor version of TensorRT.
        half: Whether the graph has float16 tensors. Then its own types decide before TensorRT 11 as well
            (`--stronglyTyped`); a float32 graph needs `--int8 --fp16` there. TensorRT 11 needs no such flags.
        quantized: Whether the graph has Q/DQ. Without, `--int8` would give the layers ranges out of the air and run
            them in int8, so the flag is left out.

    Raises:
        ArgumentError: The version cannot read a graph with float16 scales.
    """
    if half and version < HALF_SCALES:
        raise ArgumentError(
            f"TensorRT {version[0]}.{version[1]} has no float16 scales.",
            "export with precision 'fp32'.",
        )
    flags = [
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        *_list_profile_flags(profiles),
        *_list_type_flags(half=half, quantized=quantized),
        f"--timingCacheFile={engine.with_suffix('.timing.cache')}",
        f"--exportLayerInfo={engine.with_suffix('.layers.json')}",
        f"--exportProfile={engine.with_suffix('.profile.json')}",
        f"--exportTimes={engine.with_suffix('.times.json')}",
        *_BUILD_FLAGS,
    ]
    return select_flags(flags, version)


def debug_flags(
    onnx: Path, tensors: Sequence[str], pair: Pair, version: Version, *, half: bool = False
) -> list[str]:
    """Flags that build an engine, run it once on the inputs of a pair, and write inner tensors as `.npy`.

    Debug tensors leave the kernels of the engine as they are, unlike outputs of the network.

    Args:
        onnx: The ONNX file with Q/DQ.
        tensors: Names of the tensors.
        pair: Its inputs are loaded.
        version: Major and minor version of TensorRT, `flags.DEBUG_TENSORS` or later.
        half: As for `build_flags`.
    """
    profiles = {
        name: {"min": shape, "opt": shape, "max": shape} for name, shape in pair.shapes.items()
    }
    flags = [
        f"--onnx={onnx.as_posix()}",
        *_list_profile_flags(profiles),
        *_list_shape_flags(pair),
        *_list_type_flags(half=half, quantized=True),
        f"--loadInputs={_join_files(pair.inputs)}",
        f"--markDebug={','.join(tensors)}",
        "--saveAllDebugTensors=numpy",
        *_RUN_ONCE_FLAGS,
    ]
    return select_flags(flags, version)


def run_flags(engine: Path, pair: Pair, outputs: Path, version: Version) -> list[str]:
    """Flags that run a saved engine once on the inputs of a pair and write its outputs as JSON.

    Args:
        engine: The engine.
        pair: Its inputs are loaded.
        outputs: The file that is written.
        version: Major and minor version of TensorRT.
    """
    flags = [
        f"--loadEngine={engine}",
        *_list_shape_flags(pair),
        f"--loadInputs={_join_files(pair.inputs)}",
        f"--exportOutput={outputs}",
        *_RUN_ONCE_FLAGS,
    ]
    return select_flags(flags, version)


def reference_flags(
    engine: Path, pairs: Sequence[Pair], output: str, most_l2: float, version: Version
) -> list[str]:
    """Flags that run a saved engine on all pairs and compare one output with its references (TensorRT 11.1).

    Args:
        engine: The engine.
        pairs: Pairs of the same shapes.
        output: Name of the output.
        most_l2: The mean squared difference at which the check fails, above 0.
        version: Major and minor version of TensorRT.
    """
    flags = [f"--loadEngine={engine}", *_list_shape_flags(pairs[0])]
    for number, pair in enumerate(pairs):
        if len(pairs) > 1:  # trtexec refuses a single --refPair
            flags.append(f"--refPair={number}")
        flags.append(f"--loadInputs={_join_files(pair.inputs)}")
        flags.append(f"--loadRefOutputs={_join_files({output: pair.references[output]})}")
    flags += ["--accuracyAlgorithm=l2", f"--accuracyThreshold={most_l2:.6e}", *_RUN_ONCE_FLAGS]
    return select_flags(flags, version)


def _list_type_flags(*, half: bool, quantized: bool) -> list[str]:
    """The flags that allow types, before TensorRT 11; arguments as for `build_flags`."""
    if half:
        return ["--stronglyTyped"]
    return ["--int8", "--fp16"] if quantized else ["--fp16"]


def _list_profile_flags(profiles: Mapping[str, Profile]) -> list[str]:
    """`--minShapes=x:1x3x224x224 --optShapes=... --maxShapes=...`, nothing for static inputs."""
    if not profiles:
        return []
    flags = []
    for kind in ("min", "opt", "max"):
        shapes = {name: profile[kind] for name, profile in profiles.items()}
        flags.append(f"--{kind}Shapes={_join_shapes(shapes)}")
    return flags


def _list_shape_flags(pair: Pair) -> list[str]:
    """`--shapes=x:1x3x224x224`, nothing for static inputs."""
    return [f"--shapes={_join_shapes(pair.shapes)}"] if pair.shapes else []


def _join_shapes(shapes: Mapping[str, Shape]) -> str:
    parts = []
    for name, shape in shapes.items():
        sizes = "x".join(map(str, shape))
        parts.append(f"{_quote(name)}:{sizes}")
    return ",".join(parts)


def _join_files(files: Mapping[str, Path]) -> str:
    parts = [f"{_quote(name)}:{file.as_posix()}" for name, file in files.items()]
    return ",".join(parts)


def _quote(name: str) -> str:
    """A name as trtexec reads it: in single quotes if it contains a colon, as `input:0` does."""
    return f"'{name}'" if ":" in name else name
