"""Layers that compute in float: rounded afterwards, in another float type, or a table of codes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from qdq.distiller.layers.input_params import find_input_params
from qdq.distiller.layers.integers import Integers
from qdq.distiller.layers.metadata import attach, read_metadata
from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.ranges.linear_params import LinearParams
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.positions import as_positional
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentError
from qdq.systems.arithmetic import require_batch, spoil_infinite
from qdq.systems.wrapper import SystemWrapper

_FLOAT_TYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


class FPWrapper(SystemWrapper):
    """A layer that runs in a float type of its own; its output has the type that its input had.

    Args:
        wrapped_module: The float layer, which is copied.
        precision: 16, 32 or 64 bits.
    """

    def __init__(self, wrapped_module: nn.Module, precision: int) -> None:
        super().__init__(copy.deepcopy(wrapped_module).to(_FLOAT_TYPES[precision]))
        self.precision = precision

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """The output of the layer."""
        return run_in_type(self.wrapped_module, _FLOAT_TYPES[self.precision], inputs, arguments)

    def restore(self) -> nn.Module:
        """The layer in float32, see `SystemWrapper`."""
        return self.wrapped_module.float()

    def rewrap(self) -> None:
        """The layer in its type again, see `SystemWrapper`."""
        self.wrapped_module.to(_FLOAT_TYPES[self.precision])


def run_in_type(module: nn.Module, dtype: torch.dtype | None, inputs: Any, arguments: Any) -> Any:
    """Call a module with floats in a type.

    Args:
        module: The module, whose parameters have the type.
        dtype: The type; None: that of the inputs.
        inputs: Positional arguments.
        arguments: Keyword arguments.

    Returns:
        The output, with floats in the type of the first float input.
    """
    if dtype is None:
        return module(*inputs, **arguments)
    types = [value.dtype for value in inputs if isinstance(value, torch.Tensor)]
    former = next((kind for kind in types if kind.is_floating_point), torch.float32)

    def cast(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return value.to(kind) if value.is_floating_point() else value

    inputs, arguments = tree_map_only(
        torch.Tensor, lambda value: cast(value, dtype), (inputs, arguments)
    )
    output = module(*inputs, **arguments)
    return tree_map_only(torch.Tensor, lambda value: cast(value, former), output)


class RangeLinearFakeQuantWrapper(RangeLinearQuantWrapper):
    """A layer that computes in float; its output is rounded to codes. An output that is no float tensor is not.

    Args:
        wrapped_module: The float layer.
        settings: As for `RangeLinearQuantWrapper`; `fpq_module` is the float type, and `quantize_inputs` rounds inputs
            that come without a scale.
        statistics: As for `RangeLinearQuantWrapper`.
        bits_accum: Likewise.
        name: Likewise.
    """

    def __init__(
        self,
        wrapped_module: nn.Module,
        settings: LayerSettings,
        statistics: LayerStatistics | None = None,
        *,
        bits_accum: int = 32,
        name: str = "",
    ) -> None:
        super().__init__(wrapped_module, settings, statistics, bits_accum=bits_accum, name=name)
        self.dtype = None
        if settings.fpq_module is not None:
            self.dtype = _FLOAT_TYPES[settings.fpq_module]
            self.wrapped_module = copy.deepcopy(wrapped_module).to(self.dtype)

    @torch.no_grad()
    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """The rounded output, see `RangeLinearQuantWrapper`.

        Raises:
            ArgumentError: Also, the layer makes NaN or Inf.
        """
        self.start_forward()
        inputs, arguments = as_positional(self.wrapped_module, self.label, inputs, arguments)
        received = tuple(self._receive(index, value) for index, value in enumerate(inputs))
        output = run_in_type(self.wrapped_module, self.dtype, received, arguments)
        is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
        if not is_float or self.settings.bits_activations is None:
            return output
        require_batch(output, f"{self.label}, output")
        one = torch.ones((), device=output.device)
        return self.round_output(Integers(spoil_infinite(output), one), output)

    def _receive(self, index: int, value: Any) -> Any:
        """An input, rounded if it comes without a scale and shall have one."""
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not is_float:
            return value
        if read_metadata(value) is None and not self.settings.quantize_inputs:
            self.note_source(index, None)
            return value
        params, has_codes = find_input_params(self, index, value)
        return value if has_codes else params.fake_quantize(spoil_infinite(value))


class RangeLinearEmbeddingWrapper(QuantWeightWrapper):
    """`nn.Embedding` with a table of codes; its output has the scale of the table.

    Args:
        wrapped_module: The float layer.
        settings: As for `RangeLinearQuantWrapper`; its bits are those of the weight.
        save_fp_weights: As for `QuantWeightWrapper`.
        name: As for `RangeLinearQuantWrapper`.

    Raises:
        ArgumentError: No embedding, or a table that gives no range.
    """

    def __init__(
        self,
        wrapped_module: nn.Module,
        settings: LayerSettings,
        *,
        save_fp_weights: bool = False,
        name: str = "",
    ) -> None:
        if not isinstance(wrapped_module, nn.Embedding):
            raise ArgumentError(
                f"{name or 'the layer'} is a {type(wrapped_module).__name__}, no Embedding.",
                "take RangeLinearFakeQuantWrapper.",
            )
        super().__init__(wrapped_module, settings, save_fp_weights=save_fp_weights, name=name)

    @property
    def channel_axis(self) -> int | None:
        """None: all words have one scale, which the output has, too."""
        return None

    @property
    def output_params(self) -> LinearParams | None:
        """Those of the table."""
        return self.weight_params

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The quantized rows of the table."""
        self.start_forward()
        params = self.weight_params
        if params is None:
            return self.wrapped_module(*inputs, **keywords)
        output = params.dequantize(self.wrapped_module(*inputs, **keywords))
        return attach(output, params, self)

    def float_reason(self) -> str:
        """Why it is float in TensorRT, see `SystemWrapper`."""
        return "an Embedding reads rows of its table, which is no product"
