"""How long a kernel takes on a GPU: the roofline of its arithmetic and its traffic, and what a launch costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qdq.errors import ArgumentError

NumberType = Literal["int8", "fp8", "fp16", "fp32"]
"""The types that a product is computed in."""

ITEM_BYTES: dict[NumberType, int] = {"int8": 1, "fp8": 1, "fp16": 2, "fp32": 4}

KERNEL_MICROSECONDS = 3.0
"""What every kernel takes, however little it does.

About 2 for the launch, in a CUDA graph or queued behind the kernel before it, and 1 for the first read from memory and
the last write to it. No data sheet gives it; it is the order of magnitude of published microbenchmarks on all GPUs
since Volta.
"""

_TILE = 64 * 64
"""Outputs that one processor computes at a time: the small one of the tiles that libraries of matrix products use."""

_VECTOR_BYTES = 16
"""Channels are read in vectors of this size, so fewer channels cost as much."""


@dataclass(frozen=True)
class Gpu:
    """Dense peak rates of a GPU, from NVIDIA's data sheets.

    Args:
        int8: int8 operations per second, in 10^12.
        fp16: fp16 operations per second on the tensor cores, in 10^12.
        fp32: The same for float32, which TensorRT computes in TF32 on the tensor cores where there is TF32.
        bandwidth: Memory traffic, in 10^9 bytes per second.
        processors: Number of streaming multiprocessors.
        sm: Compute capability, 89 for 8.9. From 89 on there is FP8, at the rate of int8.
    """

    int8: float
    fp16: float
    fp32: float
    bandwidth: float
    processors: int
    sm: int

    def rate(self, number_type: NumberType) -> float:
        """Operations per second of a type, in 10^12."""
        rates = {"int8": self.int8, "fp8": self.int8, "fp16": self.fp16, "fp32": self.fp32}
        return rates[number_type]


# Where a data sheet gives rates with sparsity, this table has half of them. Consumer cards: fp16 with fp16
# accumulation. Checked in November 2026 against published tables of NVIDIA's data sheets: all of a100, h100, l40s,
# rtxpro6000 and t4, int8 of orin (170 with sparsity), orinnano (40 with sparsity) and rtx4090, fp16 of rtx3090, and
# every bandwidth. a10 and l4 are computed as tensor cores x operations x clock. int8 of rtx3090 is twice its fp16, and
# fp16 of orin, orinnano and rtx4090 is half of their int8: the ratio of these chips. fp32 is TF32: half of fp16, on
# GeForce a quarter. T4 has no TF32.
GPUS = {
    "a10": Gpu(250, 125, 62.5, 600, 72, 86),
    "a100": Gpu(624, 312, 156, 2039, 108, 80),  # SXM, 80 GB
    "h100": Gpu(1979, 989, 494, 3350, 132, 90),  # SXM
    "l4": Gpu(242, 121, 60.5, 300, 58, 89),
    "l40s": Gpu(733, 362, 183, 864, 142, 89),
    "orin": Gpu(
        85, 42.5, 21.2, 204.8, 16, 87
    ),  # the GPU of a Jetson AGX Orin 64GB, without its accelerators
    "orinnano": Gpu(
        20, 10, 5, 68, 8, 87
    ),  # Jetson Orin Nano 8GB, without the Super mode of JetPack 6.2
    "rtx3090": Gpu(284, 142, 35.6, 936, 82, 86),
    "rtx4090": Gpu(661, 330, 82.6, 1008, 128, 89),
    "rtxpro6000": Gpu(1008, 504, 252, 1792, 188, 120),  # Blackwell, Workstation Edition
    "t4": Gpu(130, 65, 8.1, 320, 40, 75),
}


TARGETS = {
    **{name: gpu.sm for name, gpu in GPUS.items()},
    "rtx40": 89,
    "rtx50": 120,
    "thor": 110,
}
"""Name of a GPU or of a family of them -> its compute capability."""


def find_target_sm(target: str) -> int:
    """The compute capability of a target, 89 for 8.9.

    Raises:
        ArgumentError: An unknown target.
    """
    if target not in TARGETS:
        raise ArgumentError(
            f"target is {target!r}; known are {', '.join(TARGETS)}.", "pass one of them, or sm."
        )
    return TARGETS[target]


def find_gpu(name: str) -> Gpu:
    """The rates of a GPU.

    Raises:
        ArgumentError: The name is not in `GPUS`.
    """
    if name not in GPUS:
        raise ArgumentError(
            f"gpu is {name!r}; expected one of {', '.join(GPUS)}.",
            "use one of these; to rank layers by time, a profile of the engine does as well.",
        )
    return GPUS[name]


def choose_sm(gpu: str | None, sm: int | None) -> int | None:
    """The compute capability that a file is for, 89 for 8.9.

    Args:
        gpu: Name of a GPU, if one is chosen.
        sm: Compute capability, if one is given.

    Raises:
        ArgumentError: An unknown GPU, or one of another compute capability than `sm`.
    """
    if gpu is None:
        return sm
    gpu_sm = find_gpu(gpu).sm
    if sm is not None and sm != gpu_sm:
        raise ArgumentError(
            f"gpu is {gpu!r}, which has SM {gpu_sm}, and sm is {sm}.", "give one of the two."
        )
    return gpu_sm


def estimate_kernel(
    gpu: Gpu,
    *,
    number_type: NumberType,
    num_bytes: float,
    macs: float = 0,
    outputs: int = 0,
    channels: int | None = None,
) -> float:
    """Time of a kernel in microseconds: the longer of its arithmetic and its traffic, and its launch.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
    Communications of the ACM 52, 2009. The rates are peaks, so a real kernel is slower; ratios between kernels are
    what counts.

    Args:
        gpu: The rates.
        number_type: The type of its operands.
        num_bytes: What it reads and writes.
        macs: Multiply-accumulate operations; 0 if it multiplies no matrices.
        outputs: Numbers that it computes. Too few of them keep only a part of the processors busy.
        channels: Input channels of a group of a convolution; None for other products. A depthwise convolution has 1, a
            stem 3: the rest of a vector is multiplied in vain.
    """
    traffic = num_bytes / gpu.bandwidth / 1e3
    if not macs:
        return traffic + KERNEL_MICROSECONDS
    if channels:
        vector = _VECTOR_BYTES // ITEM_BYTES[number_type]
        padded_channels = -(-channels // vector) * vector
        macs = macs * padded_channels / channels
    tiles = -(-outputs // _TILE)
    busy_fraction = min(1.0, tiles / gpu.processors)
    arithmetic = 2 * macs / (gpu.rate(number_type) * busy_fraction) / 1e6
    return max(arithmetic, traffic) + KERNEL_MICROSECONDS
