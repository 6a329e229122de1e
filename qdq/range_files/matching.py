"""Which entry of a file belongs to which quantizer, and the amax that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

_SHOWN = 20  # damaged entries in a message


@dataclass
class Match:
    """What a file says of a model, before anything is changed.

    Args:
        quantizers: By name, those that get a range.
        amaxes: By the same names; quantizers that share a range have the same array.
        notes: Quantizer -> what was changed on the way to its range.
        unmatched: Entry -> why no quantizer has it.
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
        """Give the quantizers their ranges: all, or none where one cannot take its.

        Raises:
            StateError: A quantizer has a range of another shape.
        """
        for name, quantizer in self.quantizers.items():
            if quantizer.amax is not None and quantizer.amax.numel() != self.amaxes[name].size:
                raise StateError(
                    f"{name} has {quantizer.amax.numel()} ranges now, and would get {self.amaxes[name].size}; no range "
                    "of the model was changed.",
                    "swap the model anew (restore_modules, swap_modules), and import before anything else sets amax.",
                )
        for name, quantizer in self.quantizers.items():
            quantizer.amax = torch.from_numpy(self.amaxes[name].copy())
        for quantizer, amax in self.weights:
            quantizer.amax = amax

    def ranges(self) -> dict[str, float | list[float]]:
        """The ranges as plain numbers."""
        return {
            name: amax.reshape(-1).tolist() if amax.ndim else amax.item()
            for name, amax in self.amaxes.items()
        }


class _Mismatch(Exception):  # noqa: N818  # never leaves this file
    """An entry that does not fit its quantizer."""


@dataclass(frozen=True)
class _Found:
    """An entry and the place that it stands for."""

    key: str
    entry: Entry
    place: Place


def match_entries(model: nn.Module, places: Places, entries: Mapping[str, Entry]) -> Match:
    """Find the entries of all quantizers; the model stays as it is.

    Args:
        model: A swapped model.
        places: From `list_places`.
        entries: What the file says.

    Raises:
        CalibrationError: Nothing matches, an entry that a quantizer would get holds numbers that no range has, or a
            weight that would have to stand in for an entry holds NaN or Inf.
    """
    if not entries:
        raise CalibrationError("it holds no range.", "check that it is the right file, and whole.")
    match = Match()
    used: set[str] = set()
    damage: dict[str, str] = {}
    weights = _list_weights(model)
    for members in _groups(model):
        enabled = {name: quantizer for name, quantizer in members.items() if quantizer.is_enabled}
        disabled = [name for name in members if name not in enabled]
        match.missing |= dict.fromkeys(disabled, "it is disabled: its tensor stays in float")
        found = [one for name in enabled for one in _find(places.of[name], entries)]
        damage |= {one.key: one.entry.problem for one in found if one.entry.is_damaged}
        usable = [one for one in found if not one.entry.problem]
        first = next(iter(members.values()))
        weight = weights.get(id(first))
        try:
            amax, note = _combine(first, usable, None if weight is None else tuple(weight.shape))
        except _Mismatch as mismatch:
            for name in enabled:
                match.missing[name] = _why_not(places, name, found) or str(mismatch)
                if weight is not None and first.amax is None:
                    match.weights.append((first, _maxima(name, weight, first.axis)))
                    match.missing[name] += "; the maximum of its weight was taken"
            continue
        used.update(one.key for one in usable)
        match.quantizers |= enabled
        match.amaxes |= dict.fromkeys(enabled, amax)
        match.notes |= dict.fromkeys(enabled, note) if note else {}
    if damage:
        raise _damaged(damage)
    match.unmatched |= {
        name: entry.problem or "no enabled quantizer of the model stands at it"
        for name, entry in entries.items()
        if name not in used
    }
    if not match.amaxes:
        raise _nothing(places, entries)
    return match


def _groups(model: nn.Module) -> list[dict[str, TensorQuantizer]]:
    """The quantizers that have one range together; the one that it is saved with comes first."""
    groups: dict[int, dict[str, TensorQuantizer]] = {}
    shared = []
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, SharedQuantizer):
            shared.append((name, quantizer))
        else:
            groups[id(quantizer)] = {name: quantizer}
    for name, quantizer in shared:
        groups.setdefault(id(quantizer.leader), {})[name] = quantizer
    return list(groups.values())


def _list_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """The weights by the identity of their quantizers."""
    return {
        id(getattr(layer, attribute)): parameter
        for layer in quantized_layers(model).values()
        if isinstance(layer, QuantMixin)
        for attribute, name in layer.weights_of(layer).items()
        if (parameter := layer._parameters.get(name)) is not None
    }


def _maxima(name: str, weight: nn.Parameter, axis: int | None) -> torch.Tensor:
    """The range that calibration gives a weight; most tools take it from the weight and write none down."""
    amax = reduce_amax(weight, axis)
    if damage := describe_damage("largest value", amax.cpu().numpy(), smallest=0.0):
        raise CalibrationError(
            f"the weight of {name}: {damage}.", "load the weights again; the checkpoint is damaged."
        )
    return amax


def _find(places: Sequence[Place], entries: Mapping[str, Entry]) -> Iterator[_Found]:
    """The entry of each place, by the most exact name that the file has."""
    for place in places:
        key = next((name for name in place.names if name in entries), None)
        if key is not None:
            yield _Found(key, entries[key], place)


def _why_not(places: Places, name: str, found: Sequence[_Found]) -> str:
    """Why there is no entry to use, "" if there is one."""
    if not places.of[name]:
        return places.reasons.get(name, "no tensor of the ONNX file was found for it")
    if not found:
        return "the file has no entry for its tensor"
    return "" if any(not one.entry.problem for one in found) else found[0].entry.problem


def _combine(
    quantizer: TensorQuantizer, found: Sequence[_Found], shape: tuple[int, ...] | None
) -> tuple[Floats, str]:
    """The range of all entries together, in the shape of the quantizer's, and what was changed."""
    if not found:
        raise _Mismatch("nothing found")
    notes = list(dict.fromkeys(one.entry.note for one in found if one.entry.note))
    if quantizer.axis is None:
        amaxes = [one.entry.amax.max() for one in found]
        if any(one.entry.amax.ndim for one in found):
            notes.append("the largest of several channels")
        result = np.asarray(max(amaxes), np.float32)
    else:
        amaxes = [_channels(quantizer, one, shape) for one in found]
        if all(one.entry.amax.ndim == 0 for one in found):
            notes.append("one range for all channels")
        result = np.max(amaxes, axis=0)
    if any(not np.array_equal(amax, amaxes[0]) for amax in amaxes):
        notes.append("the largest range of the tensors that share it")
    return result, "; ".join(notes)


def _channels(quantizer: TensorQuantizer, found: _Found, shape: tuple[int, ...] | None) -> Floats:
    """A range for each channel, with the rank of the weight where there is one."""
    axis, amax = quantizer.axis, found.entry.amax
    assert axis is not None  # noqa: S101  # the caller has looked
    known = quantizer.amax
    count = shape[axis] if shape is not None else known.numel() if known is not None else amax.size
    if amax.size not in (1, count):
        raise _Mismatch(f"the file has {amax.size} ranges for its {count} channels")
    if (
        amax.ndim
        and None not in (found.entry.axis, found.place.axis)
        and found.entry.axis != found.place.axis
    ):
        raise _Mismatch(
            f"the ranges of the file lie along axis {found.entry.axis}, not along the outputs (R-AXIS)"
        )
    channels = np.broadcast_to(amax.reshape(-1), (count,))
    if shape is None:
        return channels
    return channels.reshape([-1 if dim == axis % len(shape) else 1 for dim in range(len(shape))])


def _damaged(problems: Mapping[str, str]) -> CalibrationError:
    texts = [f"{name}: {problem}" for name, problem in problems.items()]
    return CalibrationError(
        f"quantizers of the model would get what no range is: {list_names(texts, _SHOWN, '; ')}.",
        "calibrate again with that tool: the file is damaged, cut off, or its calibration failed.",
    )


def _nothing(places: Places, entries: Mapping[str, Entry]) -> CalibrationError:
    sought = next((place.tensor for own in places.of.values() for place in own), None)
    name, entry = next(iter(entries.items()))
    reason = f" ({entry.problem})" if entry.problem else ""
    looked = (
        f"the first tensor that was looked for is {sought!r}"
        if sought
        else "no quantizer has a tensor there"
    )
    return CalibrationError(
        f"none of its {len(entries)} entries belongs to a quantizer of the model; the first is {name!r}{reason}, "
        f"{looked}.",
        "give onnx= the very file that was calibrated, made of this torch model; enable what shall be quantized.",
    )
