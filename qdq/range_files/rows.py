"""What a model has to write: the range of every quantizer, under the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.range_files.format import Row
from qdq.range_files.places import Place, Places


def list_rows(
    model: nn.Module, places: Places, *, holds_channels: bool, int8_only: bool
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """The rows of every quantizer that can be written, and why the others cannot.

    Args:
        model: A calibrated model.
        places: From `list_places`.
        holds_channels: Whether the file has room for several ranges of a tensor, and so for weights.
        int8_only: Whether it is for int8 codes only.
    """
    rows: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for name, quantizer in named_quantizers(model):
        own = places.of[name]
        reason = _reason_against(quantizer, own, holds_channels=holds_channels, int8_only=int8_only)
        if not reason and not own:
            reason = places.reasons.get(name, "no tensor with a name is known for it")
        if reason:
            left_out[name] = reason
        else:
            rows[name] = [_row(quantizer, place) for place in own]
    return rows, left_out


def _reason_against(
    quantizer: TensorQuantizer, places: Sequence[Place], *, holds_channels: bool, int8_only: bool
) -> str:
    """Why a range is not written, "" if it is."""
    if not quantizer.is_enabled:
        return "it is disabled: its tensor stays in float"
    if quantizer.amax is None:
        return "it has no amax: calibrate first"
    if quantizer.format.unsigned or quantizer.format.narrow_range:
        return "its codes are unsigned or leave one out: a scale alone does not say so"
    if int8_only and quantizer.format.tensorrt_reason:
        return quantizer.format.tensorrt_reason
    if not holds_channels and (
        quantizer.axis is not None or any(place.is_weight for place in places)
    ):
        return "weights and ranges a channel have no place in such a file; tools take them from the weights"
    return ""


def _row(quantizer: TensorQuantizer, place: Place) -> Row:
    assert quantizer.amax is not None  # noqa: S101  # `_reason_against` has looked
    amax = quantizer.amax.detach().float().cpu().numpy()
    amax = amax.reshape(()) if quantizer.axis is None else amax.reshape(-1)
    return Row(
        place.tensor,
        amax,
        quantizer.range_axis,
        place.is_weight,
        quantizer.format,
        place.dequantize,
    )


def merge_rows(rows: Mapping[str, Sequence[Row]]) -> tuple[list[Row], dict[str, str]]:
    """One row a tensor: the largest range where quantizers with different ones stand at it.

    Returns:
        The rows by tensor, and quantizer -> what became of its range.
    """
    merged: dict[str, Row] = {}
    for row in (row for own in rows.values() for row in own):
        known = merged.setdefault(row.tensor, row)
        if known.amax.shape == row.amax.shape:
            merged[row.tensor] = replace(known, amax=np.asarray(np.maximum(known.amax, row.amax)))
    notes = {
        name: f"another quantizer of {row.tensor} has a larger range, which the file has for both"
        for name, own in rows.items()
        for row in own
        if not np.array_equal(merged[row.tensor].amax, row.amax)
    }
    return list(merged.values()), notes
