"""Gives layers more channels, which carry nothing yet, so that `split_channels` finds room for copies.

How much noise a path adds to the outputs is measured: the model runs with only the tensors of the path rounded to int8.
How much of it the copies take away is predicted. The width that takes away most noise for its multiplications comes
first, until the next one costs too much or hardly matters.

Widths become multiples of 16: the tensor cores of a GPU multiply 16 channels of int8 together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import isinf
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import Linear
from tqdm import tqdm

from qdq.accuracy.channel_paths import INT8_STEPS, ChannelPath, find_free, rank_copies
from qdq.nn.width import narrow_layer, widen_layer
from qdq.text import printable
from qdq.work import Work

_MULTIPLE = 16
_LEAST_SHARE = 0.01  # of the noise of all tensors, by which a width must lower it
_LEAST_FLOAT_DB = 60.0  # channels of zeros change nothing but the order of sums

Compare = Callable[[], float]
"""Runs the model and returns the SQNR of its outputs against those of the float model, in dB."""


@dataclass
class _Candidate:
    """A path that has more channels worth a copy than free ones.

    Args:
        path: The path.
        shares: How much of the noise of the path each copy takes away that finds no free channel, 0..1, falling.
        macs: MACs of one channel, as a share of those of the model.
        noise: What the path adds to the outputs, as a ratio of squares.
    """

    path: ChannelPath
    shares: list[float]
    macs: float
    noise: float

    @property
    def number(self) -> int:
        """How many channels the next width has more."""
        return _MULTIPLE - self.path.num_channels % _MULTIPLE

    @property
    def gain(self) -> float:
        """By how much the next width lowers the noise of the outputs."""
        added = self.path.added
        return self.noise * sum(self.shares[added : added + self.number])

    @property
    def cost(self) -> float:
        """MACs of the next width beyond those of the present one, as a share of those of the model."""
        return self.macs * self.number


def widen_paths(
    paths: Iterable[ChannelPath],
    layers: Iterable[nn.Module],
    compare: Compare,
    work: Work,
    extra_macs: float,
) -> None:
    """Add channels that carry nothing to the paths where copies gain most, in place.

    A path that could use more channels gets the reason why it does not have them.

    Args:
        paths: Those that may be split; their tensors were observed.
        layers: All layers whose inputs will be rounded.
        compare: See `Compare`.
        work: MACs of the float model.
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
        macs = sum(work.macs.get(name, 0) for name in path.names) / max(work.total, 1)
        candidates.append(_Candidate(path, shares, macs / path.num_channels, noise))

    least = _LEAST_SHARE * noise_of_all
    while True:
        affordable = []
        for candidate in candidates:
            candidate.path.refusal = _refuse(candidate, least, extra_macs)
            if not candidate.path.refusal:
                affordable.append(candidate)
        if not affordable:
            return
        best = max(affordable, key=lambda candidate: candidate.gain / candidate.macs)
        extra_macs -= best.cost
        fault = _widen(best.path, best.number, compare)
        if fault:
            extra_macs += best.cost
            candidates.remove(best)
            best.path.refusal = fault


def _refuse(candidate: _Candidate, least: float, extra_macs: float) -> str:
    """Why a path does not get its next width, "" if it may.

    Args:
        candidate: The path.
        least: The smallest gain that is worth a width.
        extra_macs: The MACs that are left, as a share of those of the model.
    """
    number = f"{candidate.number} more"
    if isinf(least):
        return f"{number} were not tried: the number of outputs depends on the rounding"
    if not candidate.gain > least:
        return f"{number} would lower the noise of the outputs by less than {_LEAST_SHARE:.0%}"
    if not 0 < candidate.cost <= extra_macs:
        return (
            f"{number} would take {100 * candidate.cost:.1f} % more MACs, and "
            f"{100 * extra_macs:.1f} % are left"
        )
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
    add_channels(path, number)
    try:
        float_db = compare()
    except Exception as error:  # the code of a layer may raise anything
        fault = f"{number} more cannot run: {printable(error, 80)}"
    else:
        if float_db >= _LEAST_FLOAT_DB:
            return ""
        fault = f"{number} more changed the float outputs, SQNR {float_db:.1f} dB"
    drop_channels(path, number)
    return fault


def add_channels(path: ChannelPath, number: int) -> None:
    """Make a path wider.

    Args:
        path: Its tensors were observed.
        number: Number of channels, which carry nothing.
    """
    _resize(path, number, widen_layer)
    for link in path.links:
        assert link.num_inside is not None  # noqa: S101  # observed before
        link.num_inside = F.pad(link.num_inside, (0, number))
    path.added += number


def drop_channels(path: ChannelPath, number: int) -> None:
    """Take the last channels of a path back, which `add_channels` has added.

    Args:
        path: The path.
        number: Number of channels.
    """
    _resize(path, number, narrow_layer)
    for link in path.links:
        assert link.num_inside is not None  # noqa: S101  # observed before
        link.num_inside = link.num_inside[:-number]
    path.added -= number


def _resize(
    path: ChannelPath, number: int, resize_layer: Callable[[nn.Module, int, int], None]
) -> None:
    resize_layer(path.writer, number, 0)
    for link in path.depthwise:
        resize_layer(link.layer, number, number)
    resize_layer(path.reader, 0, number)


def _measure_noise(layers: Iterable[nn.Module], compare: Compare) -> float:
    """What the rounding of the inputs of layers to int8 adds to the outputs, as a ratio of squares.

    Args:
        layers: Convolutions and linear layers; others are left as they are.
        compare: See `Compare`.
    """
    with ExitStack() as hooks:
        for layer in layers:
            if isinstance(layer, _ConvNd | Linear):
                handle = layer.register_forward_pre_hook(_round_input, with_kwargs=True)
                hooks.callback(handle.remove)
        return float(10 ** (-compare() / 10))


def _round_input(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Round the first argument to int8, whose largest value in the batch is the end of the range."""
    if args:
        return (_round(args[0]), *args[1:]), kwargs
    name, values = next(iter(kwargs.items()))
    return args, {**kwargs, name: _round(values)}


def _round(values: torch.Tensor) -> torch.Tensor:
    if not values.numel():  # such as a head without proposals
        return values
    step = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny) / INT8_STEPS
    return (values / step).round() * step
