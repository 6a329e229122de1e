"""What a layer costs on a GPU: the roofline of its arithmetic and its traffic, or times measured in an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qdq.errors import ArgumentError, DataError
from qdq.quantizer import disable_quantization
from qdq.trace import call_model, evaluating


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, dense, as NVIDIA's data sheets give them.

    Args:
        int8: int8 operations a second, in 10^12.
        fp16: fp16 operations a second on the tensor cores, in 10^12.
        bandwidth: Memory traffic, in 10^9 bytes a second.
    """

    int8: float
    fp16: float
    bandwidth: float


# Where a data sheet gives rates with sparsity, half of them; consumer cards: fp16 with fp16 sums.
# Checked in November 2026 against tables that others publish of NVIDIA's data sheets: all of a100, h100, l40s and t4,
# int8 of orin (170 with sparsity) and rtx4090, fp16 of rtx3090, and every bandwidth. a10 and l4: tensor cores x
# operations x clock. int8 of rtx3090 is twice its fp16, fp16 of orin and rtx4090 half of int8, as these chips have it.
GPUS = {
    "a10": Gpu(250, 125, 600),
    "a100": Gpu(624, 312, 2039),  # SXM, 80 GB
    "h100": Gpu(1979, 989, 3350),  # SXM
    "l4": Gpu(242, 121, 300),
    "l40s": Gpu(733, 362, 864),
    "orin": Gpu(85, 42.5, 204.8),  # the GPU of a Jetson AGX Orin 64GB, without its accelerators
    "rtx3090": Gpu(284, 142, 936),
    "rtx4090": Gpu(661, 330, 1008),
    "t4": Gpu(130, 65, 320),
}


@dataclass(frozen=True)
class LayerCost:
    """What a layer does in one forward.

    Args:
        macs: Multiplications with an addition.
        values: Numbers that it reads and writes, its weights among them.
    """

    macs: int
    values: int


@dataclass(frozen=True)
class SwitchCost:
    """Time of a layer in both types, in microseconds for the batch that was counted.

    Args:
        int8: In int8.
        float16: In fp16.
    """

    int8: float
    float16: float


def find_gpu(name: str) -> Gpu:
    """The rates of a GPU.

    Raises:
        ArgumentError: It is not in `GPUS`.
    """
    if name not in GPUS:
        raise ArgumentError(f"gpu is {name!r}; known are {', '.join(GPUS)}.", "use one of those, or give a profile.")
    return GPUS[name]


def count_costs(model: nn.Module, batch: Any) -> dict[str, LayerCost]:
    """Arithmetic and traffic of every module, counted in one forward in float.

    Args:
        model: Any module.
        batch: As for `trace.call_model`.

    Returns:
        Dotted name -> what it does, for modules that multiply matrices.
    """
    values: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    with ExitStack() as undo:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(_Traffic(name, values), with_kwargs=True)
            undo.callback(handle.remove)
        with disable_quantization(model), evaluating(model), counter:
            call_model(model, batch)
    root = type(model).__name__
    flops = {path.removeprefix(root).lstrip("."): sum(by.values()) for path, by in counter.get_flop_counts().items()}
    return {
        name: LayerCost(int(flops[name]) // 2, values[name])
        for name, _ in model.named_modules()
        if flops.get(name) and name in values
    }


class _Traffic:
    """A hook that adds up the numbers which a module reads and writes.

    Args:
        name: Of the module.
        values: Where the sum goes.
    """

    def __init__(self, name: str, values: dict[str, int]) -> None:
        self._name = name
        self._values = values

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        moved = sum(leaf.numel() for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor))
        weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        self._values[self._name] = self._values.get(self._name, 0) + moved + weights


def estimate_times(costs: dict[str, LayerCost], gpu: str) -> dict[str, SwitchCost]:
    """Roofline of every layer: the longer of its arithmetic and its traffic, at the peak rates of a GPU.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
    Communications of the ACM 52, 2009. A real kernel is slower; for a choice the proportion between layers counts.

    Raises:
        ArgumentError: An unknown GPU.
    """
    rates = find_gpu(gpu)
    return {
        name: SwitchCost(
            max(2 * cost.macs / rates.int8 / 1e6, cost.values / rates.bandwidth / 1e3),
            max(2 * cost.macs / rates.fp16 / 1e6, 2 * cost.values / rates.bandwidth / 1e3),
        )
        for name, cost in costs.items()
    }


def read_profile(path: Path) -> list[tuple[str, float]]:
    """Kernels of an engine and their times in milliseconds, from JSON of trtexec `--exportProfile`.

    Raises:
        DataError: Not such a file.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(str(entry["name"]), float(entry["averageMs"])) for entry in entries if "averageMs" in entry]
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is no engine profile: {error}.", "write one with trtexec --exportProfile=FILE --dumpProfile."
        ) from error


def load_times(path: Path, names: Sequence[str]) -> dict[str, SwitchCost]:
    """Measured times of layers, from a profile of an int8 engine (trtexec `--exportProfile`).

    A kernel counts for the layer whose dotted name stands in its name. In fp16 a layer is taken to need twice the time
    of int8: twice the bytes, and half the rate of the tensor cores.

    Args:
        path: JSON: a list of objects with `name` and `averageMs`.
        names: Dotted names of the layers.

    Raises:
        DataError: Not such a file, or none of the layers is in it.
    """
    kernels = read_profile(path)
    times: dict[str, float] = {}
    for kernel, milliseconds in kernels:
        parts = kernel.replace("/", ".").replace("+", " ").replace(":", " ").split()
        hits = [name for name in names if any(_stands_in(name, part) for part in parts)]
        for name in hits:
            times[name] = times.get(name, 0.0) + 1000 * milliseconds / len(hits)
    if not times:
        raise DataError(
            f"no layer of the model is named in the kernels of {path}.", "profile the engine that qdq built of it."
        )
    return {name: SwitchCost(time, 2 * time) for name, time in times.items()}


def _stands_in(name: str, text: str) -> bool:
    """Whether a dotted name stands in a text as a whole."""
    dotted, wanted = f".{text.strip('.,[](){}')}.", f".{name}."
    return wanted in dotted
