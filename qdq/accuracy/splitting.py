"""Copies channels into channels that carry nothing, so that the rounding of an activation counts less.

Many trained networks have channels that are constant for every input: their weights have decayed to nothing. Such a
free channel costs time and carries no information. Here it takes over a part of a channel whose rounding error counts
most, as in outlier channel splitting (Zhao et al., ICML 2019, arXiv 1901.09504), but without a wider layer.

A path is a layer that writes a tensor, depthwise convolutions after it, and the layer that reads the last of them, with
ReLU and other clamps between:

    writer -> clamp -> depthwise -> clamp -> reader

A channel and its n - 1 copies have the same rows in the writer and in the depthwise convolutions, and the reader adds
them up with a weight of 1/n. In front of each quantizer the copies differ by 1/n of the step of int8, in the bias.
Their mean is then rounded to a step that is n times as fine, and its squared error is n^2 times as small. The next bias
takes the shift back. This is exact except where the tensor is padded or clamped. There the copies err by less than half
a step, up and down alike.

In tensors behind a depthwise convolution the copies also carry different errors of the tensors before. There only the
mean of n independent errors counts, which is n times as small.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf, log10
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.float_layers import (
    ScalableLayers,
    list_unchanged,
    may_read_zeros,
    pads_zeros,
    require_float_model,
    returns_input,
    undoing_changes,
)
from qdq.accuracy.layerwise import FlatArrays, FlatOutputs, list_decibels
from qdq.batch import list_filled_batches
from qdq.dataflow import Dataflow, clamp_of
from qdq.device import without_tf32
from qdq.forward import Operation, call_model, evaluating, require_model, trace_forward
from qdq.nn.scaling import offset_of
from qdq.outputs import Mask, OutputView, Selection
from qdq.patterns import Pattern
from qdq.swap import SwapPlan, plan_swap

logger = logging.getLogger(__name__)

_STEPS = 127  # int8 codes between 0 and the end of a range
# Of the contribution of an ordinary channel, which rounding to float32 changes by a tenth of that.
_NEGLIGIBLE = 1e-6
_TINY = torch.finfo(torch.float64).tiny
_LEAST_SHARE = 0.01  # of the noise of a path, by which a copy must lower it
_LEAST_FLOAT_DB = 60.0  # a thousandth of the outputs; the noise of int8 is at 15 to 30 dB


@dataclass(frozen=True)
class SplitPath:
    """Result for one path.

    Args:
        layers: Names of the layers, in the order in which they run.
        channels: Number of channels.
        free: How many of them carry nothing.
        copied: For each copy, the channel that was copied.
        predicted_db: By how much the noise is lower that the rounding of the tensors of the path adds to its end, as
            predicted, in dB.
        reason: Why nothing was changed; empty if it was.
    """

    layers: tuple[str, ...]
    channels: int
    free: int
    copied: tuple[int, ...]
    predicted_db: float
    reason: str = ""


@dataclass(frozen=True)
class Splitting:
    """Result of `split_channels`.

    Args:
        paths: In the order in which they run.
        float_db: SQNR of the float outputs against those before the pass, on the same batches, in dB.
    """

    paths: tuple[SplitPath, ...]
    float_db: float

    def format_table(self) -> str:
        """Number of changed paths with their gains, and why others were left unchanged."""
        split = [path for path in self.paths if not path.reason]
        lines = [
            f"{len(split)} of {len(self.paths)} paths have channels split; "
            f"float model against the one before: {self.float_db:.1f} dB"
        ]
        for path in split:
            lines.append(
                f"  {path.layers[0]} to {path.layers[-1]}: channels {path.channels}, free {path.free}, "
                f"copied {len(path.copied)}; {path.predicted_db:.1f} dB less noise predicted"
            )
        lines += list_unchanged((path.reason, path.layers[0]) for path in self.paths)
        return "\n".join(lines)


@without_tf32()
def split_channels(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Splitting:
    """Copy the channels whose rounding counts most into channels that carry nothing; in place.

    Call it before `swap_modules`, after `fold_batchnorm`, `equalize_layers`, `smooth_inputs` and `center_inputs`. No
    layer gets another size. The float model changes a little, see the module; a change of its outputs by more than a
    thousandth (60 dB) is undone. After an error or Ctrl-C the model is as before. It is for int8: the rounding of FP8
    depends on the value, and a shift does not make it finer.

    The copies differ by a fraction of the step that the largest value gives. If calibration clips a range far below
    that, the step is finer and the gain smaller.

    Args:
        model: A float model.
        batches: As for `calibrate_model`.
        include: As for `swap_modules`: the inputs of layers that it would leave in float have no rounding.
        exclude: Likewise.
        outputs: Parts of the outputs that must not change, as for `predictor.predict`; None for all.
        mask: What leaves padding out of them, likewise.

    Returns:
        The paths that begin at each layer, and how far the float model has changed.

    Raises:
        ArgumentError: Outputs that do not exist.
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch with samples, or the mask fits no output.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    require_float_model(model, "split_channels")
    view = OutputView(outputs, mask)
    samples = list_filled_batches(batches)
    plan = plan_swap(model, samples[0], include=include, exclude=exclude)
    paths = _find_paths(model, samples[0], plan)
    expected = _observe(model, samples, view, paths)
    for path in paths:
        path.choose()
    changed = [path for path in paths if not path.reason]
    float_db = inf
    if changed:
        with undoing_changes(_list_layers(changed)):
            float_db = _split(changed, lambda: _compare(model, samples, view, expected))
    result = Splitting(tuple(path.result for path in paths), float_db)
    logger.info("%s", result.format_table())
    return result


def _split(paths: list[_Path], compare: Callable[[], float]) -> float:
    """Split all paths; if the float outputs change too much, split one by one and undo those that do so.

    Args:
        paths: Those that may be split.
        compare: Measures the float outputs against those before, in dB.

    Returns:
        The SQNR of the float outputs in dB.
    """
    with undoing_changes(_list_layers(paths)) as undo:
        for path in paths:
            path.apply()
        float_db = compare()
        if float_db >= _LEAST_FLOAT_DB:
            return float_db
        undo()

    float_db = inf
    for path in paths:
        with undoing_changes(path.layers) as undo:
            path.apply()
            moved_db = compare()
            if moved_db >= _LEAST_FLOAT_DB:
                float_db = moved_db
            else:
                undo()
                path.reason = f"undone: it changed the float outputs, SQNR {moved_db:.1f} dB"
    return float_db


def _compare(model: nn.Module, batches: list[Any], view: OutputView, expected: FlatArrays) -> float:
    """SQNR in dB of the outputs, of the worst one."""
    return min(list_decibels(expected, _observe(model, batches, view)).values())


def _list_layers(paths: Iterable[_Path]) -> list[Any]:
    """The layers of some paths."""
    return [layer for path in paths for layer in path.layers]


@dataclass
class _Link:
    """A layer of a path after the first one, and the tensor that it reads.

    Args:
        name: Name of the layer.
        layer: A depthwise convolution; the last one of a path reads all channels.
        bounds: Those of the clamp that wrote the tensor, minus the offset; infinite without a clamp.
        offset: What the layer subtracts from the tensor (`center_inputs`).
        pads: Whether the layer may read zeros around the tensor.
        is_rounded: Whether the layer will be quantized, and with it the tensor.
        largest: Largest absolute value of the tensor in the batches.
        num_inside: Number of values between the bounds, for each channel, `[C]`.
        num_values: Number of values of a channel.
    """

    name: str
    layer: Any
    bounds: tuple[float, float]
    offset: float
    pads: bool
    is_rounded: bool
    largest: float = 0.0
    num_inside: torch.Tensor | None = None
    num_values: int = 0

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Add the values of the tensor in one batch."""
        x = x.detach()
        if not isinstance(self.layer, Linear):
            x = x.movedim(1, -1)
        rows = x.flatten(0, -2)
        if not rows.numel():  # such as a head without proposals
            return
        low, high = self.bounds
        num_inside = ((rows > low) & (rows < high)).sum(0)
        if self.num_inside is not None:
            num_inside = num_inside + self.num_inside
        self.num_inside = num_inside
        self.num_values += len(rows)
        self.largest = max(self.largest, float(rows.abs().max()))

    @property
    def is_observed(self) -> bool:
        """Whether the tensor had values in the batches."""
        return self.num_values > 0

    @property
    def share_inside(self) -> torch.Tensor:
        """The share of values between the bounds, for each channel, float64 `[C]`. At a bound, nothing is rounded."""
        assert self.num_inside is not None  # noqa: S101  # collected before the choice
        return self.num_inside.double() / self.num_values

    @property
    def step(self) -> float:
        """The step of int8; 0 if the tensor is not rounded."""
        return self.largest / _STEPS if self.is_rounded else 0.0


@dataclass
class _Path:
    """A layer that writes a tensor, and the layers that read it and its depthwise convolutions.

    Args:
        name: Name of the layer that writes.
        writer: That layer.
        links: The layers after it, in order; the last one reads all channels.
        reason: Why the path must stay unchanged, "" if channels may be split.
        constants: Free channel -> the value that the last layer reads there.
        copies: Channel -> the free channels that become copies of it.
        predicted_db: By how much less noise is predicted at the end of the path, in dB.
    """

    name: str
    writer: Any
    links: list[_Link] = field(default_factory=list)
    reason: str = ""
    constants: dict[int, float] = field(default_factory=dict)
    copies: dict[int, list[int]] = field(default_factory=dict)
    predicted_db: float = 0.0

    @property
    def layers(self) -> list[Any]:
        return [self.writer, *(link.layer for link in self.links)]

    @property
    def depthwise(self) -> list[_Link]:
        return self.links[:-1]

    @property
    def reader(self) -> Any:
        return self.links[-1].layer

    @property
    def result(self) -> SplitPath:
        names = (self.name, *(link.name for link in self.links))
        copied: list[int] = []
        predicted_db = 0.0
        if not self.reason:
            for channel, free in self.copies.items():
                copied += [channel] * len(free)
            predicted_db = self.predicted_db
        return SplitPath(
            names,
            len(self.writer.weight),
            len(self.constants),
            tuple(copied),
            predicted_db,
            self.reason,
        )

    @torch.no_grad()
    def choose(self) -> None:
        """Find the free channels, and give each to the channel whose noise it lowers most."""
        if self.reason:
            return
        if not all(link.is_observed for link in self.links):
            self.reason = "its tensors are empty in the batches"
            return
        self.constants = _find_free(self)
        if not self.constants:
            self.reason = "no channel is free"
            return
        noise = _predict_noise(self)
        numbers = torch.ones_like(noise.of_first)
        before = float(noise.divide(numbers).sum())
        for free in self.constants:
            gains = noise.divide(numbers) - noise.divide(numbers + 1)
            gains[list(self.constants)] = 0.0
            channel = int(gains.argmax())
            if not float(gains[channel]) > _LEAST_SHARE * before:
                break
            self.copies.setdefault(channel, []).append(free)
            numbers[channel] += 1
        if not self.copies:
            self.reason = "no copy lowers the noise enough"
            return
        self.predicted_db = 10 * log10(before / float(noise.divide(numbers).sum()))

    @torch.no_grad()
    def apply(self) -> None:
        """Fold the constants of the free channels that are used into the last bias, and make the copies."""
        weight = self.reader.weight
        columns = _columns(self.reader)
        for free in (channel for copies in self.copies.values() for channel in copies):
            constant = self.constants[free]
            if constant:
                moved = columns[:, free].double().sum(1) * constant
                self.reader.bias.copy_(self.reader.bias.double() + moved)
        for channel, copies in self.copies.items():
            members = torch.tensor([channel, *copies], device=weight.device)
            weight[:, members] = weight[:, channel].unsqueeze(1) / len(members)
            for layer in self.layers[:-1]:
                layer.weight[members] = layer.weight[channel].clone()
                layer.bias[members] = layer.bias[channel].clone()
            self._shift(members)

    def _shift(self, members: torch.Tensor) -> None:
        """Shift the copies of a channel against each other in each tensor, and take that back in the next bias.

        Args:
            members: The channel and its copies.
        """
        number = len(members)
        fractions = (torch.arange(number, device=members.device).double() + 0.5) / number - 0.5
        layers = self.layers
        for before, link in zip(layers, self.links, strict=False):
            shifts = fractions * link.step
            before.bias[members] = (before.bias[members].double() + shifts).to(before.bias.dtype)
            if link is self.links[-1]:
                continue  # the shifts of all copies add up to 0
            sums = link.layer.weight[members].double().flatten(1).sum(1)
            moved = link.layer.bias[members].double() - sums * shifts
            link.layer.bias[members] = moved.to(link.layer.bias.dtype)


def _find_paths(model: nn.Module, inputs: Any, plan: SwapPlan) -> list[_Path]:
    """The path from each convolution and linear layer that reads all channels, in order."""
    quantized = {module.name for module in plan.of("quantize")}
    trace = trace_forward(model, inputs)
    flow = Dataflow(trace)
    layers = ScalableLayers(model, trace)
    paths = []
    for operation in flow.operations:
        layer = layers.find(operation)
        if layer is None or _is_depthwise(layer) or not flow.is_computed(operation.inputs[0]):
            continue
        path = _Path(operation.module, layer)
        path.reason = _reason_against(layers, flow, operation, needs_bias=True)
        if not path.reason:
            path.reason = _follow(path, flow, layers, operation.outputs[0], quantized)
        paths.append(path)
    return paths


def _follow(
    path: _Path, flow: Dataflow, layers: ScalableLayers, value: int, quantized: set[str]
) -> str:
    """Add the layers after the first one to a path.

    Args:
        path: The path.
        flow: The data flow of the model.
        layers: Its layers.
        value: Number of the tensor that the first layer writes.
        quantized: Names of the layers that will be quantized.

    Returns:
        Why the path must stay unchanged, "" if it may be split.
    """
    bounds, pads = (-inf, inf), False
    while True:
        if value in flow.outputs:
            return "it is an output of the model"
        readers = flow.list_readers(value)
        if len(readers) != 1:
            return f"{len(readers)} functions read it"
        (operation,) = readers
        layer: Any = layers.find(operation)
        if layer is None:
            narrowed = _bounds_behind(flow, operation, bounds)
            if narrowed is None and not _centers(layers, operation):
                return f"{operation.function} lies between it and the next layer"
            bounds = narrowed or bounds
            pads = pads or operation.function == "pad"
            value = operation.outputs[0]
            continue

        is_last = not _is_depthwise(layer)
        reason = _reason_against(layers, flow, operation, needs_bias=not is_last)
        if isinstance(layer, Linear) is not isinstance(path.writer, Linear):
            reason = reason or "its layers have different channel axes"
        if reason:
            return reason
        pads = pads or may_read_zeros(layer)
        is_rounded = operation.module in quantized
        offset = offset_of(layer)
        bounds = (bounds[0] - offset, bounds[1] - offset)
        path.links.append(_Link(operation.module, layer, bounds, offset, pads, is_rounded))
        if is_last:
            return ""
        value = operation.outputs[0]
        bounds, pads = (-inf, inf), False


def _bounds_behind(
    flow: Dataflow, operation: Operation, bounds: tuple[float, float]
) -> tuple[float, float] | None:
    """The bounds of a tensor behind a function that may lie on a path; None if another function may not.

    Args:
        flow: The data flow of the model.
        operation: The call.
        bounds: Those of its input.
    """
    clamp = clamp_of(operation)
    if clamp is not None:
        return max(bounds[0], clamp[0]), min(bounds[1], clamp[1])
    return bounds if returns_input(operation) or _pads_images(flow, operation) else None


def _pads_images(flow: Dataflow, operation: Operation) -> bool:
    """Whether a call puts zeros around the channels of images, and between none of them."""
    if operation.function != "pad" or not pads_zeros(operation):
        return False
    padding = operation.arguments.get("pad", operation.arguments.get("1", ()))
    dims = len(flow.shapes[operation.inputs[0]])
    return dims > 2 and len(padding) <= 2 * (dims - 2)


def _centers(layers: ScalableLayers, operation: Operation) -> bool:
    """Whether a call subtracts the offset of the layer that follows (`center_inputs`)."""
    return operation.function == "sub" and layers.is_shifted(operation.module)


def _reason_against(
    layers: ScalableLayers, flow: Dataflow, operation: Operation, *, needs_bias: bool
) -> str:
    """Why the layer of a product must stay unchanged, "" if it may be part of a path."""
    computed = [value for value in operation.inputs if flow.is_computed(value)]
    reason = layers.reason_against(operation, computed, len(flow.shapes[computed[0]]))
    if reason:
        return reason
    name = operation.module
    layer: Any = layers.find(operation)
    if getattr(layer, "groups", 1) > 1 and not _is_depthwise(layer):
        return f"{name} has groups, and not one filter for each channel"
    if any(0 in parameter.stride() for parameter in layer.parameters(recurse=False)):
        return f"a parameter of {name} is expanded: several of its values are one in memory"
    if _is_for_inference(layer):
        return f"{name} was created in torch.inference_mode, and can be changed only there"
    if needs_bias and layer.bias is None:
        return f"{name} has no bias; fold_batchnorm gives it one"
    return ""


def _is_for_inference(layer: Any) -> bool:
    """Whether a layer cannot be changed here, because it was created in inference mode."""
    return layer.weight.is_inference() and not torch.is_inference_mode_enabled()


def _is_depthwise(layer: Any) -> bool:
    """Whether each output channel of a layer comes from one input channel."""
    if not isinstance(layer, _ConvNd) or layer.groups == 1:
        return False
    return layer.groups == layer.in_channels == layer.out_channels


def _find_free(path: _Path) -> dict[int, float]:
    """The channels that are constant whatever the input is: how far they can move at the end of a path is negligible.

    Each weight of the first layer counts relative to the largest one that reads the same value, because the inputs may
    differ in scale. A channel is negligible relative to the median of all, which one loud channel does not move.

    Args:
        path: A path whose tensors were observed.

    Returns:
        Channel -> the value that the last layer reads there.
    """
    first = path.links[0]
    weights = path.writer.weight.double().abs()
    moves = (weights / weights.amax(0).clamp_min(_TINY)).flatten(1).sum(1)
    # In units of the tensor, so that it can be compared with what a constant changes at the edge of an image.
    moves = moves * (first.largest / moves.max().clamp_min(_TINY))
    constants = (path.writer.bias.double() - first.offset).clamp(*first.bounds)
    for link, after in zip(path.depthwise, path.links[1:], strict=True):
        if link.pads:
            moves = moves + constants.abs()
        weight = link.layer.weight.double().flatten(1)
        moves = moves * weight.abs().sum(1)
        constants = link.layer.bias.double() + weight.sum(1) * constants - after.offset
        constants = constants.clamp(*after.bounds)
    if path.links[-1].pads:
        moves = moves + constants.abs()
    moves = moves * _columns(path.reader).double().abs().sum((0, 2))
    moving = moves[moves > 0]
    if not len(moving):
        return {}
    is_free = moves <= _NEGLIGIBLE * moving.median()
    if path.reader.bias is None:
        is_free &= constants == 0
    return {int(channel): float(constants[channel]) for channel in is_free.nonzero()}


class _Noise(NamedTuple):
    """The squared errors that the rounding of each channel adds to all outputs of the last layer, float64 `[C]`.

    Args:
        of_first: From the first tensor of a path.
        of_others: From those after it.
    """

    of_first: torch.Tensor
    of_others: torch.Tensor

    def divide(self, numbers: torch.Tensor) -> torch.Tensor:
        """The noise of each channel in so many copies, float64 `[C]`; see the module."""
        return self.of_first / numbers**2 + self.of_others / numbers


def _predict_noise(path: _Path) -> _Noise:
    """The noise of each channel without copies.

    A rounded value has an error of a twelfth of the squared step, if it is not at a bound. The clamps after it pass on
    the share of it that is not at their bounds.
    """
    gains = _columns(path.reader).double().square().sum((0, 2)) * path.links[-1].share_inside
    noise = path.links[-1].step ** 2 / 12 * gains
    of_others = torch.zeros_like(noise)
    for link in reversed(path.depthwise):
        of_others = of_others + noise
        gains = gains * link.layer.weight.double().square().flatten(1).sum(1) * link.share_inside
        noise = link.step**2 / 12 * gains
    return _Noise(noise, of_others)


def _columns(layer: Any) -> torch.Tensor:
    """The weight of a layer without groups, `[Cout, Cin, taps]`."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.reshape(*weight.shape[:2], -1)


def _observe(
    model: nn.Module, batches: list[Any], view: OutputView, paths: Iterable[_Path] = ()
) -> FlatArrays:
    """Run all batches, collect the values of the tensors of paths, and return the outputs by name."""
    outputs = FlatOutputs(view)
    with ExitStack() as hooks, evaluating(model):
        for path in paths:
            if path.reason:
                continue
            for link in path.links:
                collect = partial(_collect_input, link)
                handle = link.layer.register_forward_pre_hook(collect, with_kwargs=True)
                hooks.callback(handle.remove)
        for batch in tqdm(batches, desc="split", unit="batch", disable=None):
            outputs.add(call_model(model, batch), batch)
    return outputs.join()


def _collect_input(link: _Link, _: nn.Module, args: Any, kwargs: Any) -> None:
    link.collect(next(iter((*args, *kwargs.values()))))
