"""`Int8Layer`: a convolution or linear layer that an int8 kernel of torch computes.

Codes of torch are unsigned for activations and signed for weights: those of another mode are shifted by 128, and so is
the zero point.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qdq.distiller.layers.input_params import find_input_params
from qdq.distiller.layers.metadata import attach
from qdq.distiller.layers.param_layer import RangeLinearQuantParamLayerWrapper
from qdq.distiller.ranges.linear_params import LinearParams
from qdq.distiller.settings.positions import as_positional
from qdq.forward import name_function
from qdq.functions import WEIGHTED
from qdq.systems.affine import cast_like

_SHIFT = 128
_OPERATORS: Any = torch.ops.quantized
_OPTIONS = ("stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # of torch's convolutions


class Int8Layer(nn.Module):
    """A convolution or linear layer that an int8 kernel of torch computes.

    Args:
        layer: The quantized layer.
        backend: The backend of the kernel.
    """

    def __init__(self, layer: RangeLinearQuantParamLayerWrapper, backend: str) -> None:
        super().__init__()
        self.layer = layer
        self._backend = backend
        self._packed: dict[str, Any] = {}

    @torch.no_grad()
    def forward(self, *inputs: torch.Tensor, **keywords: torch.Tensor) -> torch.Tensor:
        """The output on the grid of the layer."""
        layer = self.layer
        (values,), _ = as_positional(layer.wrapped_module, layer.label, inputs, keywords)
        params = find_input_params(layer, 0, values).params
        with _Int8Calls(self, params):
            output = layer.wrapped_module(params.fake_quantize(values))
        rounded = self.output_params.fake_quantize(output)
        return attach(cast_like(rounded, values), self.output_params, layer)

    @property
    def output_params(self) -> LinearParams:
        """Scale and zero point of the output."""
        params = self.layer.output_params
        assert params is not None  # noqa: S101  # `convert_to_pytorch` has asked
        return params

    def compute(self, name: str, arguments: dict[str, Any], params: LinearParams) -> torch.Tensor:
        """The result of the function that the float layer calls.

        Args:
            name: "conv2d", "linear", ...
            arguments: Its arguments by name.
            params: Scale and zero point of the input.
        """
        key = str([arguments[option] for option in _OPTIONS])
        kernel = getattr(_OPERATORS, name)
        if self.layer.settings.clip_half_range:  # a ReLU is fused
            kernel = getattr(_OPERATORS, f"{name}_relu")
        with using_backend(self._backend):
            if key not in self._packed:
                self._packed[key] = self._pack(name, arguments)
            grid = _describe_activation(params)
            codes = torch.quantize_per_tensor(arguments["input"].float(), *grid, torch.quint8)
            output = kernel(codes, self._packed[key], *_describe_activation(self.output_params))
            values: torch.Tensor = output.dequantize()
        return values

    def _pack(self, name: str, arguments: dict[str, Any]) -> Any:
        """The weight and bias in the layout of the kernel."""
        bias = self.layer.read_bias()
        operands: list[Any] = [_quantize_weight(self.layer), None if bias is None else bias.float()]
        if name != "linear":
            num_axes = self.layer.wrapped_module.weight.dim() - 2
            for option in _OPTIONS[:3]:
                operands.append(_as_list(arguments[option], num_axes))
            operands.append(arguments["groups"])
        return getattr(_OPERATORS, f"{name}_prepack")(*operands)


class _Int8Calls(TorchFunctionMode):
    """Replaces the call of a function with a weight in the forward of a float layer, which may pad before it.

    Args:
        layer: Computes the function.
        params: Scale and zero point of the input.
    """

    def __init__(self, layer: Int8Layer, params: LinearParams) -> None:
        super().__init__()
        self._layer = layer
        self._params = params

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of a function."""
        name = name_function(func)
        if name not in WEIGHTED:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", *_OPTIONS)
        arguments = _DEFAULTS | dict(zip(names, args, strict=False)) | (kwargs or {})
        return self._layer.compute(name, arguments, self._params)


@contextmanager
def using_backend(backend: str) -> Iterator[None]:
    """Choose the backend of torch's int8 kernels in the block.

    Args:
        backend: Its name in torch.
    """
    former = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor.* are deprecated")
            yield
    finally:
        torch.backends.quantized.engine = former


def _describe_activation(params: LinearParams) -> tuple[float, int]:
    """Scale and zero point of torch for an activation, whose codes begin with 0."""
    shift = _SHIFT if params.mode.is_signed else 0
    return 1 / float(params.scale), shift - int(params.zero_point)


def _quantize_weight(layer: RangeLinearQuantParamLayerWrapper) -> torch.Tensor:
    """The weight as a quantized tensor of torch, whose codes begin with -128."""
    params, weight = layer.weight_params, layer.read_weight()
    assert params is not None and weight is not None  # noqa: S101  # `convert_to_pytorch` has asked
    shift = 0 if params.mode.is_signed else -_SHIFT
    scales = params.scale.double().reciprocal().flatten()
    zero_points = shift - params.zero_point.flatten().long()
    if scales.numel() == 1:
        return torch.quantize_per_tensor(weight, float(scales), int(zero_points), torch.qint8)
    return torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)


def _as_list(option: Any, num_axes: int) -> list[int]:
    """An option of a convolution with a number for each axis."""
    return [option] * num_axes if isinstance(option, int) else list(option)
