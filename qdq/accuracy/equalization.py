"""Channels scaled up in one layer and down in the next, so that one range for a tensor wastes fewer codes.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction,
ICCV 2019 (arXiv 1906.04721), section 4.1; the balance between activation and weight is that of SmoothQuant (Xiao et
al., ICML 2023, arXiv 2211.10438): s_c = w_c^(1 - a) / r_c^a, w_c the largest weight that reads channel c, r_c the
channel's largest value. The exponent a is the one that predicts the least noise behind the readers:

    noise ~ D_x^2 sum W^2 + sum_o D_o^2 sum E[x^2],   D the steps of the input and of the filters

With a range for each output channel, the scale of the layer that writes a tensor costs nothing, and neither does that
of a depthwise convolution that reads it. Functions between the two must commute with a positive factor for each
channel: ReLU, pooling, residual adds. So the float model stays the same but for rounding. ReLU6 and other clamps
commute only as long as they do nothing, and whether they will cannot be told from calibration data: tensors with an
upper clamp are left alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, log10
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.layerwise import flatten_outputs
from qdq.calibrate import calibrate_model
from qdq.dataflow import Dataflow, clamp_of
from qdq.errors import StateError
from qdq.forward import (
    ForwardTrace,
    Operation,
    call_model,
    evaluating,
    require_model,
    trace_forward,
)
from qdq.functions import (
    ACTIVATIONS,
    AVERAGES,
    CONVOLUTIONS,
    HOMOGENEOUS,
    IDENTITIES,
    LINEAR,
    MAX_POOLINGS,
    RESHAPES,
)
from qdq.metrics import Array, sqnr_db
from qdq.nn import QuantInputMixin
from qdq.quantizer import disable_quantization
from qdq.samples import list_filled_batches
from qdq.swap import quantized_layers, restore_modules, swap_modules
from qdq.text import group_names

logger = logging.getLogger(__name__)

_ELEMENTWISE = HOMOGENEOUS & (ACTIVATIONS | IDENTITIES)
_POOLINGS = HOMOGENEOUS & (AVERAGES | MAX_POOLINGS)
_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_STEPS = 127  # of a range, int8
_LARGEST = (
    16.0  # factor; a channel that needs more is almost dead on the data, and may not be elsewhere
)


@dataclass(frozen=True)
class EqualizedTensor:
    """What became of the channels of one tensor, or of several that a residual add ties together.

    Args:
        written_by: Layers that write it.
        read_by: Layers that read it.
        exponent: The balance that was chosen, 0 if nothing was changed.
        predicted_db: By how much the noise of both is predicted to fall behind the readers, in dB.
        reason: Why nothing was changed; empty if it was.
    """

    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    exponent: float
    predicted_db: float
    reason: str = ""


@dataclass(frozen=True)
class Equalization:
    """Result of `equalize_layers`.

    Args:
        tensors: In the order in which they are written.
        float_db: SQNR of the float outputs against those before, on the given batches, in dB: 100 and more is the
            rounding of float32.
        before_db: SQNR of the int8 outputs against the float ones before, on the given batches, in dB: of the model as
            `swap_modules` quantizes it on the first of them, with the largest values as ranges. None where it
            quantizes nothing.
        after_db: The same afterwards.
    """

    tensors: tuple[EqualizedTensor, ...]
    float_db: float
    before_db: float | None
    after_db: float | None

    def format_table(self) -> str:
        """How many tensors were equalized, what it did to the float model, and what was left alone and why."""
        done = [tensor for tensor in self.tensors if not tensor.reason]
        measured = self.before_db is not None and self.after_db is not None
        sqnr = (
            f"SQNR in int8 {self.before_db:.2f} to {self.after_db:.2f} dB"
            if measured
            else "nothing to quantize"
        )
        lines = [
            f"{len(done)} of {len(self.tensors)} tensors equalized: {sqnr}; "
            f"the float model against itself before: {self.float_db:.1f} dB"
        ]
        groups = group_names(
            (each.reason, ", ".join(each.written_by)) for each in self.tensors if each.reason
        )
        lines += [f"  {len(names)} ({names[0]} ...): {reason}" for reason, names in groups.items()]
        return "\n".join(lines)


def equalize_layers(model: nn.Module, batches: Iterable[Any]) -> Equalization:
    """Scale the channels between layers so that they use a common range better; in place.

    Call it after `fold_batchnorm` and before `swap_modules`. A tensor is left alone where one of its readers or writers
    is no convolution or linear layer, where a parameter of these is also used elsewhere, where it is an output of the
    model, or where less noise is not to be expected. What moves the float outputs by more than rounding is put back.

    Args:
        model: A float model; its layers are quantized for a while, to measure what the pass is worth.
        batches: Iterated once and kept; as for `calibrate_model`.

    Returns:
        What was done, how exactly the float model was kept, and the SQNR in int8 before and after.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch with samples.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    kept = list_filled_batches(batches)
    if any(isinstance(module, QuantInputMixin) for module in model.modules()):
        raise StateError(
            "the model has quantized layers.", "call equalize_layers before swap_modules."
        )
    groups = _find_groups(model, kept[0])
    expected = _observe(model, kept, groups)
    swap_modules(model, kept[0])
    try:
        before_db = _measure_int8(model, kept, expected)
        with disable_quantization(model):
            done, float_db = _equalize_exactly(model, kept, groups, expected)
        after_db = _measure_int8(model, kept, expected)
    finally:
        restore_modules(model)
    return Equalization(tuple(done), float_db, before_db, after_db)


def _measure_int8(model: nn.Module, batches: list[Any], expected: Array) -> float | None:
    """SQNR of the swapped model with maxima for ranges, None where no layer is quantized."""
    if not quantized_layers(model):
        return None
    calibrate_model(model, batches, method="max")
    return _sqnr(expected, _observe(model, batches, []))


def _sqnr(expected: Array, found: Array) -> float:
    """In dB; minus infinity where the outputs are not even as many."""
    return sqnr_db(expected, found) if found.shape == expected.shape else -inf


def _equalize_exactly(
    model: nn.Module, batches: list[Any], groups: list[_Group], expected: Array
) -> tuple[list[EqualizedTensor], float]:
    """All groups at once; if that moves the float outputs by more than rounding, one by one, without those that do."""
    enough = _rounding_db(model)
    with _undoing(groups) as undo:
        done = [_equalize(group) for group in groups]
        float_db = _sqnr(expected, _observe(model, batches, []))
        if float_db >= enough:
            return done, float_db
        undo()
    done, float_db = [], inf
    for group in groups:
        with _undoing([group]) as undo:
            tensor = _equalize(group)
            moved_db = float_db if tensor.reason else _sqnr(expected, _observe(model, batches, []))
            if moved_db < enough:
                undo()
                reason = f"put back: it moved the float outputs, SQNR {moved_db:.1f} dB"
                tensor = replace(tensor, exponent=0.0, predicted_db=0.0, reason=reason)
            else:
                float_db = moved_db
        done.append(tensor)
    return done, float_db


def _rounding_db(model: nn.Module) -> float:
    """SQNR that a hundred times the rounding of the parameters leaves; outputs are compared in float32."""
    types = {
        parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()
    } | {torch.float32}
    return -20 * log10(100 * max(torch.finfo(dtype).eps for dtype in types))


@contextmanager
def _undoing(groups: list[_Group]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts the parameters of all layers back; so does any error or Ctrl-C inside."""
    free = [group for group in groups if not group.reason]
    layers = [
        layer for group in free for layer in (*group.writers.values(), *group.readers.values())
    ]
    saved = {
        id(p): (p, p.detach().clone()) for layer in layers for p in layer.parameters(recurse=False)
    }

    @torch.no_grad()
    def undo() -> None:
        for parameter, values in saved.values():
            parameter.copy_(values)

    try:
        yield undo
    except BaseException:
        undo()
        raise


@dataclass(frozen=True)
class _Seen:
    """What a layer read: the largest value and the sum of squares of each channel, `[C]`, and over how many rows."""

    largest: torch.Tensor
    energy: torch.Tensor
    rows: int

    def merge(self, other: _Seen) -> _Seen:
        return _Seen(
            torch.maximum(self.largest, other.largest),
            self.energy + other.energy,
            self.rows + other.rows,
        )


@dataclass
class _Group:
    """Tensors that must be scaled alike, channel by channel, with the layers around them."""

    writers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, Any] = field(default_factory=dict)
    axes: set[int] = field(default_factory=set)
    reason: str = ""
    inputs: dict[str, _Seen] = field(default_factory=dict)


class _ChannelGroups:
    """Which tensors belong together, as a union of sets."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._of: dict[int, _Group] = {}

    def root(self, value: int) -> int:
        while self._parent.setdefault(value, value) != value:
            value = self._parent[value]
        return value

    def group(self, value: int) -> _Group:
        return self._of.setdefault(self.root(value), _Group())

    def join(self, first: int, second: int) -> _Group:
        one, other = self.group(first), self.group(second)
        if one is not other:
            one.writers |= other.writers
            one.readers |= other.readers
            one.axes |= other.axes
            one.reason = one.reason or other.reason
            self._parent[self.root(second)] = self.root(first)
        return one

    def pin(self, values: Iterable[int], reason: str) -> None:
        for value in values:
            group = self.group(value)
            group.reason = group.reason or reason

    def all(self) -> list[_Group]:
        roots = dict.fromkeys(self.root(value) for value in self._parent)
        return [self._of[root] for root in roots if self._of[root].writers]


def _find_groups(model: nn.Module, example_inputs: Any) -> list[_Group]:
    """Every tensor that a layer writes, in order; `reason` where it must stay as it is."""
    trace = trace_forward(model, example_inputs)
    flow, layers, groups = Dataflow(trace), _Layers(model, trace), _ChannelGroups()
    groups.pin(flow.inputs, "it is an input of the model")
    for operation in flow.operations:
        computed = [value for value in operation.inputs if flow.is_computed(value)]
        layer = layers.find(operation)
        if not computed:
            continue
        if layer is None:
            _pass_on(groups, flow, operation, computed)
            continue
        for value, role in ((computed[0], "readers"), (operation.outputs[0], "writers")):
            group = groups.group(value)
            getattr(group, role)[operation.module] = layer
            group.axes.add(1 if operation.function in CONVOLUTIONS else len(flow.shapes[value]) - 1)
        if reason := layers.reason_against(operation, computed, len(flow.shapes[computed[0]])):
            groups.pin([*computed, *operation.outputs], reason)
    groups.pin(flow.outputs, "it is an output of the model")
    found = groups.all()
    for group in found:
        if not group.reason and not group.readers:
            group.reason = "no layer reads it"
        elif not group.reason and len(group.axes) > 1:
            group.reason = "what is around it counts channels along different axes"
    return found


class _Layers:
    """The convolutions and linear layers of a model, and which of them may be scaled."""

    def __init__(self, model: nn.Module, trace: ForwardTrace) -> None:
        self._modules = dict(model.named_modules())
        self._runs = trace.calls
        self._products = Counter(op.module for op in trace.operations if self.find(op))
        self._uses = Counter(value for op in trace.operations for value in op.inputs)
        self._produced = {value for op in trace.operations for value in op.outputs}
        self._owners = Counter(
            tensor.untyped_storage().data_ptr()
            for module in self._modules.values()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )

    def find(self, operation: Operation) -> nn.Module | None:
        """The layer whose product an operation is."""
        layer = self._modules.get(operation.module)
        is_product = operation.function in CONVOLUTIONS | LINEAR
        return layer if is_product and isinstance(layer, _ConvNd | Linear) else None

    def reason_against(self, operation: Operation, computed: list[int], dims: int) -> str:
        """Why the layer of a product must stay as it is, "" if it may be scaled."""
        name = operation.module
        layer: Any = self._modules[name]
        parameters = [
            p
            for p in (layer._parameters.get("weight"), layer._parameters.get("bias"))
            if p is not None
        ]
        if self._runs[name] > 1 or self._products[name] > 1:
            return f"{name} runs several times in one forward"
        if (
            isinstance(layer, _ConvTransposeNd)
            or layer._parameters.get("weight") is None
            or len(computed) > 1
        ):
            return f"the weight of {name} is no plain parameter with the outputs first"
        if self._produced.intersection(operation.inputs[1:]):
            return f"{name} computes its weight or bias"
        is_read = any(self._uses[value] > 1 for value in operation.inputs[1:])
        if is_read or any(self._owners[p.untyped_storage().data_ptr()] > 1 for p in parameters):
            return f"a parameter of {name} is used elsewhere too"
        return "" if dims >= layer.weight.dim() else f"{name} is given no axis of samples"


def _pass_on(
    groups: _ChannelGroups, flow: Dataflow, operation: Operation, computed: list[int]
) -> None:
    """Tie input and output of a function that commutes with positive factors; pin those of any other."""
    (first, *others), output = computed, operation.outputs[0]
    shapes = [flow.shapes[value] for value in (first, output)]
    clamp = clamp_of(operation)
    if operation.function == "add" and len(others) == 1 and flow.shapes[others[0]] == shapes[0]:
        groups.join(first, others[0])
        groups.join(first, output)
    elif not others and (clamp == (0.0, inf) or operation.function in _ELEMENTWISE):
        groups.join(first, output)
    elif clamp is not None:
        groups.pin(
            [first, output], f"{operation.function} clamps it, and factors would move the bound"
        )
    elif not others and (operation.function in _POOLINGS or _keeps_channels(operation, shapes)):
        groups.join(first, output).axes.add(1)
    else:
        groups.pin(
            [*computed, *operation.outputs],
            f"{operation.function} does not commute with factors of its channels",
        )


def _keeps_channels(operation: Operation, shapes: list[tuple[int, ...]]) -> bool:
    """Whether a function that may mix channels does not here: zero padding, flattening single pixels, spatial means."""
    before, after = shapes
    if operation.function == "pad":
        given = operation.arguments
        is_zero = given.get("mode", given.get("2", "constant")) == "constant"
        return is_zero and not given.get("value", given.get("3", 0)) and before[:2] == after[:2]
    if operation.function in RESHAPES:
        return before[:2] == after[:2] and np.prod(before) == np.prod(after)
    if operation.function == "mean":
        return (
            len(before) == 4
            and after in (before[:2], (*before[:2], 1, 1))
            and before[1] not in before[2:]
        )
    return False


def _observe(model: nn.Module, batches: list[Any], groups: list[_Group]) -> Array:
    """Run all batches, collect what the groups need, return the outputs as one flat array."""
    with ExitStack() as hooks:
        for group in [group for group in groups if not group.reason]:
            for name, layer in group.readers.items():
                hook = layer.register_forward_pre_hook(
                    partial(_see_input, group, name), with_kwargs=True
                )
                hooks.callback(hook.remove)
        outputs: list[Array] = []
        with evaluating(model):
            for batch in tqdm(
                batches, desc="equalize" if groups else "verify", unit="batch", disable=None
            ):
                outputs.append(flatten_outputs(call_model(model, batch)))
    return np.concatenate(outputs)


def _see_input(group: _Group, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    x = next(iter((*args, *kwargs.values()))).detach().float()
    rows = (x if isinstance(layer, Linear) else x.movedim(1, -1)).flatten(0, -2)
    seen = _Seen(rows.abs().amax(0), rows.double().square().sum(0), len(rows))
    group.inputs[name] = seen.merge(group.inputs[name]) if name in group.inputs else seen


@torch.no_grad()
def _equalize(group: _Group) -> EqualizedTensor:
    """Choose the factors of one group and apply them."""
    writers, readers = tuple(group.writers), tuple(group.readers)
    if group.reason:
        return EqualizedTensor(writers, readers, 0.0, 0.0, group.reason)
    candidates = {exponent: _factors(group, exponent) for exponent in _EXPONENTS}
    base = _noise(group, torch.ones_like(candidates[1.0]))
    noise = {exponent: _noise(group, factors) for exponent, factors in candidates.items()}
    best = min(noise, key=lambda exponent: noise[exponent])
    if not noise[best] < 0.99 * base:
        return EqualizedTensor(
            writers, readers, 0.0, 0.0, "no factors are predicted to lower the noise"
        )
    factors = candidates[best]
    for layer in group.writers.values():
        layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(factors)
    for layer in group.readers.values():
        _by_input(layer, layer.weight).div_(_columns(layer, factors))
    return EqualizedTensor(writers, readers, best, float(10 * np.log10(base / noise[best])))


def _factors(group: _Group, exponent: float) -> torch.Tensor:
    """Positive factors `[C]`; 1 where the channel is dead. The largest value of the tensor stays."""
    ranges = torch.stack([seen.largest for seen in group.inputs.values()]).amax(0)
    weights = torch.stack([_largest_weight(layer) for layer in group.readers.values()]).amax(0)
    is_live = (ranges > 0) & (weights > 0)
    ranges, weights = (torch.where(is_live, values, values.max()) for values in (ranges, weights))
    factors = weights ** (1 - exponent) / ranges**exponent
    factors = (
        factors * (ranges.max() / (factors * ranges)[is_live].max())
        if bool(is_live.any())
        else factors
    )
    factors = factors.clamp(1 / _LARGEST, _LARGEST)
    return torch.where(is_live, factors, torch.ones_like(factors))


def _noise(group: _Group, factors: torch.Tensor) -> float:
    """Product over the readers of the noise predicted behind each (see the module), with these factors."""
    product = 1.0
    for name, layer in group.readers.items():
        seen = group.inputs[name]
        weight = (_by_input(layer, layer.weight) / _columns(layer, factors)).double()
        input_step = (factors * seen.largest).max().double() / _STEPS
        filter_steps = weight.abs().flatten(2).amax(2) / _STEPS  # [groups, filters]
        squares = (
            (factors.double().square() * seen.energy / seen.rows)
            .reshape(len(weight), 1, -1)
            .sum(-1)
        )
        from_weight = (filter_steps.square() * squares).sum() * weight[0, 0, 0].numel()
        product *= float(input_step.square() * weight.square().sum() + from_weight)
    return product


def _by_input(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight as `[groups, filters of a group, input channels of a group, kernel ...]`, a view."""
    return weight.detach().view(getattr(layer, "groups", 1), -1, *weight.shape[1:])


def _columns(layer: Any, factors: torch.Tensor) -> torch.Tensor:
    """Factors of the input channels in a shape that goes with `_by_input`."""
    return factors.reshape(getattr(layer, "groups", 1), 1, -1, *[1] * (layer.weight.dim() - 2))


def _largest_weight(layer: Any) -> torch.Tensor:
    """Of what reads each input channel, by the largest of the layer, `[Cin]`."""
    weight = _by_input(layer, layer.weight).abs()
    largest = weight.flatten(3).amax(3) if weight.dim() > 3 else weight
    largest = largest.amax(1).flatten().float()
    return largest / largest.max().clamp_min(torch.finfo(torch.float32).tiny)
