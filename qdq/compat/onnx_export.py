"""`torch.onnx.export` of a model with quantizers, by either exporter and at any opset from 13.

A forward that is being captured can neither read values nor know which other quantizers there are. So what needs the
whole model is done around the call: `install` puts `export` in the place of `torch.onnx.export`. It refuses
what ONNX cannot express, all at once; hands each quantizer its scale as a constant; and lowers the opset where torch
does not. The three situations of `pytorch-quantization-api.md`, section 8, differ only in what an uncalibrated
quantizer means: an error, or (with `use_fb_fake_quant`) the range that the example inputs have.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import onnx
import torch
from torch import nn

from qdq.check.rules import UNCALIBRATED
from qdq.compat.tensor_quant import E4M3, E4M3_MAX
from qdq.errors import ExportError, StateError
from qdq.formats import Format
from qdq.graph.opset import HIGHEST, LOWEST, LowerOpset
from qdq.quantizer import compute_scale, fake_quantize
from qdq.trace import evaluating

logger = logging.getLogger(__name__)

_LOWEST_FP8_OPSET = 19  # of float8 in QuantizeLinear

_torch_export: Callable[..., Any] = torch.onnx.export


class _Constants(NamedTuple):
    """Scale (ONNX's, a divisor) and zero point of one call of a quantizer, 0-D or 1-D."""

    scale: torch.Tensor
    zero_point: torch.Tensor


def install() -> None:
    """Put `export` in the place of `torch.onnx.export`."""
    torch.onnx.export = export


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """While the block runs, a quantizer without a range is an error; restored on any exit, and may be nested (F13)."""
    from qdq.compat.nn import TensorQuantizer

    former = TensorQuantizer._enable_onnx_export
    TensorQuantizer._enable_onnx_export = True
    try:
        yield
    finally:
        TensorQuantizer._enable_onnx_export = former


@functools.wraps(_torch_export)
def export(model: Any, args: Any = (), f: Any = None, **kwargs: Any) -> Any:
    """`torch.onnx.export`; a model with quantizers becomes QDQ ONNX.

    Args:
        model: Any model; one without enabled quantizers of `qdq.compat` is torch's business alone.
        args: As for torch.
        f: As for torch.
        **kwargs: As for torch; `opset_version` 13 and up, with both exporters.

    Raises:
        RuntimeError: Quantizers without a range, all of them named.
        TypeError: A quantizer that keeps several axes.
        ExportError: A format that ONNX cannot express at this opset, with the one that can.
    """
    quantizers = _enabled_quantizers(model) if isinstance(model, nn.Module) else {}
    if not quantizers:
        return _torch_export(model, args, f, **kwargs)
    dynamo = kwargs.get("dynamo", True)
    opset = kwargs.get("opset_version")
    _require_expressible(model, quantizers, opset, dynamo)
    uncalibrated = [name for name, quantizer in quantizers.items() if _static_range(quantizer) is None]
    if uncalibrated:
        _allow_example_ranges(uncalibrated, quantizers)
    with _constants(model, args, kwargs.get("kwargs"), quantizers):
        if dynamo:
            return _export_dynamo(model, args, f, opset, uncalibrated, kwargs)
        result = _torch_export(model, args, f, **kwargs)
    if uncalibrated:
        _mark_file(f, uncalibrated)
    return result


def _export_dynamo(
    model: nn.Module, args: Any, f: Any, opset: int | None, uncalibrated: list[str], kwargs: dict[str, Any]
) -> Any:
    """Export, then edit what torch has made, then save as torch would."""
    written = opset if opset is None else max(opset, HIGHEST)
    program = _torch_export(model, args, None, **{**kwargs, "opset_version": written})
    if opset is not None and opset < HIGHEST:
        LowerOpset(opset)(program.model)
    if uncalibrated:
        program.model.metadata_props[UNCALIBRATED] = ",".join(uncalibrated)
    if isinstance(f, io.BytesIO):
        onnx.save(program.model_proto, f)
    elif f is not None:
        program.save(
            f,
            include_initializers=kwargs.get("export_params", True),
            keep_initializers_as_inputs=kwargs.get("keep_initializers_as_inputs", False),
            external_data=kwargs.get("external_data", True),
        )
    return program


def _mark_file(f: Any, uncalibrated: list[str]) -> None:
    """Write into a file that its ranges are those of one example."""
    proto = onnx.load_from_string(f.getvalue()) if isinstance(f, io.BytesIO) else onnx.load(f, load_external_data=False)
    proto.metadata_props.add(key=UNCALIBRATED, value=",".join(uncalibrated))
    if isinstance(f, io.BytesIO):
        f.seek(0)
        f.truncate()
    onnx.save(proto, f)


def _enabled_quantizers(model: nn.Module) -> dict[str, Any]:
    """Quantizers that will be written, by dotted name; disabled ones leave no trace."""
    from qdq.compat.nn import TensorQuantizer

    found = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    enabled = {name: quantizer for name, quantizer in found.items() if not quantizer._disabled}
    if collecting := [name for name, quantizer in enabled.items() if quantizer._if_calib]:
        logger.warning(
            "%d quantizers are still collecting: %s. Call disable_calib() and enable_quant() before an export.",
            len(collecting), ", ".join(collecting),
        )  # fmt: skip
    return {name: quantizer for name, quantizer in enabled.items() if quantizer._if_quant}


def require_ranges(model: nn.Module) -> None:
    """Refuse a model with uncalibrated quantizers, naming all of them (F30).

    Raises:
        RuntimeError: With the names, and how to calibrate.
    """
    if missing := [name for name, quantizer in _enabled_quantizers(model).items() if _static_range(quantizer) is None]:
        raise StateError(
            f"{len(missing)} quantizers have no amax: {', '.join(missing)}.",
            "feed batches with enable_calib(), then call load_calib_amax() on each (or qdq.calibrate_model), or "
            "disable() those that shall stay float.",
        )


def _allow_example_ranges(uncalibrated: list[str], quantizers: dict[str, Any]) -> None:
    """Let uncalibrated quantizers through under `use_fb_fake_quant`, with one warning."""
    some = next(iter(quantizers.values()))
    if some._enable_onnx_export or not some.use_fb_fake_quant:
        raise StateError(
            f"{len(uncalibrated)} quantizers have no amax: {', '.join(uncalibrated)}.",
            "feed batches with enable_calib(), then call load_calib_amax() on each (or qdq.calibrate_model), or "
            "disable() those that shall stay float.",
        )
    logger.warning(
        "%d quantizers have no amax: %s. Their scales are the ranges of the example inputs; the file shows the "
        "structure and is not final: calibrate and export again (`qdq check` refuses it, QDQ120).",
        len(uncalibrated), ", ".join(uncalibrated),
    )  # fmt: skip


def _static_range(quantizer: Any) -> torch.Tensor | None:
    """The range that does not depend on the input; None if there is none, or NaN."""
    if quantizer._learn_amax:
        return torch.maximum(-quantizer.clip.clip_value_min, quantizer.clip.clip_value_max).detach()
    amax = quantizer.amax
    if amax is None or bool(torch.isnan(amax).any()):
        return None
    result: torch.Tensor = amax if quantizer._scale_amax is None else amax * quantizer._scale_amax
    return result


def _require_expressible(model: nn.Module, quantizers: dict[str, Any], opset: int | None, dynamo: bool) -> None:
    """Refuse what Q/DQ at this opset cannot say."""
    if opset is not None and opset < LOWEST:
        raise ExportError(
            f"opset {opset} has no QuantizeLinear with an axis.", f"export with opset_version={LOWEST} or above."
        )
    weights: dict[int, Any] = {
        id(module._weight_quantizer): module.weight
        for module in model.modules()
        if hasattr(module, "_weight_quantizer") and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    for name, quantizer in quantizers.items():
        quantizer._single_axis()
        if not quantizer._fake_quant:
            raise ExportError(f"{name} gives codes (fake_quant=False), not Q/DQ.", "use fake quantization here.")
        if quantizer._num_bits == E4M3:
            _require_fp8(name, quantizer, opset, dynamo)
        elif quantizer._num_bits != 8:
            raise ExportError(
                f"{name} has {quantizer._num_bits} bits; QuantizeLinear stores int8.",
                "use num_bits=8, or disable() it.",
            )
        elif quantizer._narrow_range and not quantizer._unsigned and not quantizer.use_fb_fake_quant:
            _require_no_lowest_code(name, quantizer, weights.get(id(quantizer)))
    if unsigned := [name for name, quantizer in quantizers.items() if quantizer._unsigned]:
        logger.warning(
            "%d quantizers are unsigned and become uint8: %s. ONNX Runtime runs that; TensorRT takes it for int8 and "
            "saturates codes above 127 (R-SYM): calibrate with a signed descriptor for it.",
            len(unsigned), ", ".join(unsigned),
        )  # fmt: skip


def _require_fp8(name: str, quantizer: Any, opset: int | None, dynamo: bool) -> None:
    if quantizer._axis is not None:
        raise ExportError(f"{name} is FP8 with an axis; FP8 is written per tensor only.", "use axis=None.")
    if not dynamo:
        raise ExportError(f"{name} is FP8, which the TorchScript exporter cannot write.", "export with dynamo=True.")
    if opset is not None and opset < _LOWEST_FP8_OPSET:
        raise ExportError(
            f"{name} is FP8, which QuantizeLinear of opset {opset} does not have.",
            f"export with opset_version={_LOWEST_FP8_OPSET} or above.",
        )


def _require_no_lowest_code(name: str, quantizer: Any, weight: torch.Tensor | None) -> None:
    """ONNX clamps to -128; that is the narrow range only where no value gets there."""
    amax = _static_range(quantizer)
    if weight is None or amax is None or bool((weight.detach().abs().float() > amax.to(weight.device)).any()):
        raise ExportError(
            f"{name} has narrow_range, and ONNX and TensorRT clamp to -128, not -127 (R-RANGE).",
            "set narrow_range=False and evaluate again; only weights inside their amax can keep it.",
        )


@contextmanager
def _constants(
    model: nn.Module, args: Any, kwargs: dict[str, Any] | None, quantizers: dict[str, Any]
) -> Iterator[None]:
    """Give every quantizer the constants for its calls, computed outside the capture."""
    dynamic = [quantizer for quantizer in quantizers.values() if _static_range(quantizer) is None]
    recorded = _record_ranges(model, args, kwargs, dynamic) if dynamic else {}
    for quantizer in quantizers.values():
        amax = _static_range(quantizer)
        ranges = recorded.get(id(quantizer), []) if amax is None else [amax]
        quantizer._export_constants = [_make_constants(quantizer, value) for value in ranges]
        quantizer._export_calls = 0
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer._export_constants, quantizer._export_calls


def _make_constants(quantizer: Any, amax: torch.Tensor) -> _Constants:
    if quantizer._num_bits == E4M3:
        scale = (amax.detach().float() / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        return _Constants(scale.reshape(()).clone(), torch.zeros((), dtype=torch.float8_e4m3fn))
    scale = compute_scale(amax.detach(), Format(8, quantizer._unsigned))
    scale = scale.reshape(()) if quantizer._single_axis() is None or scale.numel() == 1 else scale.flatten()
    return _Constants(scale.clone(), torch.zeros_like(scale, dtype=torch.int32))


def _record_ranges(
    model: nn.Module, args: Any, kwargs: dict[str, Any] | None, quantizers: list[Any]
) -> dict[int, list[torch.Tensor]]:
    """Run the example once: dynamic ranges of every call, by quantizer."""
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


def write_qdq(quantizer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What both exporters write as QuantizeLinear and DequantizeLinear.

    Args:
        quantizer: The quantizer whose forward is being captured.
        inputs: Any shape; half and bfloat16 get a Cast to float32 before and back after.
    """
    constants = quantizer.__dict__.get("_export_constants")
    if not constants:  # torch.export alone, or a quantizer that the example inputs did not reach
        fmt = Format(quantizer._num_bits, quantizer._unsigned, quantizer._narrow_range)
        return fake_quantize(inputs, quantizer._get_amax(inputs), fmt, quantizer._single_axis())
    scale, zero_point = (part.to(inputs.device) for part in constants[quantizer._export_calls % len(constants)])
    quantizer._export_calls += 1
    if quantizer._num_bits == E4M3:
        return _write_fp8(inputs, scale, zero_point)
    fmt = Format(8, quantizer._unsigned)
    values = inputs if inputs.dtype == torch.float32 else inputs.float()  # the tracer writes a Cast to the same type
    if scale.dim() == 0:
        result = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, fmt.qmin, fmt.qmax)
    else:
        axis = quantizer._single_axis() % inputs.dim()
        result = torch.fake_quantize_per_channel_affine(values, scale, zero_point, axis, fmt.qmin, fmt.qmax)
    return result if inputs.dtype == torch.float32 else result.to(inputs.dtype)


def _write_fp8(inputs: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """For FP8 torch has no operator, so the ONNX ones are named."""
    values = inputs.float()
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, scale, zero_point), dtype=torch.float8_e4m3fn, shape=values.shape, version=19
    )
    result = torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point), dtype=torch.float32, shape=values.shape, version=19
    )
    return result.to(inputs.dtype)
