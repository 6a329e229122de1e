"""The result of `to_tensorrt`: a verdict for each tensor and layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdq.systems.grid import Verdict


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
class Transfer:
    """Result of `to_tensorrt`.

    Args:
        layers: All convolutions and linear layers.
        standing: The quantizers that stay between layers, such as before a sum.
    """

    layers: tuple[LayerVerdict, ...]
    standing: tuple[TensorVerdict, ...]

    def format_table(self) -> str:
        """A line for each layer, with the SQNR before and after where something was converted."""
        num_int8 = sum(layer.precision == "int8" for layer in self.layers)
        lines = [f"{num_int8} of {len(self.layers)} layers in int8"]
        for layer in self.layers:
            lines.append(f"  {layer.name}: {layer.precision}{_prefix(': ', layer.note)}")
            lines += [f"    {_format_tensor(tensor)}" for tensor in layer.tensors]
        lines += [f"  between layers: {_format_tensor(tensor)}" for tensor in self.standing]
        return "\n".join(lines)


def _prefix(separator: str, text: str) -> str:
    return separator + text if text else ""


def _format_tensor(tensor: TensorVerdict) -> str:
    line = f"{tensor.place}: {tensor.system}, {tensor.verdict}{_prefix(', ', tensor.reason)}"
    if tensor.before_db is None or tensor.after_db is None:
        return line
    if math.isinf(tensor.before_db):
        return f"{line}; SQNR of the conversion {tensor.after_db:.1f} dB"
    return f"{line}; SQNR {tensor.before_db:.1f} dB before, {tensor.after_db:.1f} dB after"
