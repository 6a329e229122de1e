"""The rows of a file: the range of every quantizer of a model, under the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from torch import nn

from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.range_files.format import Row
from qdq.range_files.places import Place, Places


def list_rows(
    model: nn.Module, places: Places, *, holds_channels: bool, int8_only: bool
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """List the rows of every quantizer that can be written, and the reasons against all others.

    Args:
        model: A calibrated model.
        places: From `list_places`.
        holds_channels: Whether the file can store several ranges per tensor, and so weights.
        int8_only: Whether the file is for int8 codes only.
    """
    rows: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for name, quantizer in named_quantizers(model):
        places_of_quantizer = places.of[name]
        reason = _reason_against_quantizer(quantizer, int8_only=int8_only)
        if not reason and not holds_channels:
            reason = _reason_against_channels(quantizer, places_of_quantizer)
        if not reason and not places_of_quantizer:
            reason = places.reasons.get(name, "no tensor with a name is known for it")
        if reason:
            left_out[name] = reason
        else:
            rows[name] = [_make_row(quantizer, place) for place in places_of_quantizer]
    return rows, left_out


def _reason_against_quantizer(quantizer: TensorQuantizer, *, int8_only: bool) -> str:
    """Why the range of a quantizer cannot be written to any file, "" if it can.

    Args:
        quantizer: The quantizer.
        int8_only: Whether the file is for int8 codes only.
    """
    if not quantizer.is_enabled:
        return "it is disabled: its tensor stays in float"
    if quantizer.amax is None:
        return "it has no amax: calibrate first"
    if quantizer.format.unsigned or quantizer.format.narrow_range:
        return "its codes are unsigned or narrow-range, which a scale alone does not show"
    if quantizer.format.is_float:
        return "its codes are FP8, and the format has integer codes only"
    if int8_only and quantizer.format.tensorrt_reason:
        return quantizer.format.tensorrt_reason
    return ""


def _reason_against_channels(quantizer: TensorQuantizer, places: Sequence[Place]) -> str:
    """Why the range of a quantizer cannot be in a file of activations, "" if it can.

    Args:
        quantizer: The quantizer.
        places: Its places.
    """
    if quantizer.axis is None and not any(place.is_weight for place in places):
        return ""
    return (
        "the format has no weights and no ranges per channel; tools compute them from the weights"
    )


def _make_row(quantizer: TensorQuantizer, place: Place) -> Row:
    """The row of a quantizer at one of its places."""
    assert quantizer.amax is not None  # noqa: S101  # `_reason_against_quantizer` has looked
    amax = quantizer.amax.detach().float().cpu().numpy()
    return Row(
        tensor=place.tensor,
        amax=amax.reshape(()) if quantizer.axis is None else amax.reshape(-1),
        axis=quantizer.range_axis,
        is_weight=place.is_weight,
        format=quantizer.format,
        dequantize=place.dequantize,
    )


def merge_rows(rows: Mapping[str, Sequence[Row]]) -> tuple[list[Row], dict[str, str]]:
    """One row per tensor: the largest range if quantizers with different ranges quantize it.

    Args:
        rows: Quantizer -> its rows.

    Returns:
        The rows, and quantizer -> how its range was changed.
    """
    merged: dict[str, Row] = {}
    for row in chain.from_iterable(rows.values()):
        former = merged.setdefault(row.tensor, row)
        if former.amax.shape == row.amax.shape:
            largest = np.asarray(np.maximum(former.amax, row.amax))
            merged[row.tensor] = replace(former, amax=largest)

    notes = {}
    for name, rows_of_quantizer in rows.items():
        for row in rows_of_quantizer:
            if not np.array_equal(merged[row.tensor].amax, row.amax):
                notes[name] = (
                    f"another quantizer of {row.tensor} has a larger range, which the file uses for both"
                )
    return list(merged.values()), notes
