"""The facts of a run about one layer, as plain data.

`layers.describe_layers` makes the records, which needs torch. Reading them from `report.json` does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, MinLen

HISTOGRAM_COLUMNS = 64

RULE = re.compile(r"\bR-[A-Z]+(?:-[A-Z0-9]+)*\b")
"""Finds the rules that a reason names."""

Count = Annotated[int, Ge(0)]
Size = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class MethodRange:
    """The range that one calibration method would choose.

    Args:
        amax: The range.
        clipped: Fraction of the values beyond it, 0 to 1.
    """

    amax: Size
    clipped: Size


@dataclass(frozen=True)
class TensorRecord:
    """One quantizer of a layer and the tensor that it quantizes.

    If quantizers share a range, the statistics of activations cover all their tensors together.

    Args:
        quantizer: Its dotted name.
        role: "input", "weight", or another name that the layer gives it.
        is_on: Whether it quantizes in the exported model.
        amax: The range; the largest of them if there are several. None if there is none.
        least_amax: The smallest of several ranges; `amax` if there is one.
        ranges: Number of ranges: one, or one per channel.
        method: The method that computed them; "" if none did.
        sqnr_db: SQNR of quantizing only this tensor, in dB; None if not known or infinite.
        clipped: Fraction of the values beyond the range, 0 to 1.
        methods: Calibration method -> the range that it would choose.
        histogram: Counts of |x| without zeros, in columns of equal width.
        histogram_end: Upper end of the last column.
        shares: The other quantizers that use the same range.
        unknown: Field -> the reason why it is empty.
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
    """The result of the analysis for a layer, or for the group that it was measured with.

    Args:
        unit: Name of the layer or group that was measured.
        layers: The layers in it.
        rank: Its place; 1 is the most sensitive.
        units: Number of layers and groups that were ranked.
        gain: Gain of the outputs with it in float, in the unit of the metric; None if only estimated, or not finite.
        low: Lower end of the 95 % interval; None if there is none.
        high: Upper end of the 95 % interval.
        sqnr_db: SQNR of the network's outputs in the state that was measured, in dB; None if infinite.
        is_exact: Whether it was measured; otherwise it was estimated.
        metric: The chosen metric in that state; None if the metric is SQNR, or is not finite.
        cost: Extra time in float compared with int8, in microseconds; None if times were not requested.
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
    """One layer, or one function call for which a rule has a reason.

    Args:
        name: Dotted name.
        kind: Class of the module, or the function.
        is_call: Whether it is a function call.
        precision: "int8", "FP8" or "float".
        reason: Why.
        rules: The rules that the reason names.
        tensors: Its quantizers.
        sensitivity: The result of the analysis; None if the analysis did not rank it.
        output_sqnr_db: SQNR of the layer's own output on float inputs with all its quantizers on, in dB.
        macs: Multiplications with an addition (MACs) for one sample.
        macs_share: Their fraction of the whole network's MACs, 0 to 1.
        weights: Number of weights.
        weight_bytes: Bytes of the weights in the exported file.
        engine: Type in the engine: "int8", "FP8", "float", or "mixed" for several kernels.
        kernels: The engine's names of its kernels.
        engine_note: The note of the census on it.
        reads: The layers whose outputs it reads, directly or through operations that are not layers.
        feeds: The layers that read its output.
        reads_input: Whether it reads the input of the network.
        writes_output: Whether it computes an output of the network.
        unknown: Field -> the reason why it is empty.
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
        """The quantizer with a role. For "input" it may be the first quantizer that is not the weight's."""
        for tensor in self.tensors:
            if tensor.role == role:
                return tensor
        if role != "input":
            return None
        for tensor in self.tensors:
            if tensor.role != "weight":
                return tensor
        return None
