"""The QDQ ONNX file: `torch.onnx.export(dynamo=True)`, then the passes of `graph/`, then a look at what was lost."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn
from torch.utils._pytree import tree_map_only

import qdq
from qdq.calibrate import Range
from qdq.calibrate.collect import bytes_of
from qdq.capture import CapturedGraph, capture_graph
from qdq.check.parity import Parity, measure_parity
from qdq.check.precision import measure_peaks, run_graph, run_rounded
from qdq.check.rules import find_violations
from qdq.errors import ArgumentError, ArgumentTypeError, CheckError, ExportError
from qdq.files import as_path, guard_files
from qdq.formats import Format
from qdq.forward import require_model, split_inputs, tensors_of
from qdq.graph.coverage import WeightedNode, count_qdq, list_weighted_nodes
from qdq.graph.fold_casts import FoldCasts
from qdq.graph.fold_pad import FoldPad
from qdq.graph.fold_weights import FoldWeights
from qdq.graph.lower_einsum import LowerEinsum
from qdq.graph.merge_constants import MergeConstants
from qdq.graph.merge_pairs import MergePairs
from qdq.graph.move_quantize import MoveQuantizeBeforeCopies
from qdq.graph.names import NameNodes
from qdq.graph.opset import HIGHEST, LOWEST, LowerOpset
from qdq.graph.passes import run_passes
from qdq.graph.precision import NEWEST_OPSET, ConvertPrecision
from qdq.graph.precision_rules import KeptNode
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.remove_identities import RemoveIdentities
from qdq.graph.save import save_model
from qdq.graph.transpose_keys import TransposeKeys
from qdq.graph.weights import QuantizeWeights
from qdq.metrics import Array
from qdq.nn import QuantMixin
from qdq.quantize import quantize_codes
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.rewire import RewirePlan
from qdq.swap import SwapPlan, quantized_layers
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

_PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class PrecisionReport:
    """What became of the float remainder (`export_onnx` with `precision`).

    Args:
        precision: "fp16" or "bf16".
        kept: What stays float32, each with its reason.
        casts: Number of Cast nodes in the file.
        parity: Outputs of the file against those of the same graph in float32, both run by ONNX Runtime on the example
            inputs, every 16 bit value rounded; of several outputs the one with the lowest SQNR. None if it could not be
            measured.
        not_measured: What could not be measured and why; empty if all was.
    """

    precision: str
    kept: tuple[KeptNode, ...]
    casts: int
    parity: Parity | None
    not_measured: tuple[str, ...]

    def format_table(self) -> str:
        """A line on how near it is to float32, and one for each reason to keep nodes."""
        lines = []
        if p := self.parity:
            lines.append(
                f"{self.precision} against fp32 on {p.images} example inputs: SQNR {p.sqnr_db:.1f} dB, "
                f"cosine {p.cosine:.6f}, max abs {p.max_abs:.3g}, same largest output {p.agreement:.1%}"
            )
        lines += [f"{self.precision}: not measured: {text}" for text in self.not_measured]
        groups = group_names(
            (f"{entry.op_type}: {entry.reason}", entry.node) for entry in self.kept
        )
        lines.append(f"{len(self.kept)} nodes stay in fp32, {self.casts} Casts")
        lines += [f"  {group}: {list_names(names, 5)}" for group, names in groups.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size; above 2 GB that of `NAME.data`, which holds the weights then, included.
        inputs: Shape of each input; a dynamic dimension is a name.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        layers: Every quantized layer of the model and the ONNX nodes it became.
        precision: What became of the float remainder; None if it was left in fp32.
    """

    path: Path
    opset: int
    file_bytes: int
    inputs: dict[str, list[int | str]]
    quantize_nodes: int
    dequantize_nodes: int
    layers: dict[str, list[str]]
    precision: PrecisionReport | None = None


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: Path | str,
    *,
    opset: int = 19,
    dynamic_batch: bool = True,
    weights: str = "int8",
    precision: str = "fp32",
    keep_io_types: bool = True,
    calibration: Sequence[Range] | None = None,
    plan: SwapPlan | None = None,
    rewired: RewirePlan | None = None,
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
        precision: Type of what is not int8: "fp32", "fp16" (opset 19 and above) or "bf16" (22 where there are
            convolutions). Nodes that need float32 keep it; the report lists them.
        keep_io_types: Inputs and outputs stay float32 whatever the precision.
        calibration: What `calibrate_model` returned; its methods and number of batches go into the metadata.
        plan: What `swap_modules` returned; every decision and its reason go into the metadata.
        rewired: What `rewire_operations` returned; likewise.

    Raises:
        ArgumentError: An option out of range.
        ArgumentTypeError: An argument of the wrong kind.
        ExportError: A quantizer without amax or of a format that TensorRT refuses; a model that torch.export cannot
            capture; a batch dimension that the model fixes; operators newer than the opset; Q/DQ lost on the way.
    """
    require_model(model)
    path = as_path(path, "path")
    _require_options(
        opset, weights, precision, dynamic_batch=dynamic_batch, keep_io_types=keep_io_types
    )
    _require_records(calibration, plan, rewired)
    guard_files(outputs=[path])  # capturing and converting take minutes
    _require_exportable(model)
    captured = _capture(
        model, example_inputs, max(opset, HIGHEST), dynamic_batch
    )  # torch writes none below
    exported = captured.graph
    if dynamic_batch:
        _require_dynamic_batch(exported)
    naming = NameNodes(
        captured.scales, {name for name, _ in model.named_modules(remove_duplicate=False)}
    )
    run_passes(exported, _passes(opset, weights, naming))
    _require_quantizers(captured.ran - naming.quantizers)
    layers = _require_complete(model, exported)
    exported.producer_name, exported.producer_version = "qdq", qdq.__version__
    exported.metadata_props.update(_describe_origin(model, calibration, plan, rewired))
    converted = None
    if precision != "fp32":
        converted = _convert(exported, _arrays(captured, example_inputs), precision, keep_io_types)
        _require_complete(model, exported)
    file_bytes = save_model(exported, path)
    quantize_nodes, dequantize_nodes = count_qdq(exported)
    if not dequantize_nodes:
        logger.warning(
            "%s is a float model: no quantizer is enabled. swap_modules reaches layers, rewire_operations products "
            "that are function calls.",
            path,
        )
    return ExportReport(
        path,
        opset,
        file_bytes,
        _input_shapes(exported),
        quantize_nodes,
        dequantize_nodes,
        layers,
        converted,
    )


def _require_options(opset: Any, weights: Any, precision: Any, **flags: Any) -> None:
    is_number = isinstance(opset, int | np.integer) and not isinstance(opset, bool)
    if not is_number or not LOWEST <= opset <= NEWEST_OPSET:
        raise ArgumentError(
            f"opset is {opset!r}; it must be {LOWEST} to {NEWEST_OPSET}.", "use 19."
        )
    if weights not in ("int8", "float"):
        raise ArgumentError(f"weights is {weights!r}; known are 'int8' and 'float'.", "use 'int8'.")
    if precision not in tuple(_PRECISIONS):
        raise ArgumentError(
            f"precision is {precision!r}; known are 'fp32', 'fp16' and 'bf16'.", "use 'fp16'."
        )
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ArgumentTypeError(f"{name} is {flag!r}; expected True or False.", "use True.")


def _require_records(calibration: Any, plan: Any, rewired: Any) -> None:
    """Refuse as record of an earlier step what no such step has returned."""
    is_ranges = isinstance(calibration, Sequence) and all(
        isinstance(entry, Range) for entry in calibration
    )
    for name, record, is_record, source in (
        ("calibration", calibration, is_ranges, "calibrate_model"),
        ("plan", plan, isinstance(plan, SwapPlan), "swap_modules"),
        ("rewired", rewired, isinstance(rewired, RewirePlan), "rewire_operations"),
    ):
        if record is not None and not is_record:
            raise ArgumentTypeError(
                f"{name} is of type {type(record).__name__}; expected what {source} returns.",
                f"pass that, or no {name}.",
            )


def _passes(opset: int, weights: str, naming: NameNodes) -> list[ir.passes.InPlacePass]:
    """The passes in their order; each alone keeps every number, `RaiseWeightScales` up to rounding in float32."""
    passes: list[ir.passes.InPlacePass] = [
        FoldWeights(),
        RemoveIdentities(),
        LowerEinsum(),
        TransposeKeys(),
        naming,
        MergePairs(),
        MoveQuantizeBeforeCopies(),
        MergePairs(),  # a pair that was moved may meet an equal one
        FoldPad(),
        FoldCasts(),
        RaiseWeightScales(),
    ]
    if weights == "int8":
        passes.append(QuantizeWeights(_int8_codes))
    passes += [MergeConstants(), RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass()]
    if opset < HIGHEST:
        passes.append(LowerOpset(opset))
    return passes


def _require_exportable(model: nn.Module) -> None:
    """Refuse, all at once, quantizers that cannot become int8 Q/DQ."""
    if scripted := [
        name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
    ]:
        raise ExportError(
            f"torch.export cannot capture scripted modules (TorchScript): {list_names(scripted, 5)}.",
            "use the Python modules that they were made from.",
        )
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if others := types - {torch.float32, torch.float16}:
        raise ExportError(
            f"the model has {', '.join(map(str, others))} parameters; float32 and float16 can be exported.",
            "call model.float() before swap_modules.",
        )
    enabled = {name: q for name, q in named_quantizers(model) if q.is_enabled}
    if collecting := [
        name for name, q in enabled.items() if q.is_collecting or not q.is_quantizing
    ]:
        raise ExportError(
            f"{len(collecting)} quantizers are calibrating, not quantizing: {list_names(collecting, 5)}.",
            "leave the Calibration block (or call enable_quant and disable_calib) first.",
        )
    if missing := [name for name, q in enabled.items() if q.amax is None]:
        raise ExportError(
            f"{len(missing)} quantizers have no amax: {list_names(missing, 5)}.",
            "call calibrate_model, or disable_quantization for what shall stay float.",
        )
    for name, quantizer in enabled.items():
        if reason := quantizer.format.tensorrt_reason:
            raise ExportError(
                f"{name} cannot be written for TensorRT: {reason}.", "use signed 8 bit here."
            )
        if quantizer.format.narrow_range:
            raise ExportError(
                f"{name} has narrow_range, and ONNX and TensorRT clamp to -128 (R-RANGE).",
                "set narrow_range=False and evaluate again.",
            )
    _require_numbers(model, enabled)


def _require_numbers(model: nn.Module, enabled: dict[str, TensorQuantizer]) -> None:
    """Refuse, all at once, ranges without a scale, and parameters that int8 has no codes for."""
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, QuantMixin)]
    weights = {
        id(getattr(layer, attribute)): layer._parameters.get(parameter)
        for layer in layers
        for attribute, parameter in layer.weights_of(layer).items()
    }
    reasons = {name: q.reason_against_range(weights.get(id(q))) for name, q in enabled.items()}
    wrong = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    of_layers = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        values = parameter.detach()  # what inference mode has made knows no gradient
        broken = values.isnan()
        if id(parameter) in of_layers:
            broken |= values.isinf()
        if bool(broken.any()):
            wrong.append(f"{name} holds {int(broken.sum())} NaN or Inf")
    if wrong:
        raise ExportError(
            f"{len(wrong)} ranges and parameters cannot be written: {'; '.join(wrong)}.",
            "load sound weights, then calibrate again (calibrate_model).",
        )


def _capture(
    model: nn.Module, example_inputs: Any, opset: int, dynamic_batch: bool
) -> CapturedGraph:
    if dynamic_batch:  # torch.export takes a size of 1 for a constant
        example_inputs = tree_map_only(
            torch.Tensor,
            lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t,
            example_inputs,
        )
    args, kwargs = split_inputs(example_inputs)
    if not tensors_of((args, kwargs)):
        raise ArgumentTypeError(
            f"the example inputs, of type {type(example_inputs).__name__}, hold no tensor.",
            "pass one batch: a tensor, (inputs, labels), or a dictionary of keyword arguments.",
        )
    return capture_graph(model, args, kwargs, opset, dynamic_batch=dynamic_batch)


def _require_dynamic_batch(model: ir.Model) -> None:
    for number, value in enumerate(model.graph.inputs):
        if value.shape is not None and not len(value.shape):
            continue  # an input without dimensions has no batch
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(
                f"the model fixes the batch of input {value.name} (number {number}) to {value.shape}.",
                "find the reshape or view in its forward that uses a constant, or export with dynamic_batch=False.",
            )


def _int8_codes(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], axis: int | None
) -> npt.NDArray[np.int8]:
    codes = quantize_codes(
        torch.from_numpy(values.copy()), torch.from_numpy(scale.copy()), Format(), axis
    )
    return codes.to(torch.int8).numpy()


def _require_quantizers(lost: Collection[str]) -> None:
    """Refuse a graph without the Q/DQ of a quantizer that has quantized something."""
    if lost:
        raise ExportError(
            f"{len(lost)} quantizers ran and have no Q/DQ in the exported graph: {', '.join(sorted(lost))}.",
            "nothing that reaches an output reads what they quantize: return it, or disable_quantization there.",
        )


def _require_complete(model: nn.Module, exported: ir.Model) -> dict[str, list[str]]:
    """Refuse a graph in which a quantized layer has no Q/DQ, or whose Q/DQ break a rule; say what became what."""
    first_names = {id(module): name for name, module in model.named_modules()}
    aliases = {
        name: first_names[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
    }
    nodes: dict[str, list[WeightedNode]] = {}
    for node in list_weighted_nodes(exported):
        nodes.setdefault(aliases.get(node.module, node.module), []).append(node)
    expected = {
        name
        for name, layer in quantized_layers(model).items()
        if isinstance(layer, QuantMixin)
        and all(quantizer.is_enabled for quantizer in layer.quantizers().values())
    }
    lost = [
        name
        for name in sorted(expected)
        if not any(node.expects_int8 for node in nodes.get(name, []))
    ]
    if lost:
        raise ExportError(
            f"{len(lost)} quantized layers have no Q/DQ in the exported graph: {', '.join(lost)}.",
            "check that they run on the example inputs; otherwise report the model.",
        )
    if findings := [f for f in find_violations(exported) if f.severity == "error"]:
        first = findings[0]
        raise ExportError(
            f"{len(findings)} rule violations; {first.rule} at {first.node}: {first.message}.",
            first.fix,
        )
    return {name: [node.name for node in nodes[name]] for name in sorted(expected)}


def _convert(
    exported: ir.Model, inputs: dict[str, Array], precision: str, keep_io_types: bool
) -> PrecisionReport:
    """Convert the float remainder in place, and measure before and after on the example inputs."""
    not_measured: list[str] = []
    peaks: dict[str, float] = {}
    outputs: list[Array] = []
    try:
        outputs = run_graph(exported, inputs)
        if precision == "fp16":  # bfloat16 has the range of float32
            peaks = measure_peaks(exported, inputs)
    except CheckError as error:
        not_measured.append(
            f"the range of values in fp32, so that none is kept for it: {error.message}"
        )
    graph_pass = ConvertPrecision(_PRECISIONS[precision], peaks=peaks, keep_io_types=keep_io_types)
    run_passes(exported, [graph_pass])
    parity = None
    if outputs:
        try:
            parity = _worst_parity(outputs, run_rounded(exported, inputs))
        except CheckError as error:
            not_measured.append(f"the outputs in {precision}: {error.message}")
    return PrecisionReport(
        precision, graph_pass.kept, graph_pass.casts, parity, tuple(not_measured)
    )


def _arrays(captured: CapturedGraph, example_inputs: Any) -> dict[str, Array]:
    """The example as arrays by the names of the graph's inputs."""
    tensors = dict(zip(captured.names, tensors_of(split_inputs(example_inputs)), strict=True))
    names = [str(value.name) for value in captured.graph.graph.inputs]
    return {name: tensors[name].detach().cpu().numpy() for name in names if name in tensors}


def _worst_parity(expected: list[Array], outputs: list[Array]) -> Parity:
    pairs = list(zip(expected, outputs, strict=True))
    floats = [pair for pair in pairs if np.issubdtype(pair[0].dtype, np.floating)]
    parities = [
        measure_parity(np.atleast_1d(truth), np.atleast_1d(output))
        for truth, output in floats or pairs
    ]
    return min(parities, key=lambda parity: parity.sqnr_db)


def _describe_origin(
    model: nn.Module,
    calibration: Sequence[Range] | None,
    plan: SwapPlan | None,
    rewired: RewirePlan | None,
) -> dict[str, str]:
    """What a file says of its making: nothing that differs between two exports of one model."""
    digest = hashlib.sha256()
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.amax is not None:
            digest.update(f"{name} {quantizer.axis} ".encode())
            digest.update(bytes_of(quantizer.amax.float()))
    origin = {
        "qdq.version": qdq.__version__,
        "qdq.torch_version": torch.__version__,
        "qdq.ranges_sha256": digest.hexdigest(),
    }
    if calibration is not None:
        seen = [entry for entry in calibration if entry.batches]
        facts = {
            "methods": sorted({entry.method for entry in seen}),
            "batches": max((entry.batches for entry in seen), default=0),
            "left_in_float": {entry.name: entry.note for entry in calibration if entry.note},
        }
        origin["qdq.calibration"] = json.dumps(facts, sort_keys=True)
    if plan is not None:
        decisions = {module.name: [module.action, module.reason] for module in plan.modules}
        origin["qdq.layers"] = json.dumps(decisions, sort_keys=True)
    if rewired is not None:
        decisions = {
            operation.name: [operation.action, operation.reason] for operation in rewired.operations
        }
        origin["qdq.operations"] = json.dumps(decisions, sort_keys=True)
    return origin


def _input_shapes(model: ir.Model) -> dict[str, list[int | str]]:
    return {
        str(value.name): [
            size if isinstance(size, int) else str(size) for size in value.shape or ()
        ]
        for value in model.graph.inputs
    }
