"""`torch.onnx.export` of a model with quantizers, by either exporter and at any opset from 13.

A forward that is being captured can neither read values nor know which other quantizers there are. So all work on the
whole model is done around the call: `install` replaces `torch.onnx.export` by `export`. This function refuses
everything that ONNX cannot express, in one error. It gives each quantizer its scale as a constant, and lowers the opset
if torch does not. The three situations of `pytorch-quantization-api.md`, section 8, differ only in what an uncalibrated
quantizer means: an error, or (with `use_fb_fake_quant`) the range of the example inputs.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from qdq.check.rules import UNCALIBRATED
from qdq.compat.nn.modules._utils import quantized_weights
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer, missing_ranges, named_quantizers
from qdq.compat.qdq_nodes import make_constants
from qdq.compat.tensor_quant import E4M3
from qdq.device import move_batch, on_host
from qdq.errors import ArgumentTypeError, ExportError
from qdq.formats import FP8_LOWEST_OPSET
from qdq.forward import evaluating
from qdq.graph.opset import HIGHEST, LOWEST, LowerOpset
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.save import save_model, serialize

logger = logging.getLogger(__name__)

_torch_export: Callable[..., Any] = torch.onnx.export


def install() -> None:
    """Replace `torch.onnx.export` by `export`."""
    torch.onnx.export = export


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Make a quantizer without a range an error in the block; undone on any exit, and may be nested (F13)."""
    former = TensorQuantizer._enable_onnx_export
    TensorQuantizer._enable_onnx_export = True
    try:
        yield
    finally:
        TensorQuantizer._enable_onnx_export = former


@functools.wraps(_torch_export)
def export(model: Any, args: Any = (), f: Any = None, **kwargs: Any) -> Any:
    """`torch.onnx.export`; a model with quantizers becomes QDQ ONNX.

    It is captured with copies of its tensors and of the arguments on the CPU: the file is the same from any device.

    Args:
        model: Any model; torch alone exports one without quantizers of `qdq.compat`.
        args: As for torch.
        f: As for torch.
        **kwargs: As for torch; `opset_version` 13 and up, with both exporters.

    Raises:
        RuntimeError: Quantizers without a range, all of them named.
        TypeError: A quantizer that keeps several axes.
        ExportError: A format that ONNX cannot express at this opset; the message names the opset that can.
    """
    if not isinstance(model, nn.Module) or not named_quantizers(model):
        return _torch_export(model, args, f, **kwargs)
    args, kwargs = move_batch((args, kwargs), torch.device("cpu"))
    with on_host(model):
        return _export_quantized(model, args, f, kwargs)


def _export_quantized(model: nn.Module, args: Any, f: Any, kwargs: dict[str, Any]) -> Any:
    """Export a model with quantizers that is on the CPU."""
    quantizers = _enabled_quantizers(model)
    dynamo = kwargs.get("dynamo", True)
    opset = kwargs.get("opset_version")
    _require_numbers(model, quantizers)
    _require_expressible(model, quantizers, opset, dynamo)
    uncalibrated = {
        name: quantizer for name, quantizer in quantizers.items() if not quantizer.has_range()
    }
    if uncalibrated:
        _allow_example_ranges(uncalibrated)
    with (
        _constants(model, args, kwargs.get("kwargs"), quantizers, uncalibrated),
        _float_weights(model, quantizers),
    ):
        if dynamo:
            return _export_dynamo(model, args, f, opset, list(uncalibrated), kwargs)
        return _export_script(model, args, f, list(uncalibrated), kwargs)


def _export_dynamo(
    model: nn.Module,
    args: Any,
    f: Any,
    opset: int | None,
    uncalibrated: list[str],
    kwargs: dict[str, Any],
) -> Any:
    """Export, edit the result of torch, then save it as torch would."""
    written = opset if opset is None else max(opset, HIGHEST)
    program = _torch_export(model, args, None, **{**kwargs, "opset_version": written})
    RaiseWeightScales()(program.model)
    if opset is not None and opset < HIGHEST:
        LowerOpset(opset)(program.model)
    if uncalibrated:
        program.model.metadata_props[UNCALIBRATED] = ",".join(uncalibrated)
    if isinstance(f, io.BytesIO):
        onnx.save(program.model_proto, f)
    elif f is not None:
        _save(program, f, kwargs)
    return program


def _save(program: torch.onnx.ONNXProgram, f: Any, kwargs: dict[str, Any]) -> None:
    """Save one file up to protobuf's limit; if a script asks for external data, torch saves it."""
    if (
        "external_data" in kwargs
        or not kwargs.get("export_params", True)
        or kwargs.get("keep_initializers_as_inputs")
    ):
        program.save(
            f,
            include_initializers=kwargs.get("export_params", True),
            keep_initializers_as_inputs=kwargs.get("keep_initializers_as_inputs", False),
            external_data=kwargs.get("external_data", True),
        )
    else:
        save_model(program.model, Path(f))


def _export_script(
    model: nn.Module, args: Any, f: Any, uncalibrated: list[str], kwargs: dict[str, Any]
) -> Any:
    """Export by the TorchScript exporter, then edit the file that it has written."""
    path = Path(f) if isinstance(f, str | os.PathLike) else None
    buffer = io.BytesIO()
    result = _torch_export(model, args, buffer if path is None else path, **kwargs)
    written = (
        ir.from_proto(onnx.load_from_string(buffer.getvalue())) if path is None else ir.load(path)
    )
    changed = RaiseWeightScales()(written).modified
    if uncalibrated:  # its ranges are those of one example
        written.metadata_props[UNCALIBRATED] = ",".join(uncalibrated)
    if path is None:
        f.write(serialize(written) if changed or uncalibrated else buffer.getvalue())
    elif changed or uncalibrated:
        ir.external_data.load_to_model(written)
        save_model(written, path)
    return result


@contextmanager
def _float_weights(model: nn.Module, quantizers: dict[str, TensorQuantizer]) -> Iterator[None]:
    """Half weights as float32 while they are captured.

    Q takes float32. A Cast of a weight would be folded, which would lose the dotted name by which rule scripts find the
    layer; so the pair casts back instead. A weight that another module also reads stays half.
    """
    enabled = {id(quantizer) for quantizer in quantizers.values()}
    readers = Counter(
        id(weight) for module in model.modules() for weight in module._parameters.values()
    )
    halves = [
        (quantizer, weight, weight.data)
        for module in model.modules()
        for quantizer, weights in quantized_weights(module)
        for weight in weights
        if id(quantizer) in enabled
        and readers[id(weight)] == 1
        and weight.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for quantizer, weight, values in halves:
            weight.data, quantizer._export_dtype = values.float(), values.dtype
        yield
    finally:
        for quantizer, weight, values in halves:
            weight.data = values
            vars(quantizer).pop("_export_dtype", None)


def _enabled_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Quantizers that will be written, by dotted name; disabled ones leave no trace."""
    quantizers = named_quantizers(model)
    if collecting := [name for name, q in quantizers.items() if q.is_collecting and q.is_enabled]:
        logger.warning(
            "%d quantizers are still collecting: %s. Call disable_calib() and enable_quant() before an export.",
            len(collecting),
            ", ".join(collecting),
        )
    return {name: quantizer for name, quantizer in quantizers.items() if quantizer.is_written()}


def _allow_example_ranges(uncalibrated: dict[str, TensorQuantizer]) -> None:
    """Let uncalibrated quantizers through under `use_fb_fake_quant`, with one warning."""
    some = next(iter(uncalibrated.values()))
    if some._enable_onnx_export or not some.use_fb_fake_quant:
        raise missing_ranges(uncalibrated)
    logger.warning(
        "%d quantizers have no amax: %s. Their scales are the ranges of the example inputs; the file shows the "
        "structure and is not final: calibrate and export again (`qdq check` refuses it, QDQ123).",
        len(uncalibrated),
        ", ".join(uncalibrated),
    )


def _require_expressible(
    model: nn.Module, quantizers: dict[str, TensorQuantizer], opset: int | None, dynamo: bool
) -> None:
    """Refuse everything that Q/DQ at this opset cannot express."""
    if opset is not None and not isinstance(opset, int):
        raise ArgumentTypeError(
            f"opset_version is {opset!r}; expected an int.", f"use {LOWEST} or above."
        )
    if opset is not None and opset < LOWEST:
        raise ExportError(
            f"opset {opset} has no QuantizeLinear with an axis.",
            f"export with opset_version={LOWEST} or above.",
        )
    weights = _group_weights(model)
    for path, quantizer in quantizers.items():
        name = path or quantizer.name or "this quantizer"
        quantizer._single_axis()
        if not quantizer._fake_quant:
            raise ExportError(
                f"{name} gives codes (fake_quant=False), not Q/DQ.", "use fake quantization here."
            )
        if quantizer._num_bits == E4M3:
            _require_fp8(name, quantizer, opset, dynamo)
        elif quantizer._num_bits != 8:
            raise ExportError(
                f"{name} has {quantizer._num_bits} bits; QuantizeLinear stores int8.",
                "use num_bits=8, or disable() it.",
            )
        elif (
            quantizer._narrow_range and not quantizer._unsigned and not quantizer.use_fb_fake_quant
        ):
            _require_no_lowest_code(name, quantizer, weights.get(id(quantizer), []))
    _warn_of_other_axes(model, quantizers)
    if unsigned := [name for name, quantizer in quantizers.items() if quantizer._unsigned]:
        logger.warning(
            "%d quantizers are unsigned and become uint8: %s. ONNX Runtime runs that; TensorRT takes it for int8 and "
            "saturates codes above 127 (R-SYM): calibrate with a signed descriptor for it.",
            len(unsigned),
            ", ".join(unsigned),
        )


def _group_weights(model: nn.Module) -> dict[int, list[list[torch.Tensor]]]:
    """The weights of each quantizer, by its `id`, for each module that has it."""
    weights: dict[int, list[list[torch.Tensor]]] = {}
    for module in model.modules():
        for quantizer, parts in quantized_weights(module):
            weights.setdefault(id(quantizer), []).append(parts)
    return weights


def _require_numbers(model: nn.Module, quantizers: dict[str, TensorQuantizer]) -> None:
    """Refuse ranges without a scale, and weights and biases that hold NaN or Inf, all in one error.

    A range that is NaN was calibrated without data and counts as missing.
    """
    weights = {}
    for identity, modules in _group_weights(model).items():
        if len(modules[-1]) == 1:
            weights[identity] = modules[-1][0]
    in_layers = _list_layer_parameters(model, quantizers)

    wrong = []
    for name, quantizer in quantizers.items():
        if not quantizer.has_range():
            continue
        reason = quantizer.reason_against_range(weights.get(id(quantizer)))
        if reason:
            wrong.append(f"{name} {reason}")
    for name, parameter in model.named_parameters():
        if id(parameter) in in_layers and not bool(torch.isfinite(parameter).all()):
            wrong.append(f"{name} holds {int((~torch.isfinite(parameter)).sum())} NaN or Inf")
    if wrong:
        raise ExportError(
            f"{len(wrong)} ranges and parameters cannot be written: {'; '.join(wrong)}.",
            "load valid weights into the same kind of model, then calibrate again.",
        )


def _list_layer_parameters(model: nn.Module, quantizers: dict[str, TensorQuantizer]) -> set[int]:
    """The `id` of each parameter of the modules whose weight one of the quantizers quantizes."""
    identities = {id(quantizer) for quantizer in quantizers.values()}
    parameters: set[int] = set()
    for module in model.modules():
        for quantizer, _ in quantized_weights(module):
            if id(quantizer) in identities:
                parameters.update(map(id, module.parameters(recurse=False)))
    return parameters


def _warn_of_other_axes(model: nn.Module, quantizers: dict[str, TensorQuantizer]) -> None:
    """Warn of weights whose ranges are not on the axis of their quantizers, as in 2.1 for transposed convolutions."""
    ranks = {
        id(q): parts[0].dim()
        for module in model.modules()
        for q, parts in quantized_weights(module)
        if parts
    }
    elsewhere = [
        name
        for name, quantizer in quantizers.items()
        if isinstance(quantizer._axis, int)
        and id(quantizer) in ranks
        and (quantizer._single_axis() or 0) % ranks[id(quantizer)]
        != quantizer._axis % ranks[id(quantizer)]
    ]
    if elsewhere:
        logger.warning(
            "%d weights have ranges on another axis than their output channels: %s. The file computes the same as the "
            'model, but TensorRT will not run it in int8 (QDQ105): call calib.calibrate_weights(model, "max") first.',
            len(elsewhere),
            ", ".join(elsewhere),
        )


def _require_fp8(name: str, quantizer: TensorQuantizer, opset: int | None, dynamo: bool) -> None:
    if quantizer._axis is not None:
        raise ExportError(
            f"{name} is FP8 with an axis; FP8 is written per tensor only.", "use axis=None."
        )
    if not dynamo:
        raise ExportError(
            f"{name} is FP8, which the TorchScript exporter cannot write.",
            "export with dynamo=True.",
        )
    if opset is not None and opset < FP8_LOWEST_OPSET:
        raise ExportError(
            f"{name} is FP8, which QuantizeLinear of opset {opset} does not have.",
            f"export with opset_version={FP8_LOWEST_OPSET} or above.",
        )


def _require_no_lowest_code(
    name: str, quantizer: TensorQuantizer, weights: list[list[torch.Tensor]]
) -> None:
    """Refuse narrow_range, unless no value gets to the code -128, to which ONNX clamps."""
    amax = quantizer.static_amax()
    fits = amax is not None and all(
        parts and bool((_joined(parts).abs().float() <= amax.to(parts[0].device)).all())
        for parts in weights
    )
    if not weights or not fits:
        raise ExportError(
            f"{name} has narrow_range, and ONNX and TensorRT clamp to -128, not -127 (R-RANGE).",
            "set narrow_range=False and evaluate again; only weights inside their amax can keep it.",
        )


def _joined(weights: list[torch.Tensor]) -> torch.Tensor:
    if len(weights) == 1:
        return weights[0].detach()
    return torch.cat(weights, dim=1).detach()


@contextmanager
def _constants(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any] | None,
    quantizers: dict[str, TensorQuantizer],
    uncalibrated: dict[str, TensorQuantizer],
) -> Iterator[None]:
    """Give every quantizer the constants for its calls, computed outside the capture."""
    recorded = (
        _record_ranges(model, args, kwargs, list(uncalibrated.values())) if uncalibrated else {}
    )
    ulps = itertools.count()
    for name, quantizer in quantizers.items():
        amax = None if name in uncalibrated else quantizer.static_amax()
        ranges = recorded.get(id(quantizer), []) if amax is None else [amax]
        # Exporters merge equal pairs on one tensor, and rule scripts look for each layer's own.
        if amax is None:
            ranges = [value * (1 + next(ulps) * torch.finfo(torch.float32).eps) for value in ranges]
        quantizer._export_constants = [
            make_constants(
                value, quantizer._num_bits, quantizer._unsigned, quantizer._single_axis()
            )
            for value in ranges
        ]
        quantizer._export_calls = 0
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer._export_constants, quantizer._export_calls


def _record_ranges(
    model: nn.Module, args: Any, kwargs: dict[str, Any] | None, quantizers: list[Any]
) -> dict[int, list[torch.Tensor]]:
    """Run the example once, and return the dynamic ranges of every call, by quantizer."""
    recorded: dict[int, list[torch.Tensor]] = {}

    def recorder(quantizer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def get_amax(inputs: torch.Tensor) -> torch.Tensor:
            amax: torch.Tensor = type(quantizer)._get_amax(quantizer, inputs)
            recorded.setdefault(id(quantizer), []).append(amax.detach())
            return amax

        return get_amax

    for quantizer in quantizers:
        quantizer._get_amax = recorder(quantizer)
    try:
        with evaluating(model):
            positional, named = _split_args(args, kwargs)
            model(*positional, **named)
    finally:
        for quantizer in quantizers:
            del quantizer._get_amax
    return recorded


def _split_args(args: Any, kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`torch.onnx.export` takes a tensor, a tuple, or a tuple that ends in a dictionary of keywords."""
    positional = args if isinstance(args, tuple) else (args,)
    if positional and isinstance(positional[-1], dict) and kwargs is None:
        return positional[:-1], positional[-1]
    return positional, kwargs or {}
