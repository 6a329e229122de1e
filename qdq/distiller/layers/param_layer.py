"""`RangeLinearQuantParamLayerWrapper`: convolutions and linear layers on integers.

    sum = clamp(conv(q_x + zp_x, q_w + zp_w) + q_b),  q_b = clamp(round_half_even(b * s_x * s_w)),  s_sum = s_x * s_w

Zero padding adds integers 0, which are real zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qdq.distiller.layers.accumulator import clamp_sums
from qdq.distiller.layers.exact_sums import choose_type
from qdq.distiller.layers.grids import describe_input
from qdq.distiller.layers.integers import Integers
from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentError
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid


class RangeLinearQuantParamLayerWrapper(QuantWeightWrapper):
    """A convolution, of any dimension and transposed or not, or a linear layer.

    Args:
        wrapped_module: The float layer. Its weight becomes codes, and so does its bias when the layer runs.
        settings: As for `RangeLinearQuantWrapper`.
        statistics: Likewise.
        bits_accum: Width of the sums, and of the codes of the bias.
        save_fp_weights: As for `QuantWeightWrapper`.
        also_clip_weights: Likewise.
        name: As for `RangeLinearQuantWrapper`.

    Attributes:
        accum_scale: s_x * s_w of the last forward; it does not exist if the weight is float.
        fp_bias: The float bias; it does not exist if there is none, or if the weight is float.

    Raises:
        ArgumentError: Another kind of layer, NaN or Inf in its parameters; or statistics, a weight or settings that
            give no range.
    """

    accum_scale: torch.Tensor
    fp_bias: torch.Tensor

    def __init__(
        self,
        wrapped_module: nn.Module,
        settings: LayerSettings,
        statistics: LayerStatistics | None = None,
        *,
        bits_accum: int = 32,
        save_fp_weights: bool = False,
        also_clip_weights: bool = False,
        name: str = "",
    ) -> None:
        if not isinstance(wrapped_module, _ConvNd | nn.Linear):
            raise ArgumentError(
                f"{name or 'the layer'} is a {type(wrapped_module).__name__}, no convolution and no linear layer.",
                "take RangeLinearFakeQuantWrapper.",
            )
        for kind, parameter in wrapped_module.named_parameters(recurse=False):
            require_values(parameter, f"{name or type(wrapped_module).__name__}, {kind}")
        super().__init__(
            wrapped_module,
            settings,
            statistics,
            bits_accum=bits_accum,
            save_fp_weights=save_fp_weights,
            also_clip_weights=also_clip_weights,
            name=name,
        )
        if settings.bits_weights is None:
            return
        self.register_buffer("accum_scale", torch.ones_like(self._per_output(self.w_scale)))
        if self.wrapped_module.bias is not None:
            self.register_buffer("fp_bias", self.wrapped_module.bias.detach().clone())
            codes = torch.zeros_like(self.fp_bias, dtype=torch.float32)
            self.wrapped_module.bias = nn.Parameter(codes, requires_grad=False)

    def set_codes(self, codes: torch.Tensor) -> None:
        """Replace the codes of the weight, see `QuantWeightWrapper`."""
        super().set_codes(codes)
        self._largest_sum: float | None = None

    def compute_float(self, *inputs: Any) -> Any:
        """The output for a float input, with the quantized weight."""
        weight = self.read_weight()
        if weight is None:
            return self.wrapped_module(*inputs)
        (values,) = inputs
        return self._run(values, weight.to(values.dtype), self.read_bias())

    def accumulate(self, *inputs: Integers) -> Integers:
        """The sums of products and the bias, see `RangeLinearQuantWrapper`."""
        (received,) = inputs
        params = self.weight_params
        if params is None:
            values = received.integers / received.scale
            output = self.wrapped_module(values.to(self.wrapped_module.weight.dtype))
            return Integers(output, torch.ones((), device=output.device))
        scale = received.scale * self._per_output(params.scale)
        self.accum_scale.copy_(scale)
        is_dynamic = not self.is_static  # otherwise the statistics have told before
        bias = self.read_bias()
        if bias is not None:
            bias = (bias.float() * scale.flatten()).round()
            bias = clamp_sums(self, bias, can_exceed=is_dynamic, kind="codes of the bias")
            self.wrapped_module.bias.copy_(bias)
        weight = self.wrapped_module.weight + params.zero_point
        self._most_input = received.most
        dtype = choose_type(self._find_largest_sum(weight), received.most, params.num_bits)
        sums = self._run(received.integers.to(dtype), weight.to(dtype), bias)
        return Integers(clamp_sums(self, sums, can_exceed=is_dynamic), scale)

    def _run(
        self, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of the float layer with another weight and bias."""
        parameters = {"weight": weight}
        if bias is not None:
            parameters["bias"] = bias.to(weight.dtype)
        output: torch.Tensor = functional_call(self.wrapped_module, parameters, (values,))
        return output

    def _find_largest_sum(self, weight: torch.Tensor) -> float:
        """The largest sum of absolute weights of an output."""
        if self._largest_sum is None:  # reading it waits for a GPU
            outputs_first = weight.transpose(0, 1) if self._is_transposed else weight
            sums = outputs_first.double().abs().flatten(1).sum(1)
            self._largest_sum = float(sums.max())
        return self._largest_sum

    def find_bound(self) -> float:
        """A bound of its absolute sums without the bias, by the codes that its last input can have."""
        params = self.weight_params
        assert params is not None  # noqa: S101  # a float weight gives no sums of integers
        largest_sum = self._find_largest_sum(self.wrapped_module.weight + params.zero_point)
        return largest_sum * self._most_input

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.wrapped_module, _ConvTransposeNd)

    def _per_output(self, scale: torch.Tensor) -> torch.Tensor:
        """One scale, or one for each channel, in a shape that broadcasts to the output."""
        if scale.dim() == 0:
            return scale
        scale = scale.flatten()
        if isinstance(self.wrapped_module, nn.Linear):
            return scale
        if self._is_transposed:
            scale = scale.repeat(self.wrapped_module.groups)
        return scale.reshape(-1, *[1] * (self.wrapped_module.weight.dim() - 2))

    def read_bias(self) -> torch.Tensor | None:
        """The float bias; None if there is none, or if the weight is float."""
        return getattr(self, "fp_bias", None)

    def restore(self) -> nn.Module:
        """The float layer, see `QuantWeightWrapper`. Its bias has the values of its codes where scales stay."""
        codes = self.wrapped_module.bias
        layer = super().restore()
        bias = self.read_bias()
        if bias is not None:
            if self._is_exact():
                bias = (codes.detach() / self.accum_scale.flatten()).to(bias.dtype)
            layer.bias = nn.Parameter(bias)
        return layer

    def _is_exact(self) -> bool:
        """Whether TensorRT has the scales of the weight and the input: they have no zero points."""
        weight = self.describe_weight()
        if weight is None:
            return False
        grids = (weight, *self.describe_inputs().values())
        return not any(bool((grid.zero_point != 0).any()) for grid in grids)

    def float_reason(self) -> str:
        """Why it is float in TensorRT, see `SystemWrapper`."""
        if self._is_transposed:
            return "transposed convolutions are not taken"
        if self.settings.bits_weights is None:
            return "its weight is float, and TensorRT needs both inputs of a product in int8"
        if self.settings.bits_activations is None:
            return "its input is float, and TensorRT needs both inputs of a product in int8"
        return ""

    def describe_inputs(self) -> dict[int, Grid]:
        """The grid of the input, see `SystemWrapper`."""
        return {} if self.float_reason() else {0: describe_input(self, 0)}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._largest_sum = None
