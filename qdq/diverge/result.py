"""How far the tensors of a file are from torch, and which is the first that differs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdq.text import list_names

_HALF_STEP = 0.5


@dataclass(frozen=True)
class TensorDistance:
    """How far a tensor of a file is from that of torch.

    A step (LSB) is that of the quantizer that reads the tensor; for the output of a layer or of the network, 1/127 of
    its largest value. If the shapes differ, there are no distances: they are NaN.

    Args:
        tensor: Its name in the file.
        name: The quantizer that reads it, the layer that computes it, or the output.
        kind: "quantizer", "layer" or "output".
        module: The module of the node that computes it in the file.
        median_lsb: Median distance in steps; values out of range count as the nearest code.
        p99_lsb: 99th percentile.
        max_lsb: Largest distance.
        sqnr_db: SQNR in dB.
        codes_differ: Fraction of the codes that differ, 0 to 1; None without a quantizer.
        tie_floor_db: SQNR in dB that torch itself has if it goes on from the codes of the file: so much comes from
            ties, and from earlier faults.
        excess_lsb: Distance in steps from what torch computes from the codes of the file: the largest one; in dumps of
            an engine the 99th percentile, because the types of dumps are rounded.
        limit_lsb: What arithmetic alone may leave of it.
        codes_excess: Largest distance in steps of the codes of the file from those of the same values; None without.
        misfit: "has shape ..., torch has ..." if the shapes differ, else "".
    """

    tensor: str
    name: str
    kind: str
    module: str
    median_lsb: float
    p99_lsb: float
    max_lsb: float
    sqnr_db: float
    codes_differ: float | None
    tie_floor_db: float
    excess_lsb: float
    limit_lsb: float
    codes_excess: float | None
    misfit: str

    @property
    def has_other_values(self) -> bool:
        """Whether what computes the tensor differs."""
        return bool(self.misfit) or not self.excess_lsb <= self.limit_lsb

    @property
    def has_other_codes(self) -> bool:
        """Whether its Q/DQ differ from the quantizer."""
        return self.codes_excess is not None and self.codes_excess > _HALF_STEP

    @property
    def is_beyond(self) -> bool:
        """Whether it is beyond its tie floor."""
        return self.has_other_values or self.has_other_codes


@dataclass(frozen=True)
class Divergence:
    """Result of `find_divergence`.

    Args:
        path: The file.
        source: What has run it.
        samples: Number of batches.
        tensors: The tensors in order of execution.
        causes: What is known to cause the first one beyond its tie floor.
        not_compared: Quantizers of the model without a tensor in the file.
        outputs_not_compared: Outputs of the network that were not compared, each with the reason.
        ignored: Dumps that were not recognised, each with the reason.
    """

    path: Path
    source: str
    samples: int
    tensors: tuple[TensorDistance, ...]
    causes: tuple[str, ...]
    not_compared: tuple[str, ...]
    outputs_not_compared: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def beyond(self) -> tuple[TensorDistance, ...]:
        """The tensors beyond their tie floor, in order of execution."""
        return tuple(tensor for tensor in self.tensors if tensor.is_beyond)

    @property
    def first(self) -> TensorDistance | None:
        """The first tensor beyond its tie floor."""
        return next(iter(self.beyond), None)

    def list_facts(self) -> dict[str, Any]:
        """All fields for JSON, with `is_beyond` of each tensor, and `first`, the name of the first one beyond or None.

        JSON has no infinite numbers and no NaN: they are "inf", "-inf" and "nan".
        """
        rows = []
        for tensor in self.tensors:
            rows.append({**_spell_numbers(asdict(tensor)), "is_beyond": tensor.is_beyond})
        first = None if self.first is None else self.first.name
        return {**asdict(self), "tensors": rows, "first": first}

    def format_table(self) -> str:
        """The tensors in order of execution, then the first one beyond its tie floor and the cause."""
        rows = [_TITLES, *map(_format_cells, self.tensors)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [f"{row[0]:{widths[0]}}", f"{row[1]:{widths[1]}}"]
            for cell, width in zip(row[2:], widths[2:], strict=True):
                cells.append(f"{cell:>{width}}")
            lines.append("  ".join(cells).rstrip())
        for text in self.ignored:
            lines.append(f"not recognised: {text}")
        if self.not_compared:
            names = list_names(self.not_compared, 5)
            lines.append(
                "not compared, because another quantizer has their pair, or their tensor was not dumped or has another "
                f"layout: {len(self.not_compared)} quantizers: {names}"
            )
        for text in self.outputs_not_compared:
            lines.append(f"not compared: output {text}")
        lines += self._summarize()
        return "\n".join(lines)

    def _summarize(self) -> list[str]:
        subject = f"{self.source} against torch on {self.samples} batches"
        if self.first is None:
            return [f"{subject}: none of {len(self.tensors)} tensors is beyond its tie floor"]
        first = self.first
        lines = [
            f"{subject}: {len(self.beyond)} of {len(self.tensors)} tensors are beyond their tie floor",
            f"first: {first.tensor} of {first.module or 'the network'} ({_describe_reader(first)})",
        ]
        lines += [f"cause: {cause}" for cause in self.causes]
        return lines


def _spell_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as text."""
    spelled = {}
    for name, value in fields.items():
        is_plain = not isinstance(value, float) or math.isfinite(value)
        spelled[name] = value if is_plain else str(value)
    return spelled


_TITLES = (
    "tensor",
    "module",
    "median LSB",
    "p99",
    "max",
    "SQNR dB",
    "codes differ",
    "tie floor dB",
    "",
)


def _format_cells(tensor: TensorDistance) -> tuple[str, ...]:
    codes = "-" if tensor.codes_differ is None else f"{100 * tensor.codes_differ:.2f}%"
    return (
        tensor.tensor,
        tensor.module,
        _format_number(tensor.median_lsb, 3),
        _format_number(tensor.p99_lsb, 3),
        _format_number(tensor.max_lsb, 3),
        _format_db(tensor.sqnr_db),
        codes,
        _format_db(tensor.tie_floor_db),
        "BEYOND" if tensor.is_beyond else "",
    )


def _format_db(decibels: float) -> str:
    return "exact" if decibels == math.inf else _format_number(decibels, 1)


def _format_number(number: float, decimals: int) -> str:
    return "-" if math.isnan(number) else f"{number:.{decimals}f}"


def _describe_reader(tensor: TensorDistance) -> str:
    if tensor.kind == "layer":
        return f"output of {tensor.name}"
    if tensor.kind == "output":
        return f"output {tensor.name} of the network"
    what = "codes" if tensor.has_other_codes and not tensor.has_other_values else "input"
    return f"{what} of {tensor.name}"
