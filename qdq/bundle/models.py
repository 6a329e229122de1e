"""The ONNX files of a bundle: for TensorRT up to 10, for TensorRT 11, and the float network of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from tqdm import tqdm

from qdq.build import has_type
from qdq.check.precision import measure_peaks
from qdq.errors import CheckError, ExportError
from qdq.graph.opset import LowerOpset
from qdq.graph.passes import run_passes
from qdq.graph.precision import ConvertPrecision
from qdq.graph.remove_pairs import RemovePairs
from qdq.graph.shapes import complete_shapes
from qdq.pairs import Pair
from qdq.trt.flags import HIGHEST_OPSET_OF_8

MODEL, HALF_MODEL = "model.onnx", "model.fp16.onnx"
FLOAT, HALF_FLOAT = "float.onnx", "float.fp16.onnx"


@dataclass(frozen=True)
class Variants:
    """The graphs of a bundle.

    Args:
        graphs: File name -> graph.
        notes: What could not be made, and why.
    """

    graphs: dict[str, ir.Model]
    notes: tuple[str, ...]


def make_variants(model: ir.Model, pairs: Sequence[Pair], *, with_float: bool) -> Variants:
    """Make the files for all versions of TensorRT from one graph.

    Args:
        model: A graph with Q/DQ, unchanged by this. If it has float16 tensors there is no file in float32.
        pairs: Inputs on which the range of values is measured: what exceeds float16 stays float32.
        with_float: Also make the networks without Q/DQ.

    Raises:
        ExportError: A network without Q/DQ was asked for and cannot be made.
    """
    graphs: dict[str, ir.Model] = {}
    notes: list[str] = []
    model = model.clone()
    complete_shapes(model)  # to lower the opset, types are needed
    unquantized = _remove_pairs(model) if with_float else None
    if has_type(model, ir.DataType.FLOAT16):
        notes.append(f"{MODEL} is left out: the network has float16 tensors, see {HALF_MODEL}.")
        graphs[HALF_MODEL] = model
        if unquantized is not None:
            graphs[HALF_FLOAT] = unquantized
        return Variants(graphs, tuple(notes))

    graphs[MODEL] = _lower(model, MODEL, notes)
    half = _convert(model, HALF_MODEL, pairs, notes)
    if half is not None:
        graphs[HALF_MODEL] = half
    if unquantized is None:
        return Variants(graphs, tuple(notes))

    graphs[FLOAT] = _lower(unquantized, FLOAT, notes)
    if half is not None:
        half_float = _convert(unquantized, HALF_FLOAT, pairs, notes)
        if half_float is not None:
            graphs[HALF_FLOAT] = half_float
    return Variants(graphs, tuple(notes))


def _remove_pairs(model: ir.Model) -> ir.Model:
    copy = model.clone()
    run_passes(copy, [RemovePairs()])
    return copy


def _lower(model: ir.Model, name: str, notes: list[str]) -> ir.Model:
    """A copy in the opset of TensorRT 8.6, or the graph itself and a note if there is none."""
    if model.opset_imports.get("", 0) <= HIGHEST_OPSET_OF_8:
        return model
    copy = model.clone()
    try:
        run_passes(copy, [LowerOpset(HIGHEST_OPSET_OF_8)])
    except ExportError as error:
        notes.append(f"{name} is not for TensorRT 8.6: {error.message}")
        return model
    return copy


def _convert(
    model: ir.Model, name: str, pairs: Sequence[Pair], notes: list[str]
) -> ir.Model | None:
    """A copy whose float part is float16; None and a note if it cannot be made."""
    copy = model.clone()
    try:
        peaks = _measure_peaks(model, pairs)
        run_passes(copy, [ConvertPrecision(ir.DataType.FLOAT16, peaks=peaks)])
    except (CheckError, ExportError) as error:
        notes.append(f"{name} is left out: {error.message}")
        return None
    return copy


def _measure_peaks(model: ir.Model, pairs: Sequence[Pair]) -> dict[str, float]:
    """The largest magnitude of each value on all pairs."""
    peaks: dict[str, float] = {}
    for pair in tqdm(pairs, desc="bundle (float16)", unit="pair", disable=None):
        for name, peak in measure_peaks(model, pair.inputs).items():
            peaks[name] = max(peak, peaks.get(name, 0.0))
    return peaks
