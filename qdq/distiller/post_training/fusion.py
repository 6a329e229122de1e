"""Statistics of what a layer gives to the next: BatchNorm is folded, and values that an activation cuts get no codes.

    ReLU            from 0 on; the layer before applies it
    ReLU6, clamps   their bounds
    Tanh            -4 to 4
    Sigmoid         -6 to 6

Where the parts of a split have several activations, the widest of these windows counts, if it contains the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from torch import nn

from qdq.dataflow import clamp_of
from qdq.distiller.statistics.records import LayerStatistics, ModelStatistics, TensorRecord
from qdq.fold import fold_batchnorm
from qdq.forward import ForwardTrace, Operation
from qdq.functions import COPIES

_TANH_WINDOW = -4.0, 4.0
_SIGMOID_WINDOW = -6.0, 6.0
_Window = tuple[float, float]


def fold_batchnorms(
    model: nn.Module, example_inputs: Any, statistics: ModelStatistics | None
) -> ModelStatistics | None:
    """Fold each BatchNorm into the layer before it, whose output then has the statistics of the BatchNorm's.

    Args:
        model: The model, changed in place.
        example_inputs: One batch.
        statistics: Those of the model; None: there are none.

    Returns:
        New statistics, without the entries of folded BatchNorms.
    """
    pairs = [pair for pair in fold_batchnorm(model, example_inputs) if pair.folded]
    if statistics is None:
        return None
    moved = dict(statistics)
    for pair in pairs:
        normalized = moved.pop(pair.batchnorm, None)
        layer = moved.get(pair.layer)
        if normalized is not None and layer is not None:
            moved[pair.layer] = replace(layer, output=normalized.output)
    return moved


@dataclass(frozen=True)
class Cuts:
    """Result of `cut_ranges`.

    Args:
        statistics: The statistics, cut.
        before_relu: The layers whose output only a ReLU reads.
        fused: ReLU that is a module -> the layer before, which applies it.
    """

    statistics: ModelStatistics
    before_relu: frozenset[str]
    fused: dict[str, str]


def cut_ranges(
    trace: ForwardTrace,
    modules: Mapping[str, nn.Module],
    statistics: ModelStatistics,
    rounded: Collection[str],
) -> Cuts:
    """Cut the output range of each layer to what the function that reads it uses.

    Args:
        trace: One forward of the folded model.
        modules: Its modules by name.
        statistics: From `fold_batchnorms`.
        rounded: Names of the layers whose output is quantized.
    """
    readers = _list_readers(trace)
    cut = dict(statistics)
    before_relu = set()
    fused = {}
    for name, values in list_outputs(trace, rounded).items():
        activations = [_find_only_reader(value, readers, trace) for value in values]
        window = _find_common_window(activations, readers, trace)
        if name not in cut or window is None:
            continue
        record = cut_record(cut[name].output, window)
        cut[name] = replace(cut[name], output=record)
        successor = _find_only_successor(activations, trace)
        if successor in cut:
            inputs = cut[successor].inputs | {0: record}
            cut[successor] = LayerStatistics(inputs, cut[successor].output)
        clamps = {clamp_of(activation) for activation in activations if activation is not None}
        if clamps == {(0.0, inf)}:
            before_relu.add(name)
            if isinstance(modules.get(successor), nn.ReLU):
                fused[successor] = name
    return Cuts(cut, frozenset(before_relu), fused)


def list_outputs(trace: ForwardTrace, names: Collection[str]) -> dict[str, list[int]]:
    """Layer -> number of the tensor that each of its runs returned.

    Args:
        trace: One forward.
        names: Names of layers.
    """
    outputs: dict[str, list[int]] = {}
    for run in trace.runs:
        if run.module in names:
            outputs.setdefault(run.module, []).extend(run.outputs)
    return outputs


def _find_common_window(
    activations: Sequence[Operation | None],
    readers: Mapping[int, list[Operation]],
    trace: ForwardTrace,
) -> _Window | None:
    """The values that the calls behind all runs of a layer use; None if they differ."""
    windows = set()
    for activation in activations:
        windows.add(None if activation is None else _find_window(activation, readers, trace))
    return windows.pop() if len(windows) == 1 else None


def _find_only_successor(activations: Sequence[Operation | None], trace: ForwardTrace) -> str:
    """The module that reads all runs of a layer and nothing else; "" if there is none."""
    modules = {"" if activation is None else activation.module for activation in activations}
    (successor, *others) = modules
    is_only = not others and trace.calls[successor] == len(activations)
    return successor if is_only else ""


def _list_readers(trace: ForwardTrace) -> dict[int, list[Operation]]:
    """Number of a tensor -> the calls that read it."""
    readers: dict[int, list[Operation]] = {}
    for operation in trace.operations:
        for value in dict.fromkeys(operation.inputs):
            readers.setdefault(value, []).append(operation)
    return readers


def _find_only_reader(
    value: int, readers: Mapping[int, list[Operation]], trace: ForwardTrace
) -> Operation | None:
    """The call that reads a tensor, if exactly one does and the model does not return it."""
    calls = readers.get(value, [])
    return calls[0] if len(calls) == 1 and value not in trace.outputs else None


def _find_window(
    reader: Operation, readers: Mapping[int, list[Operation]], trace: ForwardTrace
) -> _Window | None:
    """The values that a call uses; None for all."""
    is_split = reader.function in COPIES and len(reader.outputs) > 1
    if not is_split:
        return _window_of(reader)
    windows = []
    for part in reader.outputs:
        activation = _find_only_reader(part, readers, trace)
        window = None if activation is None else _window_of(activation)
        if window is None:
            return None
        windows.append(window)
    widest = min(low for low, _ in windows), max(high for _, high in windows)
    return widest if widest in windows else None


def _window_of(activation: Operation) -> _Window | None:
    """The input values for which an activation has different results; None for all."""
    if activation.function == "tanh":
        return _TANH_WINDOW
    if activation.function == "sigmoid":
        return _SIGMOID_WINDOW
    return clamp_of(activation)


def cut_record(record: TensorRecord, window: _Window) -> TensorRecord:
    """The ends of a record within a window; mean and deviations stay.

    Args:
        record: The record.
        window: Its two ends, which may be infinite.
    """
    low, high = window
    ends = {}
    for field in ("min", "max", "avg_min", "avg_max"):
        ends[field] = min(max(getattr(record, field), low), high)
    return replace(record, **ends)
