"""Match the entries of a file with quantizers, and compute their amax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from qdq.errors import CalibrationError, StateError
from qdq.nn import QuantMixin
from qdq.observers.max import reduce_amax
from qdq.quantizer import SharedQuantizer, TensorQuantizer, named_quantizers
from qdq.range_files.entry import Entry, Floats, describe_damage
from qdq.range_files.places import Place, Places
from qdq.swap import quantized_layers
from qdq.text import list_names

_MOST_LISTED = 20  # damaged entries in a message


@dataclass
class Match:
    """The match of a file and a model, before anything changes.

    Args:
        quantizers: By name, those that get a range.
        amaxes: By the same names; quantizers that share a range have the same array.
        notes: Quantizer -> what was changed to get its range.
        unmatched: Entry -> why it has no quantizer.
        missing: Quantizer -> why it has no entry.
        weights: Among the missing, those that get the maximum of each channel of their weight.
    """

    quantizers: dict[str, TensorQuantizer] = field(default_factory=dict)
    amaxes: dict[str, Floats] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    weights: list[tuple[TensorQuantizer, torch.Tensor]] = field(default_factory=list)

    def apply(self) -> None:
        """Give the quantizers their ranges: all of them, or none if one cannot take its range.

        Raises:
            StateError: A quantizer has a range of another shape.
        """
        for name, quantizer in self.quantizers.items():
            if quantizer.amax is not None and quantizer.amax.numel() != self.amaxes[name].size:
                raise StateError(
                    f"{name} has {quantizer.amax.numel()} ranges now, and would get {self.amaxes[name].size}; no range "
                    "of the model was changed.",
                    "swap the model again (restore_modules, swap_modules), and import before anything else sets amax.",
                )
        for name, quantizer in self.quantizers.items():
            quantizer.amax = torch.from_numpy(self.amaxes[name].copy())
        for quantizer, amax in self.weights:
            quantizer.amax = amax

    def ranges(self) -> dict[str, float | list[float]]:
        """The ranges as plain numbers."""
        ranges: dict[str, float | list[float]] = {}
        for name, amax in self.amaxes.items():
            ranges[name] = amax.reshape(-1).tolist() if amax.ndim else amax.item()
        return ranges


class _Mismatch(Exception):  # noqa: N818  # never leaves this file
    """An entry that does not fit its quantizer."""


@dataclass(frozen=True)
class _PlacedEntry:
    """An entry and its place.

    Args:
        key: Its name in the file.
        entry: The entry.
        place: A place of the quantizer.
    """

    key: str
    entry: Entry
    place: Place


def match_entries(model: nn.Module, places: Places, entries: Mapping[str, Entry]) -> Match:
    """Find the entries of all quantizers; the model does not change.

    Args:
        model: A swapped model.
        places: From `list_places`.
        entries: The entries of the file.

    Raises:
        CalibrationError: Nothing matches, an entry that a quantizer would get is damaged, or a weight that would have
            to replace an entry contains NaN or Inf.
    """
    if not entries:
        raise CalibrationError(
            "it contains no range.", "check that it is the right file, and complete."
        )
    matcher = _Matcher(model, places, entries)
    for members in _list_groups(model):
        matcher.match_group(members)
    return matcher.finish()


class _Matcher:
    """Matches the quantizers of a model group by group.

    Args:
        model: A swapped model.
        places: From `list_places`.
        entries: The entries of the file.
    """

    def __init__(self, model: nn.Module, places: Places, entries: Mapping[str, Entry]) -> None:
        self._places = places
        self._entries = entries
        self._weights = _list_weights(model)
        self._match = Match()
        self._used: set[str] = set()
        self._damage: dict[str, str] = {}

    def match_group(self, members: Mapping[str, TensorQuantizer]) -> None:
        """Find the common range of quantizers.

        Args:
            members: Quantizers by name; the first one holds the range.

        Raises:
            CalibrationError: NaN or Inf in a weight that has to replace an entry.
        """
        enabled = {}
        placed: list[_PlacedEntry] = []
        for name, quantizer in members.items():
            if quantizer.is_enabled:
                enabled[name] = quantizer
                placed += _find_entries(self._places.of[name], self._entries)
            else:
                self._match.missing[name] = "it is disabled: its tensor stays in float"

        leader = next(iter(members.values()))
        weight = self._weights.get(leader)
        shape = None if weight is None else tuple(weight.shape)
        try:
            amax, note = _combine(leader, self._select_usable(placed), shape)
        except _Mismatch as mismatch:
            for name in enabled:
                reason = self._reason_against(name, placed) or str(mismatch)
                self._add_missing(name, reason, leader, weight)
            return
        self._used.update(item.key for item in placed if not item.entry.problem)
        for name, quantizer in enabled.items():
            self._match.quantizers[name] = quantizer
            self._match.amaxes[name] = amax
            if note:
                self._match.notes[name] = note

    def _select_usable(self, placed: Iterable[_PlacedEntry]) -> list[_PlacedEntry]:
        """The entries without a problem; damaged ones are noted for the error of `finish`."""
        usable = []
        for item in placed:
            if not item.entry.problem:
                usable.append(item)
            elif item.entry.is_damaged:
                self._damage[item.key] = item.entry.problem
        return usable

    def _add_missing(
        self, name: str, reason: str, leader: TensorQuantizer, weight: nn.Parameter | None
    ) -> None:
        """Note a quantizer without an entry; a weight without a range gets its maximum.

        Args:
            name: The quantizer.
            reason: Why it has no entry.
            leader: The quantizer that holds its range.
            weight: The weight that it quantizes, if it does.

        Raises:
            CalibrationError: NaN or Inf in the weight.
        """
        if weight is not None and leader.amax is None:
            self._match.weights.append((leader, _weight_maxima(name, weight, leader.axis)))
            reason += "; the maximum of its weight is used"
        self._match.missing[name] = reason

    def _reason_against(self, name: str, placed: Sequence[_PlacedEntry]) -> str:
        """Why there is no usable entry, "" if there is one.

        Args:
            name: The quantizer.
            placed: The entries of its group.
        """
        if not self._places.of[name]:
            return self._places.reasons.get(name, "no tensor of the ONNX file was found for it")
        if not placed:
            return "the file has no entry for its tensor"
        problems = [item.entry.problem for item in placed]
        return problems[0] if all(problems) else ""

    def finish(self) -> Match:
        """The result, with the entries without a quantizer.

        Raises:
            CalibrationError: A quantizer would get a damaged entry, or nothing matches.
        """
        if self._damage:
            raise _damage_error(self._damage)
        for name, entry in self._entries.items():
            if name not in self._used:
                reason = entry.problem or "no enabled quantizer of the model quantizes it"
                self._match.unmatched[name] = reason
        if not self._match.amaxes:
            raise _mismatch_error(self._places, self._entries)
        return self._match


def _list_groups(model: nn.Module) -> list[dict[str, TensorQuantizer]]:
    """The quantizers that share one range, group by group.

    The quantizer that holds the range comes first in its group.
    """
    groups: dict[TensorQuantizer, dict[str, TensorQuantizer]] = {}
    shared = []
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, SharedQuantizer):
            shared.append((name, quantizer))
        else:
            groups[quantizer] = {name: quantizer}
    for name, quantizer in shared:
        groups.setdefault(quantizer.leader, {})[name] = quantizer
    return list(groups.values())


def _list_weights(model: nn.Module) -> dict[TensorQuantizer, nn.Parameter]:
    """The weights by their quantizers.

    A weight that is not a parameter of its layer, such as a parametrized one, is left out.
    """
    weights = {}
    for layer in quantized_layers(model).values():
        if isinstance(layer, QuantMixin):
            for attribute, name in layer.weights_of(layer).items():
                parameter = layer._parameters.get(name)
                if parameter is not None:
                    weights[getattr(layer, attribute)] = parameter
    return weights


def _weight_maxima(name: str, weight: nn.Parameter, axis: int | None) -> torch.Tensor:
    """The range that calibration gives a weight; most tools compute it from the weight and do not store it.

    Args:
        name: The quantizer, for messages.
        weight: The weight.
        axis: As for `reduce_amax`.

    Raises:
        CalibrationError: NaN or Inf in the weight.
    """
    amax = reduce_amax(weight, axis).cpu()
    damage = describe_damage("largest value", amax.detach().numpy(), smallest=0.0)
    if damage:
        raise CalibrationError(
            f"the weight of {name}: {damage}.", "load the weights again; the checkpoint is damaged."
        )
    return amax


def _find_entries(places: Iterable[Place], entries: Mapping[str, Entry]) -> list[_PlacedEntry]:
    """The entry of each place, by the most exact name in the file.

    Args:
        places: The places of one quantizer.
        entries: The entries of the file.
    """
    placed = []
    for place in places:
        key = next((name for name in place.names if name in entries), None)
        if key is not None:
            placed.append(_PlacedEntry(key, entries[key], place))
    return placed


def _combine(
    quantizer: TensorQuantizer, placed: Sequence[_PlacedEntry], shape: tuple[int, ...] | None
) -> tuple[Floats, str]:
    """The range that covers all entries, in the shape of the quantizer's range, and notes on changes.

    Args:
        quantizer: The quantizer that holds the range.
        placed: Entries without a problem.
        shape: Of the weight, if it quantizes one.

    Raises:
        _Mismatch: There is no entry, or an entry does not fit.
    """
    if not placed:
        raise _Mismatch("the file has no usable entry")
    notes: dict[str, None] = {}
    amaxes = []
    has_channels = False
    for item in placed:
        notes[item.entry.note] = None
        has_channels = has_channels or item.entry.amax.ndim > 0
        amaxes.append(_fit(quantizer, item, shape))

    if has_channels and quantizer.axis is None:
        notes["the largest of several channels"] = None
    if not has_channels and quantizer.axis is not None:
        notes["one range for all channels"] = None
    if any(not np.array_equal(amax, amaxes[0]) for amax in amaxes):
        notes["the largest range of the tensors that share it"] = None
    largest = np.asarray(np.max(amaxes, axis=0), np.float32)
    return largest, "; ".join(filter(None, notes))


def _fit(quantizer: TensorQuantizer, placed: _PlacedEntry, shape: tuple[int, ...] | None) -> Floats:
    """The range of an entry in the shape of the quantizer's range: 0-D per tensor, else from `_fit_channels`.

    Args:
        quantizer: The quantizer that holds the range.
        placed: The entry.
        shape: Of the weight, if it quantizes one.

    Raises:
        _Mismatch: As for `_fit_channels`.
    """
    if quantizer.axis is None:
        return np.asarray(placed.entry.amax.max(), np.float32)
    return _fit_channels(quantizer, placed, shape)


def _fit_channels(
    quantizer: TensorQuantizer, placed: _PlacedEntry, shape: tuple[int, ...] | None
) -> Floats:
    """A range for each channel, with the rank of the weight if there is one.

    Args:
        quantizer: One with an axis.
        placed: The entry.
        shape: Of the weight, if it quantizes one.

    Raises:
        _Mismatch: Another number of channels, or another axis.
    """
    axis = quantizer.axis
    assert axis is not None  # noqa: S101  # the caller has looked
    amax = placed.entry.amax
    num_channels = _count_channels(quantizer, axis, shape)
    if num_channels is None:
        num_channels = amax.size
    if amax.size not in (1, num_channels):
        raise _Mismatch(f"the file has {amax.size} ranges for its {num_channels} channels")
    axes = {placed.entry.axis, placed.place.axis} - {None}
    if amax.ndim and len(axes) > 1:
        raise _Mismatch(
            f"the ranges of the file are along axis {placed.entry.axis}, not along the outputs (R-AXIS)"
        )
    channels = np.broadcast_to(amax.reshape(-1), (num_channels,))
    if shape is None:
        return channels
    amax_shape = [1] * len(shape)
    amax_shape[axis] = -1
    return channels.reshape(amax_shape)


def _count_channels(
    quantizer: TensorQuantizer, axis: int, shape: tuple[int, ...] | None
) -> int | None:
    """The number of ranges that a quantizer has or needs; None if nothing shows it.

    Args:
        quantizer: One with an axis.
        axis: Its axis.
        shape: Of the weight, if it quantizes one.
    """
    if shape is not None:
        return shape[axis]
    return None if quantizer.amax is None else quantizer.amax.numel()


def _damage_error(problems: Mapping[str, str]) -> CalibrationError:
    """The error for entries with invalid numbers that quantizers would get."""
    texts = [f"{name}: {problem}" for name, problem in problems.items()]
    return CalibrationError(
        f"quantizers of the model would get invalid ranges: {list_names(texts, _MOST_LISTED, '; ')}.",
        "calibrate again with that tool: the file is damaged, cut off, or its calibration failed.",
    )


def _mismatch_error(places: Places, entries: Mapping[str, Entry]) -> CalibrationError:
    """The error for a file without any matching entry; it shows one name from each side."""
    tensors = [place.tensor for of_quantizer in places.of.values() for place in of_quantizer]
    expected = (
        f"the first tensor of a quantizer is {tensors[0]!r}"
        if tensors
        else "no quantizer has a tensor there"
    )
    name, entry = next(iter(entries.items()))
    reason = f" ({entry.problem})" if entry.problem else ""
    return CalibrationError(
        f"none of its {len(entries)} entries belongs to a quantizer of the model; the first is {name!r}{reason}, "
        f"{expected}.",
        "pass the calibrated ONNX file of this torch model as onnx=, and enable the quantizers to use.",
    )
