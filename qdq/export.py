"""The QDQ ONNX file: `torch.onnx.export(dynamo=True)`, then the passes of `graph/`, then a look at what was lost."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only

import qdq
from qdq.check.rules import find_violations
from qdq.errors import ArgumentError, ExportError
from qdq.formats import Format
from qdq.graph.coverage import WeightedNode, count_qdq, list_weighted_nodes
from qdq.graph.names import NameNodes
from qdq.graph.opset import HIGHEST, LOWEST, LowerOpset
from qdq.graph.passes import run_passes
from qdq.graph.weights import QuantizeWeights
from qdq.nn import QuantMixin
from qdq.quantizer import named_quantizers, quantize_codes
from qdq.run import write_atomic
from qdq.swap import quantized_layers
from qdq.trace import evaluating, split_inputs

logger = logging.getLogger(__name__)

MIN_OPSET, MAX_OPSET = LOWEST, 23  # TensorRT 10 and onnxruntime end near 23


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size.
        inputs: Shape of each input; a dynamic dimension is a name.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        layers: Every quantized layer of the model and the ONNX nodes it became.
    """

    path: Path
    opset: int
    file_bytes: int
    inputs: dict[str, list[int | str]]
    quantize_nodes: int
    dequantize_nodes: int
    layers: dict[str, list[str]]


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: Path | str,
    *,
    opset: int = 19,
    dynamic_batch: bool = True,
    weights: str = "int8",
) -> ExportReport:
    """Export a calibrated model as QDQ ONNX for TensorRT.

    Scales are 0-D per tensor and 1-D per channel with the axis written down, zero points are int8 zeros, nodes carry
    the names of the torch modules. The file is written whole or not at all.

    Args:
        model: A swapped and calibrated model. Disabled quantizers leave no trace in the file.
        example_inputs: One batch, as for `calibrate_model`: a tensor `[B, ...]`, `(inputs, labels)` or a dictionary.
        path: Where to write.
        opset: 13 to 23; 19 is the first with fp16 scales, and TensorRT 10.0 still reads it. Below 18 the model is
            written at 18 and lowered, exactly or not at all.
        dynamic_batch: Leave the first dimension of every input open.
        weights: "int8" stores codes and a DQ; "float" stores float weights with Q and DQ (four times as large).

    Raises:
        ArgumentError: An option out of range.
        ExportError: A quantizer without amax or of a format that TensorRT refuses; a model that torch.export cannot
            capture; a batch dimension that the model fixes; operators newer than the opset; Q/DQ lost on the way.
    """
    path = Path(path)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ArgumentError(f"opset is {opset}; it must be {MIN_OPSET} to {MAX_OPSET}.", "use 19.")
    if weights not in ("int8", "float"):
        raise ArgumentError(f"weights is {weights!r}; known are 'int8' and 'float'.", "use 'int8'.")
    _require_exportable(model)
    exported = _capture(model, example_inputs, max(opset, HIGHEST), dynamic_batch)  # torch writes none below
    if dynamic_batch:
        _require_dynamic_batch(exported)
    passes: list[ir.passes.InPlacePass] = [NameNodes()]
    if weights == "int8":
        passes.append(QuantizeWeights(_int8_codes))
    passes += [RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass()]
    if opset < HIGHEST:
        passes.append(LowerOpset(opset))
    run_passes(exported, passes)
    layers = _require_complete(model, exported)
    exported.producer_name, exported.producer_version = "qdq", qdq.__version__
    content = _serialize(exported)
    write_atomic(path, content)
    quantize_nodes, dequantize_nodes = count_qdq(exported)
    return ExportReport(path, opset, len(content), _input_shapes(exported), quantize_nodes, dequantize_nodes, layers)


def _require_exportable(model: nn.Module) -> None:
    """Refuse, all at once, quantizers that cannot become int8 Q/DQ."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if others := types - {torch.float32, torch.float16}:
        raise ExportError(
            f"the model has {', '.join(map(str, others))} parameters; float32 and float16 can be exported.",
            "call model.float() before swap_modules.",
        )
    enabled = {name: q for name, q in named_quantizers(model) if not q._disabled}
    if collecting := [name for name, q in enabled.items() if q._if_calib or not q._if_quant]:
        raise ExportError(
            f"{len(collecting)} quantizers are calibrating, not quantizing: {_list(collecting)}.",
            "leave the Calibration block (or call enable_quant and disable_calib) first.",
        )
    if missing := [name for name, q in enabled.items() if q.amax is None]:
        raise ExportError(
            f"{len(missing)} quantizers have no amax: {_list(missing)}.",
            "call calibrate_model, or disable_quantization for what shall stay float.",
        )
    for name, quantizer in enabled.items():
        if reason := quantizer.format.tensorrt_reason:
            raise ExportError(f"{name} cannot be written for TensorRT: {reason}.", "use signed 8 bit here.")
        if quantizer.format.narrow_range:
            raise ExportError(
                f"{name} has narrow_range, and ONNX and TensorRT clamp to -128 (R-RANGE).",
                "set narrow_range=False and evaluate again.",
            )
        if quantizer.amax is not None and not bool(torch.isfinite(quantizer.amax).all()):
            raise ExportError(f"{name} has an amax that is NaN or Inf.", "calibrate again.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from printing steps and from warning about its own future; an error says enough."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _capture(model: nn.Module, example_inputs: Any, opset: int, dynamic_batch: bool) -> ir.Model:
    if dynamic_batch:  # torch.export takes a size of 1 for a constant
        example_inputs = tree_map_only(
            torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, example_inputs
        )
    args, kwargs = split_inputs(example_inputs)
    dynamic: Any = None
    if dynamic_batch:
        args_dynamic, kwargs_dynamic = tree_map(_batch_of, args), tree_map(_batch_of, kwargs)
        dynamic = kwargs_dynamic if kwargs else args_dynamic
    try:
        with _quiet(), evaluating(model):
            program = torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, verbose=False
            )
    except Exception as error:  # torch raises many kinds here
        raise ExportError(
            f"torch.export cannot capture the model: {_summarize(error.__cause__ or error)}",
            "change the forward as torch says, or try dynamic_batch=False if it names a dimension.",
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing.", "update torch to 2.11 or newer.")
    return program.model


def _batch_of(value: Any) -> dict[int, str] | None:
    """The dynamic dimension of one input, by name; None for flags and scalars."""
    return {0: "batch"} if isinstance(value, torch.Tensor) and value.dim() else None


def _summarize(error: BaseException) -> str:
    """The beginning of a long message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _require_dynamic_batch(model: ir.Model) -> None:
    for number, value in enumerate(model.graph.inputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(
                f"the model fixes the batch of input {value.name} (number {number}) to {value.shape}.",
                "find the reshape or view in its forward that uses a constant, or export with dynamic_batch=False.",
            )


def _int8_codes(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], axis: int | None
) -> npt.NDArray[np.int8]:
    codes = quantize_codes(torch.from_numpy(values.copy()), torch.from_numpy(scale.copy()), Format(), axis)
    return codes.to(torch.int8).numpy()


def _require_complete(model: nn.Module, exported: ir.Model) -> dict[str, list[str]]:
    """Refuse a graph in which a quantized layer has no Q/DQ, or whose Q/DQ break a rule; say what became what."""
    nodes: dict[str, list[WeightedNode]] = {}
    for node in list_weighted_nodes(exported):
        nodes.setdefault(node.module, []).append(node)
    expected = {
        name
        for name, layer in quantized_layers(model).items()
        if isinstance(layer, QuantMixin) and not any(q._disabled for q in layer.quantizers().values())
    }
    lost = [name for name in sorted(expected) if not any(node.expects_int8 for node in nodes.get(name, []))]
    if lost:
        raise ExportError(
            f"{len(lost)} quantized layers have no Q/DQ in the exported graph: {_list(lost)}.",
            "check that they run on the example inputs; otherwise report the model.",
        )
    if findings := [f for f in find_violations(exported) if f.rule != "QDQ110"]:
        first = findings[0]
        raise ExportError(f"{len(findings)} rule violations; {first.rule} at {first.node}: {first.message}.", first.fix)
    return {name: [node.name for node in nodes[name]] for name in sorted(expected)}


def _serialize(model: ir.Model) -> bytes:
    try:
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    except Exception as error:  # protobuf's own type where a message is over 2 GB
        raise ExportError(
            f"the model does not fit one ONNX file: {error}.", "files of 2 GB and more are not written yet."
        ) from error


def _input_shapes(model: ir.Model) -> dict[str, list[int | str]]:
    return {
        str(value.name): [size if isinstance(size, int) else str(size) for size in value.shape or ()]
        for value in model.graph.inputs
    }


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
