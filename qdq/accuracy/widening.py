"""Gives layers more channels, which carry nothing yet, so that `split_channels` finds room for copies.

How much noise a path adds to the outputs is measured: the model runs with only the tensors of the path rounded to int8.
How much of it the copies take away is predicted. The width that takes away most noise for its multiplications comes
first, until the next one costs too much or hardly matters.

Widths become multiples of 16: the tensor cores of a GPU multiply 16 channels of int8 together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.channel_paths import (
    INT8_STEPS,
    LEAST_FLOAT_DB,
    ChannelPath,
    find_free,
    rank_copies,
)
from qdq.errors import StateError
from qdq.nn.scaling import change_input
from qdq.nn.width import resize_layer
from qdq.text import printable
from qdq.work import Work

WIDTH_MULTIPLE = 16
"""Wider layers have a multiple of so many channels."""

_LEAST_SHARE = 0.01  # of the noise of all tensors, by which a width must lower it

Compare = Callable[[], float]
"""Runs the model and returns the SQNR of its outputs against those of the float model, in dB."""


class MacCounter:
    """MACs of the layers of paths, also after their sizes have changed.

    Args:
        paths: The paths, before they change.
        work: The MACs of the model, before it changes.
    """

    def __init__(self, paths: Iterable[ChannelPath], work: Work) -> None:
        self._layers: dict[str, Any] = {}
        for path in paths:
            self._layers.update(zip(path.names, path.layers, strict=True))
        self._total = max(work.total, 1)
        self._macs_of_weight = {}
        for name, layer in self._layers.items():
            self._macs_of_weight[name] = work.macs.get(name, 0) / max(layer.weight.numel(), 1)
        self._before = self._count()

    def share_of_channel(self, path: ChannelPath) -> float:
        """MACs of one channel of a path in its present layers, as a share of those of the model before."""
        macs = 0.0
        for name, layer in zip(path.names, path.layers, strict=True):
            macs += self._macs_of_weight[name] * layer.weight.numel() / path.num_channels
        return macs / self._total

    @property
    def share_added(self) -> float:
        """How many MACs the model has more, as a share of those before."""
        return (self._count() - self._before) / self._total

    def _count(self) -> float:
        macs = 0.0
        for name, layer in self._layers.items():
            macs += self._macs_of_weight[name] * layer.weight.numel()
        return macs


@dataclass(frozen=True)
class Noise:
    """What the rounding of some tensors adds to the worst output.

    Args:
        ratio: Squares of the noise over squares of the output.
        fault: Why it could not be measured, "" if it was.
    """

    ratio: float
    fault: str = ""


@dataclass
class _Candidate:
    """A path that has more channels worth a copy than free ones.

    Args:
        path: The path.
        shares: How much of the noise of the path each copy takes away that finds no free channel, 0..1, falling.
        noise: What the path adds to the outputs.
    """

    path: ChannelPath
    shares: list[float]
    noise: Noise

    @property
    def number(self) -> int:
        """How many channels the next width has more."""
        return WIDTH_MULTIPLE - self.path.num_channels % WIDTH_MULTIPLE

    @property
    def gain(self) -> float:
        """By how much the next width lowers the noise of the outputs."""
        added = self.path.added
        return self.noise.ratio * sum(self.shares[added : added + self.number])


def widen_paths(
    paths: Iterable[ChannelPath],
    layers: Iterable[nn.Module],
    compare: Compare,
    counter: MacCounter,
    extra_macs: float,
) -> None:
    """Add channels that carry nothing to the paths where copies gain most, in place.

    A path that could use more channels gets the reason why it does not have them.

    Args:
        paths: Those that may be split; their tensors were observed.
        layers: All layers whose inputs will be rounded.
        compare: See `Compare`.
        counter: Of the paths.
        extra_macs: How many MACs the model may have more, as a share of those that it has.
    """
    noise_of_all = _measure_noise(layers, compare)
    candidates = []
    for path in tqdm(list(paths), desc="widen", unit="path", disable=None):
        free = find_free(path)
        shares = [copy.share for copy in rank_copies(path, free)][len(free) :]
        if not shares:
            continue
        noise = _measure_noise([link.layer for link in path.links if link.is_rounded], compare)
        candidates.append(_Candidate(path, shares, noise))

    least = replace(noise_of_all, ratio=_LEAST_SHARE * noise_of_all.ratio)
    while True:
        affordable = []
        for candidate in candidates:
            path = candidate.path
            cost = candidate.number * counter.share_of_channel(path)
            path.refusal = _refuse(candidate, cost, least, extra_macs - counter.share_added)
            if not path.refusal:
                affordable.append((candidate.gain / cost, candidate))
        if not affordable:
            return
        _, best = max(affordable, key=lambda entry: entry[0])
        fault = _widen(best.path, best.number, compare)
        if fault:
            candidates.remove(best)
            best.path.refusal = fault
        else:
            best.path.least_share = least.ratio / best.noise.ratio


def _refuse(candidate: _Candidate, cost: float, least: Noise, rest: float) -> str:
    """Why a path does not get its next width, "" if it may.

    Args:
        candidate: The path.
        cost: MACs of the width beyond those of the present one, as a share of those of the model.
        least: The smallest gain that is worth a width.
        rest: The MACs that are left, as such a share.
    """
    number = f"{candidate.number} more"
    fault = least.fault or candidate.noise.fault
    if fault:
        return f"{number} were not tried: with rounded inputs {fault}"
    if not candidate.gain > least.ratio:
        return (
            f"{number} would lower the noise of the outputs by less than {100 * _LEAST_SHARE:.0f} %"
        )
    if not cost:
        return f"{number} were not tried: their MACs are unknown"
    if cost > rest:
        return f"{number} would take {100 * cost:.1f} % more MACs, and {100 * rest:.1f} % are left"
    return ""


def _widen(path: ChannelPath, number: int, compare: Compare) -> str:
    """Add channels to a path.

    Args:
        path: The path.
        number: How many.
        compare: Says whether the model still computes the same.

    Returns:
        Why that was taken back, such as the error of a layer that computes with its own number of channels; "" if the
        path is wider.
    """
    resize_path(path, number)
    try:
        float_db = compare()
    except Exception as error:  # the code of a layer may raise anything
        fault = f"{number} more cannot run: {printable(error, 80)}"
    else:
        if float_db >= LEAST_FLOAT_DB:
            return ""
        fault = f"{number} more changed the float outputs, SQNR {float_db:.1f} dB"
    resize_path(path, -number)
    return fault


def resize_path(path: ChannelPath, number: int) -> None:
    """Make a path wider, or take the last channels back that were added.

    Args:
        path: Its tensors were observed.
        number: Number of channels, which carry nothing; negative to take back.
    """
    resize_layer(path.writer, number, 0)
    for link in path.depthwise:
        resize_layer(link.layer, number, number)
    resize_layer(path.reader, 0, number)
    for link in path.links:
        assert link.num_inside is not None  # noqa: S101  # observed before
        link.num_inside = F.pad(link.num_inside, (0, number))
    path.added += number


def _measure_noise(layers: Iterable[nn.Module], compare: Compare) -> Noise:
    """What the rounding of the inputs of layers to int8 adds to the outputs.

    Args:
        layers: Convolutions and linear layers; others are left as they are.
        compare: See `Compare`.
    """
    with ExitStack() as hooks:
        for layer in layers:
            if isinstance(layer, _ConvNd | Linear):
                handle = layer.register_forward_pre_hook(_round_input, with_kwargs=True)
                hooks.callback(handle.remove)
        try:
            decibels = compare()
        except StateError:
            return Noise(0.0, "the outputs hold NaN or Inf")
        except Exception as error:  # the code of a model may raise anything
            return Noise(0.0, f"the model does not run: {printable(error, 80)}")
    if decibels == -inf:
        return Noise(0.0, "the number of outputs is another")
    return Noise(10 ** (-decibels / 10))


def _round_input(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return change_input(args, kwargs, _round)


def _round(values: torch.Tensor) -> torch.Tensor:
    """Round to int8, whose range ends at the largest value."""
    if not values.numel():  # such as a head without proposals
        return values
    step = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny) / INT8_STEPS
    return (values / step).round() * step
