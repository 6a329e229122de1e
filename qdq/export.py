"""The QDQ ONNX file: `torch.onnx.export(dynamo=True)`, then the passes of `graph/`, then checks for lost Q/DQ."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn

import qdq
from qdq.batch import count_samples, split_inputs, tensors_of
from qdq.calibrate import Range
from qdq.calibrate.collect import bytes_of
from qdq.capture import CapturedGraph, capture_graph
from qdq.check.parity import Parity, measure_parity
from qdq.check.precision import measure_peaks, run_graph, run_rounded
from qdq.check.rules import find_violations
from qdq.device import find_device, move_batch, on_host
from qdq.dynamic import Dynamic, require_dynamic
from qdq.errors import ArgumentError, ArgumentTypeError, CheckError, ExportError
from qdq.files import as_path, guard_files
from qdq.formats import FP8, FP8_LOWEST_OPSET, Format
from qdq.forward import require_data, require_model, says_devices_differ
from qdq.graph.coverage import WorkNode, count_qdq, list_work_nodes
from qdq.graph.fold_casts import FoldCasts
from qdq.graph.fold_offsets import FoldOffsets
from qdq.graph.fold_pad import FoldPad
from qdq.graph.fold_weights import FoldWeights
from qdq.graph.lower_einsum import LowerEinsum
from qdq.graph.merge_constants import MergeConstants
from qdq.graph.merge_pairs import MergePairs
from qdq.graph.merge_products import MergeProducts
from qdq.graph.move_quantize import MoveQuantizeBeforeCopies
from qdq.graph.names import NameNodes
from qdq.graph.opset import DEFAULT_OPSET, LOWEST, LOWEST_OF_TORCH, NEWEST_OPSET, LowerOpset
from qdq.graph.passes import run_passes
from qdq.graph.precision import ConvertPrecision
from qdq.graph.precision_rules import KeptNode
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.remove_identities import RemoveIdentities
from qdq.graph.save import save_model
from qdq.graph.transpose_keys import TransposeKeys
from qdq.graph.weights import QuantizeWeights
from qdq.metrics import Array
from qdq.nn import QuantMixin
from qdq.nn.mixin import fixed_biases
from qdq.quantize import quantize_codes
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.rewire import RewirePlan
from qdq.swap import SwapPlan, quantized_layers
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

_PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class PrecisionReport:
    """Result of the conversion of the float remainder (`export_onnx` with `precision`).

    Args:
        precision: "fp16" or "bf16".
        kept: The nodes that stay float32, each with its reason.
        casts: Number of Cast nodes in the file.
        parity: Outputs of the file against the same graph in float32, both run by ONNX Runtime on the example inputs,
            with every 16-bit value rounded. For several outputs, these are the figures of the output with the lowest
            SQNR. None if it could not be measured.
        not_measured: Measurements that failed, each with its reason; empty if none did.
    """

    precision: str
    kept: tuple[KeptNode, ...]
    casts: int
    parity: Parity | None
    not_measured: tuple[str, ...]

    def format_table(self) -> str:
        """One line about the distance from float32, and one for each reason why nodes stay float32."""
        lines = []
        if self.parity:
            line = (
                f"{self.precision} against fp32 on {self.parity.images} example inputs: "
                f"SQNR {self.parity.sqnr_db:.1f} dB, cosine {self.parity.cosine:.6f}, "
                f"max abs {self.parity.max_abs:.3g}"
            )
            if self.parity.agreement is not None:
                line += f", same largest output {self.parity.agreement:.1%}"
            lines.append(line)
        for text in self.not_measured:
            lines.append(f"{self.precision}: not measured: {text}")
        lines.append(f"{len(self.kept)} nodes stay in fp32, {self.casts} Casts")
        groups = group_names(
            (f"{entry.op_type}: {entry.reason}", entry.node) for entry in self.kept
        )
        for group, names in groups.items():
            lines.append(f"  {group}: {list_names(names, 5)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size. Above 2 GB the weights are in `NAME.data`, whose size is included.
        inputs: Shape of each input; a dynamic dimension is a name.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        layers: Every quantized layer of the model and the ONNX nodes it became.
        precision: Result of the conversion of the float remainder; None if it was left in fp32.
    """

    path: Path
    opset: int
    file_bytes: int
    inputs: dict[str, list[int | str]]
    quantize_nodes: int
    dequantize_nodes: int
    layers: dict[str, list[str]]
    precision: PrecisionReport | None = None

    @property
    def remainder(self) -> str:
        """Type of everything that is not quantized: "fp32", "fp16" or "bf16"."""
        return self.precision.precision if self.precision else "fp32"


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: Path | str,
    *,
    opset: int = DEFAULT_OPSET,
    dynamic_batch: bool = True,
    dynamic: Dynamic | None = None,
    weights: str = "int8",
    precision: str = "auto",
    keep_io_types: bool = True,
    calibration: Sequence[Range] | None = None,
    plan: SwapPlan | None = None,
    rewired: RewirePlan | None = None,
) -> ExportReport:
    """Export a calibrated model as QDQ ONNX for TensorRT.

    Scales are 0-D per tensor and 1-D per channel with an explicit axis, zero points are zeros of int8 or FP8, nodes
    have the names of the torch modules. The file is written completely or not at all.

    A model on a GPU gives the same file as on the CPU: torch captures it with copies of its tensors on the CPU. The
    model itself stays where it is.

    Args:
        model: A swapped and calibrated model. Disabled quantizers leave no trace in the file.
        example_inputs: One batch, as for `calibrate_model`: a tensor `[B, ...]`, `(inputs, labels)`, a dictionary or
            `Labelled`.
        path: The file to write.
        opset: 13 to 23; 19 is the first with fp16 scales, and TensorRT 10.0 still reads it. Below 18 the model is
            written at 18 and lowered, exactly or not at all.
        dynamic_batch: Make the first dimension of every input dynamic, with the name "batch".
        dynamic: Further dynamic dimensions: name of an input -> axis -> name, as in `{"x": {2: "height", 3: "width"}}`.
            For axis 0 it takes the place of "batch"; None instead of a name fixes an axis.
        weights: "int8" stores codes, int8 or FP8, and a DQ; "float" stores float weights with Q and DQ (four times as
            large).
        precision: Type of everything that is not quantized: "fp32", "fp16" (opset 19 and above) or "bf16" (22 where
            there are convolutions). Nodes that need float32 keep it; the report lists them. "auto" is fp16 for a model
            with FP8 quantizers, because TensorRT fuses FP8 attention in fp16 only, and fp32 for all others.
        keep_io_types: Inputs and outputs stay float32 whatever the precision.
        calibration: The result of `calibrate_model`; its methods and number of batches go into the metadata.
        plan: The result of `swap_modules`; every decision and its reason go into the metadata.
        rewired: The result of `rewire_operations`; likewise.

    Raises:
        ArgumentError: An option out of range, an opset below 19 for FP8, or a dynamic dimension that the inputs do not
            have.
        ArgumentTypeError: An argument of the wrong kind.
        ExportError: A quantizer without amax or of a format that TensorRT refuses; a model that torch.export cannot
            capture; a dynamic dimension that the model fixes; operators newer than the opset; Q/DQ lost on the way.
    """
    require_model(model)
    path = as_path(path, "path")
    _require_options(opset, weights, precision)
    _require_flags(dynamic_batch=dynamic_batch, keep_io_types=keep_io_types)
    require_dynamic(dynamic)
    _require_records(calibration, plan, rewired)
    guard_files(outputs=[path])  # capturing and converting take minutes
    fp8_layers = _list_fp8_quantizers(model)
    if fp8_layers:
        _require_fp8_opset(opset, fp8_layers)
    if precision == "auto":
        precision = "fp16" if fp8_layers else "fp32"
    require_data(model)
    example_inputs = move_batch(example_inputs, torch.device("cpu"))
    with on_host(model):
        _require_exportable(model)
        origin = _describe_origin(model, calibration, plan, rewired)
    captured = _capture(model, example_inputs, opset, dynamic_batch, dynamic)
    exported = captured.graph
    _require_dimensions(captured)
    module_names = dict(model.named_modules(remove_duplicate=False)).keys()
    naming = NameNodes(captured.scales, set(module_names))
    run_passes(exported, _list_passes(opset, weights, naming))
    _require_quantizers(captured.ran - naming.quantizers)
    layers = _require_complete(model, exported)

    exported.producer_name = "qdq"
    exported.producer_version = qdq.__version__
    exported.metadata_props.update(origin)
    converted = None
    if precision != "fp32":
        arrays = _name_arrays(captured, example_inputs)
        converted = _convert(exported, arrays, precision, keep_io_types)
        converted = _count_images(converted, count_samples(example_inputs))
        _require_complete(model, exported)

    file_bytes = save_model(exported, path)
    quantize_nodes, dequantize_nodes = count_qdq(exported)
    if not dequantize_nodes:
        logger.warning(
            "%s is a float model: no quantizer is enabled. swap_modules quantizes layers, rewire_operations "
            "quantizes products that are function calls.",
            path,
        )
    return ExportReport(
        path=path,
        opset=opset,
        file_bytes=file_bytes,
        inputs=_read_input_shapes(exported),
        quantize_nodes=quantize_nodes,
        dequantize_nodes=dequantize_nodes,
        layers=layers,
        precision=converted,
    )


def _capture(
    model: nn.Module,
    example_inputs: Any,
    opset: int,
    dynamic_batch: bool,
    dynamic: Dynamic | None,
) -> CapturedGraph:
    """The graph of a model, from copies of its tensors on the CPU.

    A model whose forward names its device, or uses tensors that no module holds, is captured on its device.
    """
    newest = max(opset, LOWEST_OF_TORCH)
    args, kwargs = _split_example(example_inputs)
    capture = partial(
        capture_graph, model, opset=newest, dynamic_batch=dynamic_batch, dynamic=dynamic
    )
    device = find_device(model)
    try:
        with on_host(model), fixed_biases(model):
            return capture(args, kwargs)
    except ExportError as error:
        if device.type == "cpu" or not says_devices_differ(error):
            raise
        logger.info("captured on %s, because of constants there: %s", device, error.message)
    args, kwargs = move_batch((args, kwargs), device)
    with fixed_biases(model):
        return capture(args, kwargs)


def _require_options(opset: Any, weights: Any, precision: Any) -> None:
    is_integer = isinstance(opset, int | np.integer) and not isinstance(opset, bool)
    if not is_integer or not LOWEST <= opset <= NEWEST_OPSET:
        raise ArgumentError(
            f"opset is {opset!r}; it must be {LOWEST} to {NEWEST_OPSET}.", "use 19."
        )
    if weights not in ("int8", "float"):
        raise ArgumentError(f"weights is {weights!r}; known are 'int8' and 'float'.", "use 'int8'.")
    if precision not in ("auto", *_PRECISIONS):
        raise ArgumentError(
            f"precision is {precision!r}; known are 'auto', 'fp32', 'fp16' and 'bf16'.",
            "use 'fp16'.",
        )


def _list_fp8_quantizers(model: nn.Module) -> list[str]:
    """Names of the enabled quantizers of FP8."""
    names = []
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.format.is_float:
            names.append(name)
    return names


def _require_fp8_opset(opset: int, quantizers: Sequence[str]) -> None:
    if opset < FP8_LOWEST_OPSET:
        raise ArgumentError(
            f"opset {opset} has no FP8, which {len(quantizers)} quantizers use: {list_names(quantizers, 3)}.",
            f"use opset={FP8_LOWEST_OPSET}, the lowest with FP8, or above.",
        )


def _require_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ArgumentTypeError(f"{name} is {flag!r}; expected True or False.", "use True.")


def _require_records(calibration: Any, plan: Any, rewired: Any) -> None:
    """Refuse records that were not returned by the earlier steps."""
    is_calibration = isinstance(calibration, Sequence) and all(
        isinstance(entry, Range) for entry in calibration
    )
    _require_record("calibration", calibration, is_calibration, "calibrate_model")
    _require_record("plan", plan, isinstance(plan, SwapPlan), "swap_modules")
    _require_record("rewired", rewired, isinstance(rewired, RewirePlan), "rewire_operations")


def _require_record(name: str, record: Any, is_record: bool, source: str) -> None:
    if record is not None and not is_record:
        raise ArgumentTypeError(
            f"{name} is of type {type(record).__name__}; expected the result of {source}.",
            f"pass that result, or no {name}.",
        )


def _require_exportable(model: nn.Module) -> None:
    """Refuse models and quantizers that cannot become Q/DQ of int8 or FP8."""
    _require_python_modules(model)
    _require_parameter_types(model)
    _refuse_foreign_quantizers(model)
    enabled = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled:
            enabled[name] = quantizer
    _require_calibrated(enabled)
    _require_formats(enabled)
    _require_one_format(model)
    _require_numbers(model, enabled)


def _require_python_modules(model: nn.Module) -> None:
    scripted = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(name)
    if scripted:
        raise ExportError(
            f"torch.export cannot capture scripted modules (TorchScript): {list_names(scripted, 5)}.",
            "use the Python modules that they were made from.",
        )


def _refuse_foreign_quantizers(model: nn.Module) -> None:
    """Refuse quantizers of another number system, which would become ordinary operations."""
    foreign = []
    inside = tuple(f"{name}." for name, _ in named_quantizers(model))
    for name, module in model.named_modules():
        if getattr(module, "is_foreign_quantizer", False) and not name.startswith(inside):
            foreign.append(f"{name} ({type(module).__name__})")
    if foreign:
        raise ExportError(
            f"{len(foreign)} quantizers are of another number system: {list_names(foreign, 3)}.",
            "call qdq.systems.to_tensorrt(model) first: it says what fits TensorRT int8.",
        )


def _require_parameter_types(model: nn.Module) -> None:
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    refused = types - {torch.float32, torch.float16}
    if refused:
        raise ExportError(
            f"the model has {', '.join(map(str, refused))} parameters; float32 and float16 can be exported.",
            "call model.float() before swap_modules.",
        )


def _require_calibrated(enabled: Mapping[str, TensorQuantizer]) -> None:
    """Refuse quantizers that do not quantize yet, all in one error."""
    collecting = []
    missing = []
    for name, quantizer in enabled.items():
        if quantizer.is_collecting or not quantizer.is_quantizing:
            collecting.append(name)
        if quantizer.amax is None:
            missing.append(name)
    if collecting:
        raise ExportError(
            f"{len(collecting)} quantizers are calibrating, not quantizing: {list_names(collecting, 5)}.",
            "leave the Calibration block (or call enable_quant and disable_calib) first.",
        )
    if missing:
        calls = dict.fromkeys(enabled[name].calibration_call for name in missing)
        raise ExportError(
            f"{len(missing)} quantizers have no amax: {list_names(missing, 5)}.",
            f"call {' and '.join(calls)}, or disable_quantization for the layers that should stay float.",
        )


def _require_formats(enabled: Mapping[str, TensorQuantizer]) -> None:
    for name, quantizer in enabled.items():
        reason = quantizer.format.tensorrt_reason
        if reason:
            raise ExportError(
                f"{name} cannot be written for TensorRT: {reason}.",
                "use signed 8 bit or FP8, (4, 3), here.",
            )
        if quantizer.format.narrow_range:
            raise ExportError(
                f"{name} has narrow_range, and ONNX and TensorRT clamp to -128 (R-RANGE).",
                "set narrow_range=False and evaluate again.",
            )


def _require_one_format(model: nn.Module) -> None:
    """Refuse layers whose operands have different formats, because TensorRT runs such products in float."""
    mixed = []
    for name, layer in sorted(quantized_layers(model).items()):
        if not isinstance(layer, QuantMixin):
            continue
        enabled = [quantizer for quantizer in layer.quantizers().values() if quantizer.is_enabled]
        formats = {quantizer.format.name for quantizer in enabled}
        if len(formats) > 1:
            mixed.append(f"{name} ({' and '.join(sorted(formats))})")
    if mixed:
        raise ExportError(
            f"{len(mixed)} layers have operands of different formats: {list_names(mixed, 3)}.",
            "give the descriptors of input and weight the same num_bits; TensorRT has no product of two formats.",
        )


def _require_numbers(model: nn.Module, enabled: Mapping[str, TensorQuantizer]) -> None:
    """Refuse ranges without a scale and parameters without codes, all in one error."""
    layers = _list_weighted_layers(model)
    problems = [*_find_bad_ranges(layers, enabled), *_find_bad_parameters(model, layers)]
    if problems:
        raise ExportError(
            f"{len(problems)} ranges and parameters cannot be written: {'; '.join(problems)}.",
            "load valid weights, then calibrate again (calibrate_model).",
        )


def _list_weighted_layers(model: nn.Module) -> list[QuantMixin]:
    layers = quantized_layers(model).values()
    return [layer for layer in layers if isinstance(layer, QuantMixin)]


def _find_bad_ranges(
    layers: Sequence[QuantMixin], enabled: Mapping[str, TensorQuantizer]
) -> Iterator[str]:
    """Ranges without a scale, each with the reason."""
    weights = {}
    for layer in layers:
        parameters = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
        for attribute, parameter in layer.weights_of(layer).items():
            weights[id(getattr(layer, attribute))] = parameters.get(parameter)
    for name, quantizer in enabled.items():
        reason = quantizer.reason_against_range(weights.get(id(quantizer)))
        if reason:
            yield f"{name} {reason}"


def _find_bad_parameters(model: nn.Module, layers: Sequence[QuantMixin]) -> Iterator[str]:
    """Parameters with NaN, and parameters of quantized layers with Inf, which has no code."""
    quantized: set[int] = set()
    for layer in layers:
        quantized.update(map(id, layer.parameters(recurse=False)))
    for name, parameter in model.named_parameters():
        values = parameter.detach()  # a tensor made in inference mode has no gradient
        is_bad = values.isnan()
        if id(parameter) in quantized:
            is_bad |= values.isinf()
        if bool(is_bad.any()):
            yield f"{name} holds {int(is_bad.sum())} NaN or Inf"


def _split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments to capture the model with."""
    args, kwargs = split_inputs(example_inputs)
    if not tensors_of((args, kwargs)):
        raise ArgumentTypeError(
            f"the example inputs, of type {type(example_inputs).__name__}, hold no tensor.",
            "pass one batch: a tensor, (inputs, labels), a dictionary of keyword arguments, or qdq.Labelled.",
        )
    return args, kwargs


def _require_dimensions(captured: CapturedGraph) -> None:
    """Refuse a graph that fixes a dimension that is to be dynamic."""
    for number, value in enumerate(captured.graph.graph.inputs):
        for axis, dimension in captured.dimensions.get(str(value.name), {}).items():
            if value.shape is None or isinstance(value.shape[axis], int):
                raise ExportError(
                    f"the model fixes the {dimension} of input {value.name} (number {number}) to {value.shape}.",
                    "find the reshape or view in its forward that uses a constant, or export with it fixed: "
                    f"dynamic_batch=False, or dynamic={{{value.name!r}: {{{axis}: None}}}}.",
                )


def _list_passes(opset: int, weights: str, naming: NameNodes) -> list[ir.passes.InPlacePass]:
    """The passes in their order. No pass changes a number; `FoldOffsets` and `RaiseWeightScales` round in float32."""
    passes: list[ir.passes.InPlacePass] = [
        FoldWeights(),
        RemoveIdentities(),
        LowerEinsum(),
        TransposeKeys(),
        naming,
        FoldOffsets(),
        MergeProducts(),
        MergePairs(),
        MoveQuantizeBeforeCopies(),
        MergePairs(),  # a pair that was moved may be next to an equal one
        FoldPad(),
        FoldCasts(),
        RaiseWeightScales(),
    ]
    if weights == "int8":
        passes.append(QuantizeWeights(_compute_codes))
    passes += [MergeConstants(), RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass()]
    if opset < LOWEST_OF_TORCH:
        passes.append(LowerOpset(opset))
    return passes


def _compute_codes(
    values: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    axis: int | None,
    code_type: ir.DataType,
) -> npt.NDArray[Any]:
    tensor = torch.from_numpy(values.copy())
    is_fp8 = code_type == ir.DataType.FLOAT8E4M3FN
    fmt = FP8 if is_fp8 else Format()
    codes = quantize_codes(tensor, torch.from_numpy(scale.copy()), fmt, axis)
    return codes.numpy().astype(code_type.numpy())


def _require_quantizers(lost: Collection[str]) -> None:
    """Refuse a graph without the Q/DQ of a quantizer that has quantized something."""
    if lost:
        raise ExportError(
            f"{len(lost)} quantizers ran and have no Q/DQ in the exported graph: {', '.join(sorted(lost))}.",
            "no output depends on the tensors that they quantize: return them, or exclude these layers with exclude=.",
        )


def _require_complete(model: nn.Module, exported: ir.Model) -> dict[str, list[str]]:
    """Refuse a graph in which a quantized layer has no Q/DQ, or whose Q/DQ break a rule.

    Returns:
        Each quantized layer and the names of the ONNX nodes it became.
    """
    nodes = _group_nodes_by_layer(model, exported)
    layers = {}
    lost = []
    for name in _list_enabled_layers(model):
        layer_nodes = nodes.get(name, [])
        layers[name] = [node.name for node in layer_nodes]
        if not any(node.is_quantized for node in layer_nodes):
            lost.append(name)
    if lost:
        raise ExportError(
            f"{len(lost)} quantized layers have no Q/DQ in the exported graph: {', '.join(lost)}.",
            "check that they run on the example inputs; otherwise report the model.",
        )
    errors = [finding for finding in find_violations(exported) if finding.severity == "error"]
    if errors:
        first = errors[0]
        raise ExportError(
            f"{len(errors)} rule violations; {first.rule} at {first.node}: {first.message}.",
            first.fix,
        )
    return layers


def _group_nodes_by_layer(model: nn.Module, exported: ir.Model) -> dict[str, list[WorkNode]]:
    """The weighted nodes of each module, by the module's first name."""
    names: dict[int, str] = {}
    aliases = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), name)
        aliases[name] = names[id(module)]
    nodes: dict[str, list[WorkNode]] = {}
    for node in list_work_nodes(exported):
        layer_name = aliases.get(node.module, node.module)
        nodes.setdefault(layer_name, []).append(node)
    return nodes


def _list_enabled_layers(model: nn.Module) -> list[str]:
    """The layers whose quantizers are all enabled, in alphabetical order."""
    names = []
    for name, layer in sorted(quantized_layers(model).items()):
        if not isinstance(layer, QuantMixin):
            continue
        if all(quantizer.is_enabled for quantizer in layer.quantizers().values()):
            names.append(name)
    return names


def _convert(
    exported: ir.Model, inputs: Mapping[str, Array], precision: str, keep_io_types: bool
) -> PrecisionReport:
    """Convert the float remainder in place, and compare the outputs on the example inputs."""
    not_measured: list[str] = []
    peaks: dict[str, float] = {}
    outputs: list[Array] = []
    try:
        outputs = run_graph(exported, inputs)
        if precision == "fp16":  # bfloat16 has the range of float32
            peaks = measure_peaks(exported, inputs)
    except CheckError as error:
        not_measured.append(
            f"the range of values in fp32, so no node stays in fp32 because of it: {error.message}"
        )
    conversion = ConvertPrecision(_PRECISIONS[precision], peaks=peaks, keep_io_types=keep_io_types)
    run_passes(exported, [conversion])
    parity = None
    if outputs:
        try:
            parity = _measure_worst_parity(outputs, run_rounded(exported, inputs))
        except CheckError as error:
            not_measured.append(f"the outputs in {precision}: {error.message}")
    return PrecisionReport(
        precision, conversion.kept, conversion.casts, parity, tuple(not_measured)
    )


def _count_images(report: PrecisionReport, count: int) -> PrecisionReport:
    """The report with the number of samples of the example, which the first axis of an output need not be."""
    if report.parity is None:
        return report
    return replace(report, parity=replace(report.parity, images=count))


def _name_arrays(captured: CapturedGraph, example_inputs: Any) -> dict[str, Array]:
    """The example as arrays by the names of the graph's inputs."""
    tensors = dict(zip(captured.names, tensors_of(split_inputs(example_inputs)), strict=True))
    arrays = {}
    for value in captured.graph.graph.inputs:
        name = str(value.name)
        if name in tensors:
            arrays[name] = tensors[name].detach().numpy()
    return arrays


def _measure_worst_parity(expected: Sequence[Array], outputs: Sequence[Array]) -> Parity:
    """The parity of the float output with the lowest SQNR; of any output if none is a float."""
    pairs = list(zip(expected, outputs, strict=True))
    float_pairs = [pair for pair in pairs if np.issubdtype(pair[0].dtype, np.floating)]
    parities = []
    for reference, output in float_pairs or pairs:
        parities.append(measure_parity(np.atleast_1d(reference), np.atleast_1d(output)))
    return min(parities, key=attrgetter("sqnr_db"))


def _describe_origin(
    model: nn.Module,
    calibration: Sequence[Range] | None,
    plan: SwapPlan | None,
    rewired: RewirePlan | None,
) -> dict[str, str]:
    """Metadata on how a file was made, the same for every export of one model."""
    origin = {
        "qdq.version": qdq.__version__,
        "qdq.torch_version": torch.__version__,
        "qdq.ranges_sha256": _digest_ranges(model),
    }
    fp8_quantizers = _list_fp8_quantizers(model)
    if fp8_quantizers:
        origin["qdq.fp8"] = json.dumps(fp8_quantizers)
    if calibration is not None:
        facts = _describe_calibration(calibration)
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


def _digest_ranges(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.amax is not None:
            digest.update(f"{name} {quantizer.axis} ".encode())
            if quantizer.format.is_float:
                digest.update(b"fp8 ")
            digest.update(bytes_of(quantizer.amax.float()))
    return digest.hexdigest()


def _describe_calibration(calibration: Sequence[Range]) -> dict[str, Any]:
    methods = set()
    most_batches = 0
    left_in_float = {}
    for entry in calibration:
        if entry.batches:
            methods.add(entry.method)
            most_batches = max(most_batches, entry.batches)
        if entry.note:
            left_in_float[entry.name] = entry.note
    return {"methods": sorted(methods), "batches": most_batches, "left_in_float": left_in_float}


def _read_input_shapes(model: ir.Model) -> dict[str, list[int | str]]:
    shapes: dict[str, list[int | str]] = {}
    for value in model.graph.inputs:
        sizes = value.shape or ()
        shapes[str(value.name)] = [size if isinstance(size, int) else str(size) for size in sizes]
    return shapes
