"""Statistics of a model: a record for each input and each output of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from qdq.distiller.ranges.clipping import RangeStatistics


@dataclass(frozen=True)
class TensorRecord(RangeStatistics):
    """The statistics of one tensor, see `RangeStatistics`.

    Args:
        shape: Shape of the first batch, as text; "" if it is not known.
        total_numel: Number of values in all batches; None if it is not known.
    """

    shape: str = ""
    total_numel: int | None = None


@dataclass
class LayerStatistics:
    """The statistics of a layer.

    Args:
        inputs: By position; inputs that are no floating-point tensors are left out.
        output: Of its output.
    """

    inputs: dict[int, TensorRecord]
    output: TensorRecord


ModelStatistics = dict[str, LayerStatistics]
"""Name of a layer, without a wrapper's `module.` -> its statistics."""
