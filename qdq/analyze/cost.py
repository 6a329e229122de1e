"""Cost of a layer on a GPU: the roofline of its arithmetic and its traffic, or times measured in an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import nn
from typing_extensions import TypedDict

from qdq.batch import tensors_of
from qdq.errors import ArgumentError, DataError
from qdq.forward import ForwardTrace
from qdq.functions import PRODUCT_OPERATORS
from qdq.quantizer import disable_quantization
from qdq.schema import read_json, validate
from qdq.work import self_and_parents, trace_work


@dataclass(frozen=True)
class Gpu:
    """Dense peak rates of a GPU, from NVIDIA's data sheets.

    Args:
        int8: int8 operations per second, in 10^12.
        fp16: fp16 operations per second on the tensor cores, in 10^12.
        bandwidth: Memory traffic, in 10^9 bytes per second.
    """

    int8: float
    fp16: float
    bandwidth: float


# Where a data sheet gives rates with sparsity, this table has half of them. Consumer cards: fp16 with fp16
# accumulation. Checked in November 2026 against published tables of NVIDIA's data sheets: all of a100, h100, l40s and
# t4, int8 of orin (170 with sparsity) and rtx4090, fp16 of rtx3090, and every bandwidth. a10 and l4 are computed as
# tensor cores x operations x clock. int8 of rtx3090 is twice its fp16, and fp16 of orin and rtx4090 is half of their
# int8: the ratio of these chips.
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
    """Arithmetic and memory traffic of a layer in one forward.

    Args:
        macs: Multiply-accumulate operations.
        values: Numbers that it reads and writes, weights included.
    """

    macs: int
    values: int


@dataclass(frozen=True)
class SwitchCost:
    """Time of a layer in each of two types, in microseconds, for the batch that was counted.

    Args:
        int8: Time in int8.
        float16: Time in fp16.
    """

    int8: float
    float16: float


def find_gpu(name: str) -> Gpu:
    """The rates of a GPU.

    Raises:
        ArgumentError: The name is not in `GPUS`.
    """
    if name not in GPUS:
        raise ArgumentError(
            f"gpu is {name!r}; expected one of {', '.join(GPUS)}.",
            "use one of these, or give a profile.",
        )
    return GPUS[name]


def count_costs(model: nn.Module, batch: Any) -> dict[str, LayerCost]:
    """Count arithmetic and traffic of every module and every function call in one float forward.

    Args:
        model: Any module.
        batch: As for `forward.call_model`.

    Returns:
        Dotted name -> cost, for everything that multiplies matrices; "" is the whole model.
    """
    _, costs = trace_costs(model, batch)
    return costs


def trace_costs(model: nn.Module, batch: Any) -> tuple[ForwardTrace, dict[str, LayerCost]]:
    """Count costs like `count_costs`, and also return the trace of that float forward.

    Args:
        model: Any module.
        batch: As for `forward.call_model`.
    """
    values: dict[str, int] = {}
    with ExitStack() as undo:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(_Traffic(name, values), with_kwargs=True)
            undo.callback(handle.remove)
        undo.enter_context(disable_quantization(model))
        trace, work = trace_work(model, batch)

    for operation in trace.operations:
        if not operation.metered:
            continue
        tensors = (*operation.inputs, *operation.outputs)
        moved = sum(math.prod(trace.shapes[number]) for number in tensors)
        values[operation.name] = values.get(operation.name, 0) + moved
    costs = {}
    for name, macs in work.macs.items():
        if name in values:
            costs[name] = LayerCost(macs, values[name])
    return trace, costs


class _Traffic:
    """A hook that adds up the numbers that a module reads and writes.

    Args:
        name: Dotted name of the module.
        values: Name -> sum; the hook adds to it.
    """

    def __init__(self, name: str, values: dict[str, int]) -> None:
        self._name = name
        self._values = values

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        moved = sum(tensor.numel() for tensor in tensors_of((args, kwargs, output)))
        weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        self._values[self._name] = self._values.get(self._name, 0) + moved + weights


def estimate_times(costs: dict[str, LayerCost], gpu: str) -> dict[str, SwitchCost]:
    """Roofline of every layer: the longer of its arithmetic and its traffic, at the peak rates of a GPU.

    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
    Communications of the ACM 52, 2009. A real kernel is slower; only the ratios between layers matter for a choice.

    Raises:
        ArgumentError: An unknown GPU.
    """
    rates = find_gpu(gpu)
    times = {}
    for name, cost in costs.items():
        int8_arithmetic = 2 * cost.macs / rates.int8 / 1e6
        int8_traffic = cost.values / rates.bandwidth / 1e3
        fp16_arithmetic = 2 * cost.macs / rates.fp16 / 1e6
        fp16_traffic = 2 * cost.values / rates.bandwidth / 1e3
        times[name] = SwitchCost(
            int8=max(int8_arithmetic, int8_traffic),
            float16=max(fp16_arithmetic, fp16_traffic),
        )
    return times


class _ProfileRow(TypedDict, total=False):
    """A kernel of a profile; the first row has a count instead."""

    name: str
    averageMs: Annotated[float, Ge(0)]  # trtexec's spelling


def read_profile(path: Path) -> list[tuple[str, float]]:
    """Kernels of an engine and their times in milliseconds, from JSON of trtexec `--exportProfile`.

    Raises:
        DataError: The file is not a profile, or contains an invalid time.
    """
    fix = "write one with trtexec --exportProfile=FILE --dumpProfile."
    try:
        rows = validate(list[_ProfileRow], read_json(path, fix), str(path), fix)
    except DataError as error:
        raise DataError(f"{path} is not an engine profile: {error.message}", error.fix) from error
    kernels = []
    for row in rows:
        if "name" in row and "averageMs" in row:
            kernels.append((row["name"], row["averageMs"]))
    return kernels


def load_times(path: Path, names: Sequence[str], modules: Collection[str]) -> dict[str, SwitchCost]:
    """Measured times of layers, from a profile of an int8 engine (trtexec `--exportProfile`).

    TensorRT names a kernel after the ONNX nodes in it, and qdq names a node after its module: `layer1.0.conv1/Conv`.
    The time of a kernel is divided equally among the layers in it. A layer is assumed to take twice as long in fp16
    as in int8: it moves twice the bytes, and the tensor cores have half the rate.

    Args:
        path: JSON: a list of objects with `name` and `averageMs`.
        names: Dotted names of layers and calls.
        modules: Dotted names of all modules; a name that is not among them is a call.

    Raises:
        DataError: The file is not a profile, or it names none of the layers.
    """
    kernels = read_profile(path)
    layers: set[str] = set()
    calls: dict[str, list[str]] = {}  # module -> calls in it
    for name in names:
        if name in modules:
            layers.add(name)
        else:
            calls.setdefault(name.rpartition(".")[0], []).append(name)

    microseconds: dict[str, float] = {}
    for kernel, milliseconds in kernels:
        hits: set[str] = set()
        for node in re.split(r"[\s+:,()\[\]{}]+", kernel):
            hits.update(_find_layers(node, layers, calls))
        for name in hits:
            fraction = 1000 * milliseconds / len(hits)
            microseconds[name] = microseconds.get(name, 0.0) + fraction
    if not microseconds:
        raise DataError(
            f"no layer of the model is named in the kernels of {path}.",
            "profile the engine that qdq built from this model.",
        )
    return {name: SwitchCost(time, 2 * time) for name, time in microseconds.items()}


def _find_layers(node: str, layers: Collection[str], calls: Mapping[str, list[str]]) -> list[str]:
    """The layer that an ONNX node is part of; for a product outside any layer, the calls in its module.

    Args:
        node: Name of the node, as `module/operator_number`.
        layers: Dotted names of layers.
        calls: Module -> the calls in it.
    """
    scope, slash, operation = node.rpartition("/")
    module = _join_scopes(scope) if slash else node
    enclosing = self_and_parents(module).intersection(layers) - {""}
    if enclosing:
        return [max(enclosing, key=len)]

    operator = re.sub(r"_\d+$", "", operation)
    if slash and operator in PRODUCT_OPERATORS:
        return calls.get(module, [])
    return []


def _join_scopes(scope: str) -> str:
    """The dotted name `layer1.0.conv1` from qdq's `layer1.0.conv1` or torch's `/layer1/layer1.0/conv1`."""
    joined: list[str] = []
    for part in scope.split("/"):
        if not part:
            continue
        if joined and part.startswith(f"{joined[-1]}."):
            joined.pop()
        joined.append(part)
    return ".".join(joined)
