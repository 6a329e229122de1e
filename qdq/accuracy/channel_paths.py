"""The paths along which channels can be copied, and how much the rounding of each channel counts at the end of a path.

A path is a layer that writes a tensor, depthwise convolutions after it, and the layer that reads the last of them, with
ReLU and other clamps between:

    writer -> clamp -> depthwise -> clamp -> reader
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.float_layers import (
    ScalableLayers,
    may_read_zeros,
    pads_zeros,
    returns_input,
)
from qdq.accuracy.layerwise import FlatArrays, FlatOutputs
from qdq.dataflow import Dataflow, clamp_of
from qdq.forward import ForwardTrace, Operation, call_model, evaluating
from qdq.nn.scaling import offset_of
from qdq.outputs import OutputView
from qdq.swap import SwapPlan

INT8_STEPS = 127
"""The codes between 0 and the end of a range."""

LEAST_FLOAT_DB = 60.0
"""What the float outputs must keep: they change by a thousandth at most. The noise of int8 is at 15 to 30 dB."""

# Of the contribution of an ordinary channel, which rounding to float32 changes by a tenth of that.
_NEGLIGIBLE = 1e-6
_TINY = torch.finfo(torch.float64).tiny
_LEAST_SHARE = 0.01  # of the noise of a path, by which a copy must lower it


@dataclass
class Link:
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
        return self.largest / INT8_STEPS if self.is_rounded else 0.0


@dataclass
class ChannelPath:
    """A layer that writes a tensor, and the layers that read it and its depthwise convolutions.

    Args:
        name: Name of the layer that writes.
        writer: That layer.
        links: The layers after it, in order; the last one reads all channels.
        reason: Why the path must stay unchanged, "" if channels may be split.
        added: By how many channels it was made wider.
        least_share: Of its noise, what the added channels must take away to be worth their multiplications.
        refusal: Why it was not made wider, or not more; "" if that was not asked.
    """

    name: str
    writer: Any
    links: list[Link] = field(default_factory=list)
    reason: str = ""
    added: int = 0
    least_share: float = 0.0
    refusal: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return (self.name, *(link.name for link in self.links))

    @property
    def layers(self) -> list[Any]:
        """The layers, in the order in which they run."""
        return [self.writer, *(link.layer for link in self.links)]

    @property
    def depthwise(self) -> list[Link]:
        """The depthwise convolutions."""
        return self.links[:-1]

    @property
    def reader(self) -> Any:
        """The layer that reads all channels."""
        return self.links[-1].layer

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return len(self.writer.weight)

    @property
    def is_observed(self) -> bool:
        """Whether every tensor had values in the batches."""
        return all(link.is_observed for link in self.links)


def find_paths(model: nn.Module, trace: ForwardTrace, plan: SwapPlan) -> list[ChannelPath]:
    """The path from each convolution and linear layer that reads all channels, in order.

    Args:
        model: A float model.
        trace: The record of a forward.
        plan: Says which layers will be quantized.

    Returns:
        The paths, also those that must stay unchanged, with the reason.
    """
    quantized = {module.name for module in plan.of("quantize")}
    flow = Dataflow(trace)
    layers = ScalableLayers(model, trace)
    paths = []
    for operation in flow.operations:
        layer = layers.find(operation)
        if layer is None or is_depthwise(layer) or not flow.is_computed(operation.inputs[0]):
            continue
        path = ChannelPath(operation.module, layer)
        path.reason = _reason_against(layers, flow, operation, needs_bias=True)
        if not path.reason:
            path.reason = _follow(path, flow, layers, operation.outputs[0], quantized)
        paths.append(path)
    return paths


def _follow(
    path: ChannelPath, flow: Dataflow, layers: ScalableLayers, value: int, quantized: set[str]
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

        is_last = not is_depthwise(layer)
        reason = _reason_against(layers, flow, operation, needs_bias=not is_last)
        if isinstance(layer, Linear) is not isinstance(path.writer, Linear):
            reason = reason or "its layers have different channel axes"
        if reason:
            return reason
        pads = pads or may_read_zeros(layer)
        is_rounded = operation.module in quantized
        offset = offset_of(layer)
        bounds = (bounds[0] - offset, bounds[1] - offset)
        path.links.append(Link(operation.module, layer, bounds, offset, pads, is_rounded))
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
    if getattr(layer, "groups", 1) > 1 and not is_depthwise(layer):
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


def is_depthwise(layer: Any) -> bool:
    """Whether each output channel of a layer comes from one input channel.

    Args:
        layer: Any layer.
    """
    if not isinstance(layer, _ConvNd) or layer.groups == 1:
        return False
    return layer.groups == layer.in_channels == layer.out_channels


@torch.no_grad()
def find_free(path: ChannelPath) -> dict[int, float]:
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
    moves = moves * columns_of(path.reader).double().abs().sum((0, 2))
    moving = moves[moves > 0]
    if not len(moving):
        return {}
    is_free = moves <= _NEGLIGIBLE * moving.median()
    if path.reader.bias is None:
        # A constant that the reader multiplies by zeros need not go to its bias.
        constants[columns_of(path.reader).abs().sum((0, 2)) == 0] = 0.0
        is_free &= constants == 0
    return {int(channel): float(constants[channel]) for channel in is_free.nonzero()}


class Noise(NamedTuple):
    """The squared errors that the rounding of each channel adds to all outputs of the last layer, float64 `[C]`.

    The mean of n copies is rounded to a step that is n times as fine, so its squared error is n^2 times as small. In
    tensors behind a depthwise convolution, the copies also carry different errors of the tensors before. There only the
    mean of n independent errors counts, which is n times as small.

    Args:
        of_first: From the first tensor of a path.
        of_others: From those after it.
    """

    of_first: torch.Tensor
    of_others: torch.Tensor

    def divide(self, numbers: torch.Tensor) -> torch.Tensor:
        """The noise of each channel in so many copies, float64 `[C]`.

        Args:
            numbers: Number of copies of each channel, the channel itself included, `[C]`.
        """
        return self.of_first / numbers**2 + self.of_others / numbers


@torch.no_grad()
def predict_noise(path: ChannelPath) -> Noise:
    """The noise of each channel without copies.

    A rounded value has an error of a twelfth of the squared step, if it is not at a bound. The clamps after it pass on
    the share of it that is not at their bounds.

    Args:
        path: A path whose tensors were observed.
    """
    gains = columns_of(path.reader).double().square().sum((0, 2)) * path.links[-1].share_inside
    noise = path.links[-1].step ** 2 / 12 * gains
    of_others = torch.zeros_like(noise)
    for link in reversed(path.depthwise):
        of_others = of_others + noise
        gains = gains * link.layer.weight.double().square().flatten(1).sum(1) * link.share_inside
        noise = link.step**2 / 12 * gains
    return Noise(noise, of_others)


def columns_of(layer: Any) -> torch.Tensor:
    """The weight of a layer without groups, `[Cout, Cin, taps]`.

    Args:
        layer: A convolution or linear layer.
    """
    weight: torch.Tensor = layer.weight.detach()
    return weight.reshape(*weight.shape[:2], -1)


@dataclass(frozen=True)
class Copy:
    """A copy of a channel.

    Args:
        channel: The channel.
        share: By how much it lowers the noise of the path, as a share of the noise without copies, 0..1.
    """

    channel: int
    share: float


def rank_copies(path: ChannelPath, free: Iterable[int]) -> Iterator[Copy]:
    """The copies that lower the noise of a path, each the best one after those before it, until one gains too little.

    Args:
        path: A path whose tensors were observed.
        free: The channels that carry nothing: they are not copied.
    """
    noise = predict_noise(path)
    excluded = list(free)
    numbers = torch.ones_like(noise.of_first)
    before = float(noise.divide(numbers).sum())
    while True:
        gains = noise.divide(numbers) - noise.divide(numbers + 1)
        gains[excluded] = 0.0
        channel = int(gains.argmax())
        gain = float(gains[channel])
        if not gain > _LEAST_SHARE * before:
            return
        yield Copy(channel, gain / before)
        numbers[channel] += 1


def observe(
    model: nn.Module,
    batches: list[Any],
    view: OutputView,
    paths: Iterable[ChannelPath] = (),
    *,
    progress: str = "",
) -> FlatArrays:
    """Run all batches, collect the values of the tensors of paths, and return the outputs by name.

    Args:
        model: The model.
        batches: As for `calibrate_model`.
        view: Which outputs count.
        paths: Those with a reason are left out.
        progress: Title of the progress bar; none without.
    """
    outputs = FlatOutputs(view)
    with ExitStack() as hooks, evaluating(model):
        for path in paths:
            if path.reason:
                continue
            for link in path.links:
                collect = partial(_collect_input, link)
                handle = link.layer.register_forward_pre_hook(collect, with_kwargs=True)
                hooks.callback(handle.remove)
        hides_progress = None if progress else True
        for batch in tqdm(batches, desc=progress, unit="batch", disable=hides_progress):
            outputs.add(call_model(model, batch), batch)
    return outputs.join()


def _collect_input(link: Link, _: nn.Module, args: Any, kwargs: Any) -> None:
    link.collect(next(iter((*args, *kwargs.values()))))
