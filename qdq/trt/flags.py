"""The flags of trtexec that qdq writes, and the versions of TensorRT that take them.

trtexec ends with an error on a flag that it does not know, so a line for one version may not run with another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Version = tuple[int, int]
"""Major and minor version of TensorRT."""

OLDEST: Version = (8, 6)
"""The oldest TensorRT for which lines are written."""

STRONG_TYPES: Version = (11, 0)
"""From this version on the types of the graph always decide, and there are no flags for precision."""

REFERENCES: Version = (11, 1)
"""From this version on trtexec compares outputs with references, on Linux."""

COMPARED_TYPES = ("float32", "float16", "int8", "int32")
"""The types of outputs that trtexec compares, by numpy's names."""

DEBUG_TENSORS: Version = (10, 13)
"""From this version on trtexec writes debug tensors as `.npy`."""

HALF_SCALES: Version = (10, 0)
"""The oldest version whose Q/DQ have float16 scales."""

HIGHEST_OPSET_OF_8 = 17
"""The highest ONNX opset whose Q/DQ TensorRT 8.6 reads."""


@dataclass(frozen=True)
class FlagSpan:
    """The versions that take a flag.

    Args:
        first: The first one.
        end: The first version that refuses it again; None if none does.
        idle_from: The first version that takes it and ignores it, because what it asks for is the default there.
    """

    first: Version = OLDEST
    end: Version | None = None
    idle_from: Version | None = None


_ALL = FlagSpan()
_WEAK_TYPES = FlagSpan(end=STRONG_TYPES)
_DEFAULT_OF_11 = FlagSpan(idle_from=STRONG_TYPES)
_REFERENCES = FlagSpan(first=REFERENCES)

FLAGS = {
    # the model and its engine
    "--onnx": _ALL,
    "--saveEngine": _ALL,
    "--loadEngine": _ALL,
    "--minShapes": _ALL,
    "--optShapes": _ALL,
    "--maxShapes": _ALL,
    "--shapes": _ALL,
    "--timingCacheFile": _ALL,
    "--memPoolSize": _ALL,
    "--builderOptimizationLevel": _ALL,
    # precision
    "--int8": _WEAK_TYPES,
    "--fp16": _WEAK_TYPES,
    "--stronglyTyped": FlagSpan(first=(10, 0), idle_from=STRONG_TYPES),
    # DLA
    "--useDLACore": _ALL,
    "--allowGPUFallback": _ALL,
    # what is measured and written
    "--profilingVerbosity": _ALL,
    "--dumpLayerInfo": _ALL,
    "--exportLayerInfo": _ALL,
    "--dumpProfile": _ALL,
    "--exportProfile": _ALL,
    "--exportTimes": _ALL,
    "--exportOutput": _ALL,
    "--warmUp": _ALL,
    "--duration": _ALL,
    "--iterations": _ALL,
    "--useCudaGraph": _DEFAULT_OF_11,
    "--useSpinWait": _DEFAULT_OF_11,
    "--noDataTransfers": _DEFAULT_OF_11,
    "--separateProfileRun": _DEFAULT_OF_11,
    "--includeDataTransfers": FlagSpan(first=STRONG_TYPES),
    # debug tensors
    "--markDebug": FlagSpan(first=(10, 0)),
    "--saveAllDebugTensors": FlagSpan(first=DEBUG_TENSORS),
    # inputs and references
    "--loadInputs": _ALL,
    "--loadRefOutputs": _REFERENCES,
    "--refPair": _REFERENCES,
    "--accuracyAlgorithm": _REFERENCES,
    "--accuracyThreshold": _REFERENCES,
}
"""Every flag that qdq writes -> the versions that take it."""


def takes_flag(flag: str, version: Version) -> bool:
    """Whether a version of trtexec takes a flag.

    Args:
        flag: A flag of `FLAGS`, without a value.
        version: Major and minor version.
    """
    span = FLAGS[flag]
    return span.first <= version and (span.end is None or version < span.end)


def select_flags(flags: Iterable[str], version: Version) -> list[str]:
    """The flags that have an effect in a version, in their order.

    Args:
        flags: Flags of `FLAGS`, with or without `=VALUE`.
        version: Major and minor version.
    """
    selected = []
    for flag in flags:
        name = flag.partition("=")[0]
        idle_from = FLAGS[name].idle_from
        is_idle = idle_from is not None and version >= idle_from
        if takes_flag(name, version) and not is_idle:
            selected.append(flag)
    return selected
