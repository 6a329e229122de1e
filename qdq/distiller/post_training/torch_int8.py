"""`convert_to_pytorch`: the convolutions and linear layers of a quantized model run by the int8 kernels of torch.

Everything else stays as it is, and so do all values, apart from neighbouring codes where a value lies between two. Some
kernels add pairs of products in 16 bits on a CPU without VNNI instructions, and clamp them there: a warning says so.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from qdq.device import find_device
from qdq.distiller.layers.int8_layer import Int8Layer, using_backend
from qdq.distiller.layers.param_layer import RangeLinearQuantParamLayerWrapper
from qdq.errors import ArgumentError, UnsupportedError

logger = logging.getLogger(__name__)

BACKENDS = ("fbgemm", "qnnpack")
"""The backends of torch, for x86 and for ARM."""

_BITS = 8


def convert_to_pytorch(model: nn.Module, backend: str = "fbgemm") -> nn.Module:
    """Let torch's own int8 kernels compute the layers of a quantized model.

    Args:
        model: A model that `PostTrainLinearQuantizer` has quantized with 8 bits and statistics, on the CPU.
        backend: The backend, "fbgemm" or "qnnpack".

    Returns:
        A copy of the model.

    Raises:
        ArgumentError: Another backend, or a model on a GPU.
        UnsupportedError: The backend is not there, or torch has no int8 kernel for a layer.
    """
    require_int8(backend, find_device(model))
    _require_convertible(model)
    if clamps_sums(backend):
        logger.warning(
            "%s adds products in 16 bits on this CPU, which has no VNNI, and clamps them: results of its layers may be "
            "far from those of the emulation; qnnpack adds in 32 bits",
            backend,
        )
    converted = copy.deepcopy(model)
    for name, layer in list(converted.named_modules()):
        if isinstance(layer, RangeLinearQuantParamLayerWrapper):
            converted.set_submodule(name, Int8Layer(layer, backend))
    return converted


def require_int8(backend: str, device: torch.device) -> None:
    """Refuse int8 kernels that torch does not have.

    Args:
        backend: The backend.
        device: Where the model runs.

    Raises:
        ArgumentError: An unknown backend, or a GPU.
        UnsupportedError: The backend is not there.
    """
    if device.type != "cpu":
        raise ArgumentError(
            "the int8 kernels of torch run on a CPU alone.", "run the model there: --cpu."
        )
    if backend not in BACKENDS:
        raise ArgumentError(f"backend is {backend!r}; expected {', '.join(BACKENDS)}.", "name one.")
    supported = find_engines()
    if backend not in supported:
        raise UnsupportedError(
            f"torch {torch.__version__} has no {backend} here; it has {', '.join(supported) or 'none'}.",
            "leave it out, or export to ONNX: --export-onnx FILE.",
        )


def find_engines() -> list[str]:
    """The backends that this torch has; later ones may have no quantized tensors any more."""
    if not hasattr(torch, "quantize_per_tensor"):
        return []
    engines: list[str] = torch.backends.quantized.supported_engines
    return engines


def clamps_sums(backend: str) -> bool:
    """Whether the kernels of a backend clamp sums of products on this CPU; tried on the largest codes.

    Args:
        backend: One that `require_int8` accepts.
    """
    count, scale = 16, 4096.0
    with using_backend(backend):
        x = torch.quantize_per_tensor(torch.full((1, count), 255.0), 1.0, 0, torch.quint8)
        weight = torch.quantize_per_tensor(torch.full((1, count), 127.0), 1.0, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        result = torch.ops.quantized.linear(x, packed, scale, 0)
    code = int(result.int_repr())
    return abs(code - count * 255 * 127 / scale) > 1


def _require_convertible(model: nn.Module) -> None:
    """Refuse layers that torch has no int8 kernel for, all in one error."""
    problems = []
    for name, layer in model.named_modules():
        if isinstance(layer, RangeLinearQuantParamLayerWrapper):
            problem = _find_problem(layer)
            if problem:
                problems.append(f"{name}: {problem}")
    if problems:
        raise UnsupportedError(
            "torch has no int8 kernel for these layers:\n" + "\n".join(problems),
            "leave them in float (--qe-no-quant-layers), or export to ONNX: --export-onnx FILE.",
        )


def _find_problem(layer: RangeLinearQuantParamLayerWrapper) -> str:
    reason = layer.float_reason()
    if reason:
        return reason
    padding = getattr(layer.wrapped_module, "padding", 0)
    if isinstance(padding, str):
        return f"its padding is {padding!r}, and torch needs numbers"
    settings = layer.settings
    if not layer.is_static:
        return "its ranges are those of each batch"
    if (settings.bits_weights, settings.bits_activations) != (_BITS, _BITS):
        return (
            f"it has {settings.bits_weights} bits for weights and {settings.bits_activations} for activations; "
            f"torch has {_BITS}"
        )
    return ""
