"""Cost of a layer on a GPU: the roofline of its arithmetic and its traffic, or times measured in an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import nn
from typing_extensions import TypedDict

from qdq.batch import tensors_of
from qdq.errors import DataError
from qdq.forward import ForwardTrace
from qdq.functions import PRODUCT_OPERATORS
from qdq.quantizer import disable_quantization
from qdq.roofline import ITEM_BYTES, NumberType, estimate_kernel, find_gpu
from qdq.schema import read_json, validate
from qdq.work import self_and_parents, trace_work

_TYPES: tuple[NumberType, ...] = ("int8", "fp16")


@dataclass(frozen=True)
class LayerCost:
    """Arithmetic and memory traffic of a layer in one forward.

    Args:
        macs: Multiply-accumulate operations.
        values: Numbers that it reads and writes, weights included.
        outputs: Numbers among them that it writes.
    """

    macs: int
    values: int
    outputs: int


@dataclass(frozen=True)
class SwitchCost:
    """Time of a layer in each of two types, in microseconds, for the batch that was counted.

    Args:
        int8: Time in int8.
        float16: Time in fp16.
    """

    int8: float
    float16: float


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
    outputs: dict[str, int] = {}
    with ExitStack() as undo:
        for name, module in model.named_modules():
            traffic = _Traffic(name, values, outputs)
            handle = module.register_forward_hook(traffic, with_kwargs=True)
            undo.callback(handle.remove)
        undo.enter_context(disable_quantization(model))
        trace, work = trace_work(model, batch)

    for operation in trace.operations:
        if not operation.metered:
            continue
        read = sum(math.prod(trace.shapes[number]) for number in operation.inputs)
        written = sum(math.prod(trace.shapes[number]) for number in operation.outputs)
        values[operation.name] = values.get(operation.name, 0) + read + written
        outputs[operation.name] = outputs.get(operation.name, 0) + written
    costs = {}
    for name, macs in work.macs.items():
        if name in values:
            costs[name] = LayerCost(macs, values[name], outputs[name])
    return trace, costs


def count_exclusive_macs(costs: Mapping[str, LayerCost], layers: Iterable[str]) -> dict[str, int]:
    """MACs of each layer without those of the layers inside it, such as `out_proj` of an attention.

    Args:
        costs: From `count_costs`.
        layers: Dotted names of modules and calls. One that is not in `costs` has no product, and is left out.
    """
    macs = {name: costs[name].macs for name in layers if name in costs}
    exclusive_macs = dict(macs)
    for name, inner_macs in macs.items():
        parent = _find_parent(name, macs)
        if parent is not None:
            exclusive_macs[parent] -= inner_macs
    return exclusive_macs


def _find_parent(name: str, layers: Collection[str]) -> str | None:
    """The innermost of some layers around another one; None if it is in none of them."""
    parts = name.split(".")
    for end in reversed(range(len(parts))):
        parent = ".".join(parts[:end])
        if parent in layers and parent != name:
            return parent
    return None


class _Traffic:
    """A hook that adds up the numbers that a module reads and writes.

    Args:
        name: Dotted name of the module.
        values: Name -> sum; the hook adds to it.
        outputs: Likewise for the numbers that it writes alone.
    """

    def __init__(self, name: str, values: dict[str, int], outputs: dict[str, int]) -> None:
        self._name = name
        self._values = values
        self._outputs = outputs

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read = sum(tensor.numel() for tensor in tensors_of((args, kwargs)))
        written = sum(tensor.numel() for tensor in tensors_of(output))
        weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        moved = read + written + weights
        self._values[self._name] = self._values.get(self._name, 0) + moved
        self._outputs[self._name] = self._outputs.get(self._name, 0) + written


def estimate_times(costs: dict[str, LayerCost], gpu: str) -> dict[str, SwitchCost]:
    """Time of every layer in each type, by the roofline of a GPU (`qdq.roofline`).

    Raises:
        ArgumentError: An unknown GPU.
    """
    rates = find_gpu(gpu)
    times = {}
    for name, cost in costs.items():
        microseconds: dict[NumberType, float] = {}
        for number_type in _TYPES:
            microseconds[number_type] = estimate_kernel(
                rates,
                number_type=number_type,
                num_bytes=ITEM_BYTES[number_type] * cost.values,
                macs=cost.macs,
                outputs=cost.outputs,
            )
        times[name] = SwitchCost(int8=microseconds["int8"], float16=microseconds["fp16"])
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
