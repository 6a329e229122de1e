"""What a run knows of one layer, as plain data: written by `layers.describe_layers`, read without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, MinLen

HISTOGRAM_COLUMNS = 64
RULE = re.compile(r"\bR-[A-Z]+(?:-[A-Z0-9]+)*\b")  # in a reason
Count = Annotated[int, Ge(0)]
Size = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class MethodRange:
    """What a calibration method would choose.

    Args:
        amax: The range.
        clipped: Share of the values beyond it, 0..1.
    """

    amax: Size
    clipped: Size


@dataclass(frozen=True)
class TensorRecord:
    """One quantizer of a layer and the tensor that it quantizes.

    Where quantizers share a range, statistics of activations are of all their tensors together.

    Args:
        quantizer: Its dotted name.
        role: "input", "weight", or what the layer calls it.
        is_on: Whether it quantizes in the exported model.
        amax: The range; of several the largest. None if there is none.
        least_amax: The smallest of several ranges; `amax` if there is one.
        ranges: How many ranges: one, or one for each channel.
        method: How they were solved; "" if they were not.
        sqnr_db: Signal over error of quantizing this tensor alone, in dB; None if not known or infinite.
        clipped: Share of the values beyond the range, 0..1.
        methods: Calibration method -> what it would choose.
        histogram: Counts of |x| without zeros in columns of equal width.
        histogram_end: Where the last column ends.
        shares: The other quantizers that have the same range.
        unknown: Field -> why it holds nothing.
    """

    quantizer: str
    role: str
    is_on: bool
    amax: Size | None
    least_amax: Size | None
    ranges: Count
    method: str
    sqnr_db: float | None
    clipped: Size | None
    methods: Mapping[str, MethodRange]
    histogram: tuple[Count, ...]
    histogram_end: Size | None
    shares: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """What the analysis says of a layer, or of the group that it was measured in.

    Args:
        unit: Name of what was measured.
        layers: The layers in it.
        rank: Its place, 1 is the most sensitive.
        units: How many were ranked.
        gain: What leaving it in float gains, in the unit of the metric; None if it was only estimated, or not finite.
        low: Lower end of the 95 % interval; None where there is none.
        high: Its upper end.
        sqnr_db: SQNR of the network's outputs in the state that was measured, in dB; None if infinite.
        is_exact: Whether it was measured; otherwise estimated.
        metric: The chosen metric in that state; None if that is SQNR, or not finite.
        cost: What it costs more in float than in int8, in microseconds; None if times were not asked for.
    """

    unit: str
    layers: Annotated[tuple[str, ...], MinLen(1)]
    rank: Annotated[int, Ge(1)]
    units: Annotated[int, Ge(1)]
    gain: float | None
    low: float | None
    high: float | None
    sqnr_db: float | None
    is_exact: bool
    metric: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or one function call that a rule says something about.

    Args:
        name: Dotted name.
        kind: Class of the module, or the function.
        is_call: Whether it is a function call.
        precision: "int8" or "float".
        reason: Why.
        rules: The rules that the reason names.
        tensors: Its quantizers.
        sensitivity: What the analysis found; None if it says nothing.
        output_sqnr_db: Signal over error of the layer's own output on float inputs with all its quantizers on, in dB.
        macs: Multiplications with an addition for one sample.
        macs_share: Their part of the whole network's, 0..1.
        weights: Number of weights.
        weight_bytes: What they take in the exported file.
        engine: "int8", "float" or "mixed" (several kernels): what the engine runs.
        kernels: The engine's names of its kernels.
        engine_note: What the census says of it.
        reads: The layers whose outputs it reads, through whatever is no layer.
        feeds: The layers that read its output.
        reads_input: Whether it reads the input of the network.
        writes_output: Whether an output of the network comes from it.
        unknown: Field -> why it holds nothing.
    """

    name: str
    kind: str
    is_call: bool
    precision: str
    reason: str
    rules: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]
    sensitivity: Sensitivity | None
    output_sqnr_db: float | None
    macs: Count | None
    macs_share: Size | None
    weights: Count
    weight_bytes: Count
    engine: str | None
    kernels: tuple[str, ...]
    engine_note: str
    reads: tuple[str, ...]
    feeds: tuple[str, ...]
    reads_input: bool
    writes_output: bool
    unknown: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, role: str) -> TensorRecord | None:
        """The quantizer with a role; the first one for "input", whatever the layer calls it."""
        named = next((tensor for tensor in self.tensors if tensor.role == role), None)
        if named is None and role == "input":
            return next((tensor for tensor in self.tensors if tensor.role != "weight"), None)
        return named
