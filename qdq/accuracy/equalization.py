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
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from qdq.dataflow import CONVOLUTIONS, MAX_POOLINGS, Dataflow, clamp_of
from qdq.errors import DataError, StateError
from qdq.metrics import sqnr_db
from qdq.nn import QuantInputMixin
from qdq.trace import Operation, call_model, evaluating, require_batches, trace_forward

logger = logging.getLogger(__name__)

_COMMUTING = MAX_POOLINGS | frozenset(
    {
        *("leaky_relu", "dropout", "dropout2d", "contiguous", "clone", "detach"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    }
)
_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_STEPS = 127  # of a range, int8
_LARGEST = 16.0  # factor; a channel that needs more is almost dead on the data, and may not be elsewhere


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
    """

    tensors: tuple[EqualizedTensor, ...]
    float_db: float

    def format_table(self) -> str:
        """How many tensors were equalized, what it did to the float model, and what was left alone and why."""
        done = [tensor for tensor in self.tensors if not tensor.reason]
        lines = [
            f"{len(done)} of {len(self.tensors)} tensors equalized; the float model against itself before: "
            f"{self.float_db:.1f} dB"
        ]
        groups: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.reason:
                groups.setdefault(tensor.reason, []).append(", ".join(tensor.written_by))
        lines += [f"  {len(names)} ({names[0]} ...): {reason}" for reason, names in groups.items()]
        return "\n".join(lines)


def equalize_layers(model: nn.Module, batches: Iterable[Any]) -> Equalization:
    """Scale the channels between layers so that they use a common range better; in place.

    Call it after `fold_batchnorm` and before `swap_modules`. A tensor is left alone where one of its readers or writers
    is no convolution or linear layer, where it is an output of the model, or where less noise is not to be expected.

    Args:
        model: A float model.
        batches: Iterated once and kept; as for `calibrate_model`.

    Returns:
        What was done, and how exactly the float model was kept.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_batches(batches)
    kept = list(batches)
    if not kept:
        raise DataError("there is no batch to equalize on.", "give at least one, for instance of the calibration data.")
    if any(isinstance(module, QuantInputMixin) for module in model.modules()):
        raise StateError("the model has quantized layers.", "call equalize_layers before swap_modules.")
    groups = _find_groups(model, kept[0])
    before = _observe(model, kept, groups)
    done = [_equalize(group) for group in groups]
    return Equalization(tuple(done), sqnr_db(before, _observe(model, kept, [])))


@dataclass(frozen=True)
class _Seen:
    """What a layer read: the largest value and the sum of squares of each channel, `[C]`, and over how many rows."""

    largest: torch.Tensor
    energy: torch.Tensor
    rows: int

    def merge(self, other: _Seen) -> _Seen:
        return _Seen(torch.maximum(self.largest, other.largest), self.energy + other.energy, self.rows + other.rows)


@dataclass
class _Group:
    """Tensors that must be scaled alike, channel by channel, with the layers around them."""

    writers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    inputs: dict[str, _Seen] = field(default_factory=dict)


class _Groups:
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
    flow, modules, groups = Dataflow(trace), dict(model.named_modules()), _Groups()
    weights = Counter(op.inputs[1] for op in flow.operations if op.function in CONVOLUTIONS | {"linear"})
    produced = {value for op in flow.operations for value in op.outputs}
    groups.pin(flow.inputs, "it is an input of the model")
    for operation in flow.operations:
        layer = modules.get(operation.module)
        computed = [value for value in operation.inputs if flow.is_computed(value)]
        if not computed:
            continue
        if operation.function in CONVOLUTIONS | {"linear"} and (
            trace.calls[operation.module] == 1 and _is_plain(layer) and len(computed) == 1
            and weights[operation.inputs[1]] == 1 and operation.inputs[1] not in produced
            and (operation.function != "linear" or len(flow.shapes[computed[0]]) == 2)
        ):  # fmt: skip
            groups.group(computed[0]).readers[operation.module] = layer
            groups.group(operation.outputs[0]).writers[operation.module] = layer
        else:
            _pass_on(groups, flow, operation, computed)
    groups.pin(flow.outputs, "it is an output of the model")
    found = groups.all()
    for group in found:
        if not group.reason and not group.readers:
            group.reason = "no layer reads it"
    return found


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether the weight is a parameter, outputs first."""
    is_known = isinstance(layer, _ConvNd | Linear) and not isinstance(layer, _ConvTransposeNd)
    return is_known and layer is not None and isinstance(layer._parameters.get("weight"), nn.Parameter)


def _pass_on(groups: _Groups, flow: Dataflow, operation: Operation, computed: list[int]) -> None:
    """Tie input and output of a function that commutes with positive factors; pin those of any other."""
    (first, *others), output = computed, operation.outputs[0]
    shapes = [flow.shapes[value] for value in (first, output)]
    clamp = clamp_of(operation)
    if operation.function == "add" and len(others) == 1 and flow.shapes[others[0]] == shapes[0]:
        groups.join(first, others[0])
        groups.join(first, output)
    elif not others and clamp == (0.0, inf):
        groups.join(first, output)
    elif clamp is not None:
        groups.pin([first, output], f"{operation.function} clamps it, and factors would move the bound")
    elif not others and (operation.function in _COMMUTING or _keeps_channels(operation, shapes)):
        groups.join(first, output)
    else:
        groups.pin(
            [*computed, *operation.outputs], f"{operation.function} does not commute with factors of its channels"
        )


def _keeps_channels(operation: Operation, shapes: list[tuple[int, ...]]) -> bool:
    """Whether a function that may mix channels does not here: zero padding, flattening single pixels, spatial means."""
    before, after = shapes
    if operation.function == "pad":
        given = operation.arguments
        is_zero = given.get("mode", given.get("2", "constant")) == "constant"
        return is_zero and not given.get("value", given.get("3", 0)) and before[:2] == after[:2]
    if operation.function in ("flatten", "reshape", "view", "squeeze"):
        return before[:2] == after[:2] and np.prod(before) == np.prod(after)
    if operation.function == "mean":
        return len(before) == 4 and after in (before[:2], (*before[:2], 1, 1)) and before[1] not in before[2:]
    return False


def _observe(model: nn.Module, batches: list[Any], groups: list[_Group]) -> Any:
    """Run all batches, collect what the groups need, return the outputs as one flat array."""
    with ExitStack() as hooks:
        for group in [group for group in groups if not group.reason]:
            for name, layer in group.readers.items():
                hook = layer.register_forward_pre_hook(partial(_see_input, group, name), with_kwargs=True)
                hooks.callback(hook.remove)
        outputs: list[Any] = []
        with evaluating(model):
            for batch in tqdm(batches, desc="equalize" if groups else "verify", unit="batch", disable=None):
                leaves = [leaf for leaf in tree_leaves(call_model(model, batch)) if isinstance(leaf, torch.Tensor)]
                outputs += [leaf.float().cpu().numpy().ravel() for leaf in leaves if leaf.is_floating_point()]
    flat = np.concatenate(outputs)
    if not np.isfinite(flat).all():
        raise StateError("the outputs of the model hold NaN or Inf.", "check the float model on the same batches.")
    return flat


def _see_input(group: _Group, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    x = next(iter((*args, *kwargs.values()))).detach().float()
    rows = x.movedim(1, -1).flatten(0, -2)
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
        return EqualizedTensor(writers, readers, 0.0, 0.0, "no factors are predicted to lower the noise")
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
    factors = factors * (ranges.max() / (factors * ranges)[is_live].max()) if bool(is_live.any()) else factors
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
        squares = (factors.double().square() * seen.energy / seen.rows).reshape(len(weight), 1, -1).sum(-1)
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
