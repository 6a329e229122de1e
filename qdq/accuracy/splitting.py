"""Copies channels into channels that carry nothing, so that the rounding of an activation counts less.

Many trained networks have channels that are constant for every input: their weights have decayed to nothing. Such a
free channel costs time and carries no information. Here it takes over a part of a channel whose rounding error counts
most, as in outlier channel splitting (Zhao et al., ICML 2019, arXiv 1901.09504). Where that is not enough, `widening`
adds channels.

A channel and its n - 1 copies have the same rows in the layer that writes a path and in its depthwise convolutions, and
the layer that reads it adds them up with a weight of 1/n. In front of each quantizer the copies differ by 1/n of the
step of int8, in the bias. Their mean is then rounded to a step that is n times as fine. The next bias takes the shift
back. This is exact except where the tensor is padded or clamped. There the copies err by less than half a step, up and
down alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from math import inf, isfinite, log10
from numbers import Real
from typing import Any

import torch
from torch import nn

from qdq.accuracy.channel_paths import (
    LEAST_FLOAT_DB,
    ChannelPath,
    Copy,
    columns_of,
    find_free,
    find_paths,
    observe,
    rank_copies,
)
from qdq.accuracy.float_layers import list_unchanged, require_float_model, undoing_changes
from qdq.accuracy.layerwise import list_decibels
from qdq.accuracy.widening import WIDTH_MULTIPLE, MacCounter, resize_path, widen_paths
from qdq.batch import list_filled_batches
from qdq.device import without_tf32
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.forward import require_model
from qdq.nn.width import undoing_widths
from qdq.outputs import Mask, OutputView, Selection
from qdq.patterns import Pattern
from qdq.swap import plan_swap
from qdq.work import trace_work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitPath:
    """Result for one path.

    Args:
        layers: Names of the layers, in the order in which they run.
        channels: Number of channels before the pass.
        free: How many of them carry nothing.
        copied: For each copy, the channel that was copied.
        predicted_db: By how much the noise is lower that the rounding of the tensors of the path adds to its end, as
            predicted, in dB.
        reason: Why nothing was changed; empty if it was.
        added: By how many channels the path is wider.
    """

    layers: tuple[str, ...]
    channels: int
    free: int
    copied: tuple[int, ...]
    predicted_db: float
    reason: str = ""
    added: int = 0


@dataclass(frozen=True)
class Splitting:
    """Result of `split_channels`.

    Args:
        paths: In the order in which they run.
        float_db: SQNR of the float outputs against those before the pass, on the same batches, in dB.
        extra_macs: How many MACs the model has more, as a share of those before.
    """

    paths: tuple[SplitPath, ...]
    float_db: float
    extra_macs: float = 0.0

    def format_table(self) -> str:
        """Number of changed paths with their gains, and why others were left unchanged."""
        split = [path for path in self.paths if not path.reason]
        lines = [
            f"{len(split)} of {len(self.paths)} paths have channels split; "
            f"float model against the one before: {self.float_db:.1f} dB"
        ]
        if self.extra_macs:
            lines[0] += f", {100 * self.extra_macs:.1f} % more MACs"
        for path in split:
            lines.append(
                f"  {path.layers[0]} to {path.layers[-1]}: channels {path.channels}, free {path.free}, "
                f"added {path.added}, copied {len(path.copied)}; {path.predicted_db:.1f} dB less noise predicted"
            )
        lines += list_unchanged((path.reason, path.layers[0]) for path in self.paths)
        return "\n".join(lines)


@without_tf32()
def split_channels(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    extra_macs: float = 0.0,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] = (),
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Splitting:
    """Copy the channels whose rounding counts most into channels that carry nothing; in place.

    Call it before `swap_modules`, after `fold_batchnorm`, `equalize_layers`, `smooth_inputs` and `center_inputs`. The
    float model changes a little, see the module; a change of its outputs by more than a thousandth (60 dB) is undone.
    After an error or Ctrl-C the model is as before. It is for int8: the rounding of FP8 depends on the value, and a
    shift does not make it finer.

    The copies differ by a fraction of the step that the largest value gives. If calibration clips a range far below
    that, the step is finer and the gain smaller.

    Args:
        model: A float model.
        batches: As for `calibrate_model`.
        extra_macs: How many MACs the model may have more, as a share of those that it has: 0.05 for 5 %. With 0, no
            layer gets another size. Layers become wider only where that lowers the noise of the outputs by 1 %.
        include: As for `swap_modules`: the inputs of layers that it would leave in float have no rounding.
        exclude: Likewise.
        outputs: Parts of the outputs that must not change, as for `predictor.predict`; None for all.
        mask: What leaves padding out of them, likewise.

    Returns:
        The paths that begin at each layer, and how far the float model has changed.

    Raises:
        ArgumentError: Outputs that do not exist, or `extra_macs` below 0.
        ArgumentTypeError: One tensor or dictionary instead of batches, or `extra_macs` is no number.
        DataError: No batch with samples, or the mask fits no output.
        StateError: The model is swapped already, or its outputs hold NaN or Inf.
    """
    require_model(model)
    require_float_model(model, "split_channels")
    _require_share(extra_macs)
    view = OutputView(outputs, mask)
    samples = list_filled_batches(batches)
    plan = plan_swap(model, samples[0], include=include, exclude=exclude)
    trace, work = trace_work(model, samples[0])
    paths = find_paths(model, trace, plan)
    expected = observe(model, samples, view, paths, progress="split")

    def compare() -> float:
        return min(list_decibels(expected, observe(model, samples, view)).values())

    for path in paths:
        if not path.reason and not path.is_observed:
            path.reason = "its tensors are empty in the batches"
    open_paths = [path for path in paths if not path.reason]
    counter = MacCounter(open_paths, work)
    layers = _list_layers(open_paths)
    with undoing_changes(layers), undoing_widths(layers):
        if extra_macs:
            rounded = [model.get_submodule(module.name) for module in plan.of("quantize")]
            widen_paths(open_paths, rounded, compare, counter, extra_macs)
        splits = [_Split(path) for path in open_paths]
        for split in splits:
            split.choose()
        float_db = _apply([split for split in splits if split.copies], compare)

    chosen = {split.path.name: split for split in splits}
    results = []
    for path in paths:
        split = chosen.get(path.name, _Split(path))
        results.append(split.result)
    result = Splitting(tuple(results), float_db, counter.share_added)
    logger.info("%s", result.format_table())
    return result


def _require_share(extra_macs: float) -> None:
    """Refuse what is no share of the MACs.

    Raises:
        ArgumentError: It is below 0, NaN or infinite.
        ArgumentTypeError: It is no number.
    """
    if isinstance(extra_macs, bool) or not isinstance(extra_macs, Real):
        raise ArgumentTypeError(
            f"extra_macs is of type {type(extra_macs).__name__}; expected a share of the MACs.",
            "pass 0.05 for 5 %.",
        )
    if not isfinite(extra_macs) or extra_macs < 0:
        raise ArgumentError(
            f"extra_macs is {extra_macs}; expected a share of the MACs, such as 0.05 for 5 %.",
            "pass 0 to keep the size of every layer.",
        )


def _apply(splits: list[_Split], compare: Callable[[], float]) -> float:
    """Split all paths; if the float outputs change too much, split one by one and undo those that do so.

    Args:
        splits: Those that have copies.
        compare: Measures the float outputs against those before, in dB.

    Returns:
        The SQNR of the float outputs in dB.
    """
    if not splits:
        return inf
    with undoing_changes(_list_layers(split.path for split in splits)) as undo:
        for split in splits:
            split.apply()
        float_db = compare()
        if float_db >= LEAST_FLOAT_DB:
            return float_db
        undo()

    float_db = inf
    for split in splits:
        moved_db = _apply_alone(split, compare)
        if not split.path.reason:
            float_db = moved_db
    return float_db


def _apply_alone(split: _Split, compare: Callable[[], float]) -> float:
    """Split one path with as many copies as the float outputs allow.

    Args:
        split: It gets fewer copies, and its path fewer channels, if the outputs change too much. If they do so with a
            single copy, the path gets the reason.
        compare: As for `_apply`.

    Returns:
        The SQNR of the float outputs in dB, with the last number of copies that was tried.
    """
    path = split.path
    while True:
        with undoing_changes(path.layers) as undo:
            split.apply()
            moved_db = compare()
            if moved_db >= LEAST_FLOAT_DB:
                return moved_db
            undo()
        split.reduce(len(split.copies) // 2)
        if not split.copies:
            path.reason = f"undone: it changed the float outputs, SQNR {moved_db:.1f} dB"
            return moved_db


def _list_layers(paths: Iterable[ChannelPath]) -> list[Any]:
    """The layers of some paths."""
    return [layer for path in paths for layer in path.layers]


@dataclass
class _Split:
    """The copies of one path.

    Args:
        path: The path.
        free: Number of channels that carried nothing before it was made wider.
        constants: Free channel -> the value that the last layer reads there.
        copies: The copies, the one that lowers the noise most first.
    """

    path: ChannelPath
    free: int = 0
    constants: dict[int, float] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    @property
    def result(self) -> SplitPath:
        """What is said of the path."""
        path = self.path
        share = sum(copy.share for copy in self.copies)
        predicted_db = -10 * log10(1 - share) if share else 0.0
        return SplitPath(
            layers=path.names,
            channels=path.num_channels - path.added,
            free=self.free,
            copied=tuple(copy.channel for copy in self.copies),
            predicted_db=predicted_db,
            reason=path.reason,
            added=path.added,
        )

    @torch.no_grad()
    def choose(self) -> None:
        """Find the free channels, and give each to the channel whose noise it lowers most."""
        path = self.path
        self.constants = find_free(path)
        self.free = len(self.constants) - path.added
        self.copies = list(islice(rank_copies(path, self.constants), len(self.constants)))
        if self.copies:
            return
        path.reason = "no copy lowers the noise enough"
        if not self.constants:
            path.reason = "no channel is free"
            if path.refusal:
                path.reason += f"; {path.refusal}"
        self.reduce(0)

    def reduce(self, number: int) -> None:
        """Do without the copies that lower the noise least, and without added channels that are then not worth it.

        Args:
            number: How many copies stay at most.
        """
        path = self.path
        self.copies = self.copies[:number]
        gained = sum(copy.share for copy in self.copies[self.free :])
        if gained <= path.least_share:
            self.copies = self.copies[: self.free]
        needed = max(0, len(self.copies) - self.free)
        unused = path.added - needed
        if needed:
            unused -= unused % WIDTH_MULTIPLE
        if unused:
            resize_path(path, -unused)

    @torch.no_grad()
    def apply(self) -> None:
        """Fold the constants of the free channels that are used into the last bias, and make the copies."""
        reader = self.path.reader
        columns = columns_of(reader)
        members: dict[int, list[int]] = {}
        for free, copy in zip(self.constants, self.copies, strict=False):
            members.setdefault(copy.channel, [copy.channel]).append(free)
            constant = self.constants[free]
            if constant:
                moved = columns[:, free].double().sum(1) * constant
                reader.bias.copy_(reader.bias.double() + moved)
        for channel, numbers in members.items():
            self._copy(channel, torch.tensor(numbers, device=reader.weight.device))

    def _copy(self, channel: int, members: torch.Tensor) -> None:
        """Copy a channel.

        Args:
            channel: The channel.
            members: The channel and the free ones that become copies of it.
        """
        weight = self.path.reader.weight
        weight[:, members] = weight[:, channel].unsqueeze(1) / len(members)
        for layer in self.path.layers[:-1]:
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
        links = self.path.links
        for before, link in zip(self.path.layers, links, strict=False):
            shifts = fractions * link.step
            before.bias[members] = (before.bias[members].double() + shifts).to(before.bias.dtype)
            if link is links[-1]:
                continue  # the shifts of all copies add up to 0
            sums = link.layer.weight[members].double().flatten(1).sum(1)
            moved = link.layer.bias[members].double() - sums * shifts
            link.layer.bias[members] = moved.to(link.layer.bias.dtype)
