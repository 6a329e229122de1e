"""How far a correct engine may be from the references: the tie floor of a file, measured in ONNX Runtime."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qdq.check.parity import TIE_MARGIN_DB, OnnxModel
from qdq.graph.edits import add_initializer
from qdq.graph.pairs import constant_of, is_op
from qdq.metrics import Array, sqnr_db
from qdq.pairs import Pair

HALF_NUDGE = 2.0**-11
"""The largest relative error of rounding to float16."""

_NUDGE = "qdq.nudge"


@dataclass(frozen=True)
class Floor:
    """The distance from the references that rounding alone leaves in one output.

    Args:
        sqnr_db: SQNR in dB of all pairs together; None if it is exact.
        mean_square: Largest mean squared difference of a pair.
    """

    sqnr_db: float | None
    mean_square: float

    @property
    def required_sqnr_db(self) -> float | None:
        """The lowest SQNR of a correct engine in dB; None if it must be exact."""
        return None if self.sqnr_db is None else self.sqnr_db - TIE_MARGIN_DB

    @property
    def required_cosine(self) -> float:
        """The lowest cosine at that SQNR: an error of relative size r turns a vector by at most asin r."""
        if self.required_sqnr_db is None:
            return 1.0
        return math.sqrt(max(0.0, 1 - 10 ** (-self.required_sqnr_db / 10)))

    @property
    def most_mean_square(self) -> float:
        """The mean squared difference at which a pair is wrong, above 0."""
        smallest = float(np.finfo(np.float32).tiny)
        return max(smallest, self.mean_square * 10 ** (TIE_MARGIN_DB / 10))


def measure_floor(model: ir.Model, pairs: Sequence[Pair]) -> dict[str, Floor]:
    """Run a file with the inputs of all its quantizers, and its outputs, a little larger, and a little smaller.

    The figure is for an engine whose float part is float16. There a value before a quantizer may be off by 2^-11 of
    itself, and rounds to the other code if it is that close to a tie; later layers propagate the difference.

    Args:
        model: The file in float32, or with float16 tensors; unchanged by this.
        pairs: Inputs and the references of each output.

    Returns:
        Output name -> the worse of the two runs.

    Raises:
        CheckError: ONNX Runtime cannot run it.
    """
    floors: dict[str, Floor] = {}
    for direction in (1, -1):
        factor = 1 + direction * HALF_NUDGE
        outputs = run_pairs(_nudge(model, factor), pairs)
        for name in outputs[0]:
            references = [pair.quantized[name] for pair in pairs]
            nudged = [_scale(values[name], factor) for values in outputs]
            floor = _compare(references, nudged)
            floors[name] = _worse(floor, floors.get(name, floor))
    return floors


def run_pairs(model: ir.Model, pairs: Sequence[Pair]) -> list[dict[str, Array]]:
    """The outputs of each pair in ONNX Runtime, by name.

    Raises:
        CheckError: ONNX Runtime cannot run it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        file = OnnxModel(path)
        outputs = []
        for pair in pairs:
            arrays = file(*(pair.inputs[name] for name in file.inputs))
            outputs.append(dict(zip(file.outputs, arrays, strict=True)))
    return outputs


def measure_sqnr(
    references: Sequence[Mapping[str, Array]], outputs: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """SQNR in dB of each output over all pairs."""
    return {
        name: sqnr_db(
            [_flatten(arrays[name]) for arrays in references],
            [_flatten(arrays[name]) for arrays in outputs],
        )
        for name in references[0]
    }


def _nudge(model: ir.Model, factor: float) -> ir.Model:
    """A copy in which the input of every activation quantizer is multiplied."""
    copy = model.clone()
    graph = copy.graph
    factors: dict[ir.DataType, ir.Value] = {}
    for node in list(graph):
        if not is_op(node, "QuantizeLinear") or constant_of(node.inputs[0]) is not None:
            continue
        value = node.inputs[0]
        scale = node.inputs[1]
        if value is None or scale is None:
            continue
        dtype = value.dtype or scale.dtype or ir.DataType.FLOAT
        if dtype not in factors:
            array = np.array(factor, dtype.numpy())
            factors[dtype] = add_initializer(graph, f"{_NUDGE}.{dtype.name}", array)
        product = ir.node("Mul", [value, factors[dtype]])
        product.outputs[0].name = f"{value.name}{_NUDGE}.{node.name}"
        node.replace_input_with(0, product.outputs[0])
        graph.insert_before(node, product)
    return copy


def _scale(values: Array, factor: float) -> Array:
    """An output as float16 would round it; integers are exact."""
    if np.issubdtype(values.dtype, np.floating):
        return values * np.float64(factor)
    return values


def _compare(references: Sequence[Array], outputs: Sequence[Array]) -> Floor:
    decibels = sqnr_db(list(map(_flatten, references)), list(map(_flatten, outputs)))
    mean_squares = []
    for reference, output in zip(references, outputs, strict=True):
        difference = reference.astype(np.float64) - output
        mean_squares.append(float(np.mean(difference**2)))
    return Floor(None if math.isinf(decibels) else decibels, max(mean_squares))


def _flatten(values: Array) -> Array:
    """As `[1, values]` in float64: one sample of any form."""
    return values.astype(np.float64).reshape(1, -1)


def _worse(first: Floor, second: Floor) -> Floor:
    decibels = [floor.sqnr_db for floor in (first, second) if floor.sqnr_db is not None]
    lowest = min(decibels, default=None)
    return Floor(lowest, max(first.mean_square, second.mean_square))
