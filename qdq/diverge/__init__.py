"""The first tensor in which a file or an engine differs from torch, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from tqdm import tqdm

from qdq.batch import list_filled_batches
from qdq.build import has_type
from qdq.check.load import load_onnx, require_whole
from qdq.check.parity import FLOAT_ROUNDING
from qdq.diverge.causes import explain_values, find_causes
from qdq.diverge.compare import BFLOAT16_ROUNDING, ENGINE_ROUNDING, Comparison
from qdq.diverge.dumps import read_dumps
from qdq.diverge.file_run import FileRun
from qdq.diverge.places import find_moved_layers, find_places
from qdq.diverge.record import list_layers, list_quantizers
from qdq.diverge.result import Divergence as Divergence
from qdq.diverge.result import TensorDistance as TensorDistance
from qdq.errors import ArgumentError, DataError
from qdq.files import as_path
from qdq.forward import require_model
from qdq.metrics import Array
from qdq.nn import QuantMixin
from qdq.nn.scaling import is_shifted, list_offsets
from qdq.text import printable


def find_divergence(
    model: nn.Module,
    onnx: Path | str,
    batches: Iterable[Any],
    *,
    dumps: Path | str | None = None,
) -> Divergence:
    """Compare the tensors of a file with those of the torch model that it was exported from, in order of execution.

    The input of every quantizer and the output of every layer with weights are compared. torch runs twice: as it is,
    and once more with the codes that the file has computed. The second run tells ties from faults: a code that fell on
    the other side of a tie is then the same in both, so what remains is the difference of the operators between two
    quantizers. It is judged by the rounding of float32, or of float16 for an engine.

    Args:
        model: The calibrated model that was exported.
        onnx: The file.
        batches: Samples, as for `calibrate_model`; one or two are enough.
        dumps: Folder with the debug tensors that an engine has written for the first batch. They are compared instead
            of the tensors of ONNX Runtime.

    Raises:
        ArgumentError: No quantizer of the model is in the file.
        CheckError: The file cannot be read or run.
        DataError: No batch, no dump that fits the first one, or no tensor that can be compared.
    """
    require_model(model)
    path = as_path(onnx, "onnx")
    loaded = load_onnx(path)
    require_whole(loaded)
    batches = list_filled_batches(batches)
    quantizers = list_quantizers(model)
    layers = _list_comparable_layers(model, loaded.model.graph)
    tensors: Mapping[str, Array] = {}
    ignored: tuple[str, ...] = ()
    if dumps is not None:
        batches = batches[:1]
        shapes = _measure_shapes(loaded.model, quantizers, layers, batches[0])
        content = read_dumps(as_path(dumps, "dumps"), shapes)
        tensors, ignored = content.tensors, content.ignored

    with FileRun(loaded.model, quantizers, layers, tensors) as file:
        if not file.places.quantizers:
            raise ArgumentError(
                f"no quantizer of the model has its name in {printable(path)}.",
                "give the file that export_onnx wrote for this model.",
            )
        rounding = _choose_rounding(loaded.model, is_engine=dumps is not None)
        comparison = Comparison(model, file, None if dumps is None else tensors, rounding)
        for batch in tqdm(batches, desc="diverge", unit="batch", disable=None):
            comparison.add(batch)
        rows = comparison.conclude()
        if not rows:
            raise DataError(
                f"no tensor of {printable(path)} could be compared with torch.",
                "give the model that was exported, and all tensors that the engine dumped.",
            )
        last = comparison.last

    result = Divergence(
        path=path,
        source="ONNX Runtime" if dumps is None else f"the engine of {len(tensors)} dumps",
        samples=len(batches),
        tensors=tuple(rows),
        causes=(),
        not_compared=tuple(sorted(quantizers.keys() - {row.name for row in rows})),
        outputs_not_compared=tuple(map(": ".join, comparison.outputs_not_compared.items())),
        ignored=ignored,
    )
    if result.first is None:
        return result
    site = last.site_of[result.first]
    misfit = result.first.misfit
    causes = [
        *([f"it {misfit}"] if misfit else explain_values(*last.values_of[site])),
        *find_causes(model, loaded.model, batches[0], site),
    ]
    return replace(result, causes=tuple(causes))


def _list_comparable_layers(model: nn.Module, graph: ir.Graph) -> dict[str, nn.Module]:
    """The layers whose output in the file is that of torch; behind the others, the next quantizer is compared."""
    layers = list_layers(model)
    offsets = list_offsets(model)
    if not offsets:
        return layers
    biases = {}
    for name, layer in layers.items():
        bias: torch.Tensor | None = layer._parameters.get("bias")
        if isinstance(layer, QuantMixin) and is_shifted(layer):
            bias = layer.find_moved_bias()
        if bias is not None:
            biases[name] = bias.detach().float().cpu().numpy()
    moved = find_moved_layers(graph, biases, offsets)
    return {name: layer for name, layer in layers.items() if name not in moved}


def _measure_shapes(
    model: ir.Model, quantizers: Collection[str], layers: Collection[str], batch: Any
) -> dict[str, tuple[int, ...]]:
    """Name of each tensor that may be compared -> its shape for a batch in ONNX Runtime."""
    places = find_places(model, quantizers, layers, add_outputs=False)
    with FileRun(model, quantizers, layers, {}) as file:
        arrays = file(batch)
    names = [str(value.name) for value in places.list_values(model)]
    return {name: arrays[name].shape for name in names if name in arrays}


def _choose_rounding(model: ir.Model, *, is_engine: bool) -> float:
    """What the types of a file, or an engine, may leave as a fraction of the largest value of a tensor."""
    if has_type(model, ir.DataType.BFLOAT16):
        return BFLOAT16_ROUNDING
    if is_engine or has_type(model, ir.DataType.FLOAT16):
        return ENGINE_ROUNDING
    return FLOAT_ROUNDING
