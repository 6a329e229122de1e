"""The result of `to_tensorrt`: a verdict for each tensor and layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qdq.systems.grid import Verdict
from qdq.text import group_names, list_names

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor.

    Args:
        place: "weight", "input", or the name of a quantizer between layers.
        system: Its number system.
        verdict: "exact", "convert" or "refuse".
        reason: The property that does not fit, with its value; "" if it is exact.
        before_db: SQNR of the system's values, in dB: of a weight against the float weight, of an input against evenly
            spread values. None if it has the same values in int8, infinite if the system's values are all that is
            known.
        after_db: The same for the int8 values.
    """

    place: str
    system: str
    verdict: Verdict
    reason: str
    before_db: float | None = None
    after_db: float | None = None


@dataclass(frozen=True)
class LayerVerdict:
    """What becomes of a layer.

    Args:
        name: Dotted name.
        precision: "int8" or "float".
        tensors: The verdicts on its weight and its input.
        note: Why it is float, or what is still to do; "" if nothing.
    """

    name: str
    precision: str
    tensors: tuple[TensorVerdict, ...]
    note: str


@dataclass(frozen=True)
class MovedRounding:
    """A place where the emulation of a system rounds, and TensorRT does not, or elsewhere.

    Args:
        name: Dotted name of the layer.
        reason: What is rounded, and why it is not in TensorRT.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Transfer:
    """Result of `to_tensorrt`.

    Args:
        layers: All convolutions and linear layers.
        standing: The quantizers that stay between layers, such as before a sum.
        moved: Where the emulation rounds and TensorRT does not.
    """

    layers: tuple[LayerVerdict, ...]
    standing: tuple[TensorVerdict, ...]
    moved: tuple[MovedRounding, ...] = ()

    def format_table(self) -> str:
        """A line for each layer, with the SQNR before and after where something was converted."""
        lines = [self._count_int8()]
        for layer in self.layers:
            lines += _format_layer(layer)
        lines += map(_format_standing, self.standing)
        return "\n".join([*lines, *self._format_moved()])

    def format_summary(self) -> str:
        """As `format_table`, without what int8 represents exactly."""
        num_exact = 0
        lines = []
        for layer in self.layers:
            if layer.precision == "int8" and not layer.note and _are_exact(layer.tensors):
                num_exact += 1
            else:
                lines += _format_layer(layer)
        for tensor in self.standing:
            if not _are_exact([tensor]):
                lines.append(_format_standing(tensor))
        first = f"{self._count_int8()}, {num_exact} of them exactly"
        return "\n".join([first, *lines, *self._format_moved()])

    def _count_int8(self) -> str:
        num_int8 = sum(layer.precision == "int8" for layer in self.layers)
        return f"{num_int8} of {len(self.layers)} layers in int8"

    def _format_moved(self) -> list[str]:
        """The places with other rounding, those with the same reason together."""
        if not self.moved:
            return []
        lines = [f"  TensorRT rounds otherwise than the emulation at {len(self.moved)} places"]
        groups = group_names((place.reason, place.name) for place in self.moved)
        for reason, names in groups.items():
            lines.append(f"    {list_names(names, _SHOWN_NAMES)}: {reason}")
        return lines


def _are_exact(tensors: Iterable[TensorVerdict]) -> bool:
    return all(tensor.verdict == "exact" for tensor in tensors)


def _format_layer(layer: LayerVerdict) -> list[str]:
    line = f"  {layer.name}: {layer.precision}{_prefix(': ', layer.note)}"
    return [line, *(f"    {_format_tensor(tensor)}" for tensor in layer.tensors)]


def _format_standing(tensor: TensorVerdict) -> str:
    return f"  between layers: {_format_tensor(tensor)}"


def _prefix(separator: str, text: str) -> str:
    return separator + text if text else ""


def _format_tensor(tensor: TensorVerdict) -> str:
    line = f"{tensor.place}: {tensor.system}, {tensor.verdict}{_prefix(', ', tensor.reason)}"
    if tensor.before_db is None or tensor.after_db is None:
        return line
    if math.isinf(tensor.before_db):
        return f"{line}; SQNR of the conversion {tensor.after_db:.1f} dB"
    return f"{line}; SQNR {tensor.before_db:.1f} dB before, {tensor.after_db:.1f} dB after"
