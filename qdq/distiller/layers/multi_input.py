"""Sums, products and concatenations of quantized tensors on integers.

    Concat, EltwiseAdd     inputs are rounded to the scale of the output, then concatenated or added
    EltwiseMult            the product of the integers has the product of the scales
    Matmul, BatchMatmul    as convolutions: sums of products with the scale s_1 * s_2

All need statistics: the scale of the output must be known before.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from qdq.distiller.layers.accumulator import clamp_sums
from qdq.distiller.layers.exact_sums import choose_type
from qdq.distiller.layers.grids import describe_input
from qdq.distiller.layers.integers import Integers
from qdq.distiller.layers.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from qdq.distiller.layers.shortcut import find_shortcuts
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.ranges.modes import get_quantized_range
from qdq.distiller.ranges.scale_approximation import apply_approximation
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentError, UnsupportedError
from qdq.systems.grid import Grid

_USUAL_BITS_ACCUM = 32


class _MultiInputWrapper(RangeLinearQuantWrapper):
    """A module of several quantized inputs.

    Args:
        wrapped_module: The float module.
        settings: As for `RangeLinearQuantWrapper`.
        statistics: Likewise; it cannot be None.
        bits_accum: As for `RangeLinearQuantWrapper`.
        name: Likewise.

    Raises:
        ArgumentError: Another kind of module, or statistics or settings that give no range.
        UnsupportedError: No statistics.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]

    def __init__(
        self,
        wrapped_module: nn.Module,
        settings: LayerSettings,
        statistics: LayerStatistics | None = None,
        *,
        bits_accum: int = 32,
        name: str = "",
    ) -> None:
        label = name or type(wrapped_module).__name__
        if not isinstance(wrapped_module, self.kinds):
            expected = " or ".join(kind.__name__ for kind in self.kinds)
            raise ArgumentError(
                f"{label} is a {type(wrapped_module).__name__}; {type(self).__name__} takes {expected}.",
                "take the wrapper of its class.",
            )
        if statistics is None:
            raise UnsupportedError(
                f"{label}: {type(self).__name__} has no dynamic mode: its inputs need one scale before it runs.",
                "give statistics.",
            )
        super().__init__(wrapped_module, settings, statistics, bits_accum=bits_accum, name=name)

    def clamp_products(self, sums: torch.Tensor, largest: int) -> torch.Tensor:
        """Sums of products within the codes of the accumulator.

        Args:
            sums: The sums.
            largest: A bound of their absolute values.
        """
        highest = get_quantized_range(self.bits_accum)[1]
        return clamp_sums(self, sums, can_exceed=largest > highest)

    def clamp_steps(self, steps: torch.Tensor) -> torch.Tensor:
        """Numbers of steps of the output within the codes of the accumulator; 32 bits are far more than it has."""
        return clamp_sums(self, steps, can_exceed=self.bits_accum < _USUAL_BITS_ACCUM)

    def rescale_inputs(
        self, inputs: tuple[Integers, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The inputs, rounded to the scale of the output, and that scale."""
        scale = self.output_scale
        rescaled = []
        for received in inputs:
            factor = apply_approximation(
                scale / received.scale, self.settings.scale_approx_mult_bits
            )
            rescaled.append(self.clamp_steps((received.integers * factor).round_()))
        return rescaled, scale


class RangeLinearQuantConcatWrapper(_MultiInputWrapper):
    """`Concat`: its inputs have the scale of its output."""

    kinds = (Concat,)

    def accumulate(self, *inputs: Integers) -> Integers:
        """The concatenation of the rescaled inputs, see `RangeLinearQuantWrapper`."""
        rescaled, scale = self.rescale_inputs(inputs)
        return Integers(self.wrapped_module(*rescaled), scale)

    def float_reason(self) -> str:
        """Why no input is rounded before it, see `SystemWrapper`."""
        return "the result of Concat is rounded, so that all its inputs share one scale"


class RangeLinearQuantEltwiseAddWrapper(_MultiInputWrapper):
    """`EltwiseAdd`: its inputs have the scale of its output, or are multiples of its step beyond the codes."""

    kinds = (EltwiseAdd,)

    def accumulate(self, *inputs: Integers) -> Integers:
        """The sum of the rescaled inputs, see `RangeLinearQuantWrapper`."""
        rescaled, scale = self.rescale_inputs(inputs)
        return Integers(self.clamp_steps(self.wrapped_module(*rescaled)), scale)

    def describe_inputs(self) -> dict[int, Grid]:
        """The grids of the inputs that are rounded before the addition, see `SystemWrapper`."""
        if self.output_params is None or self.wrapped_module.feeds_float:
            return {}
        return {index: describe_input(self, index) for index in find_shortcuts(self)}

    def float_reason(self) -> str:
        """Why an input is not rounded before it, see `SystemWrapper`."""
        if self.wrapped_module.feeds_float:
            return "the sum goes into activations and products in float"
        if self.constant_inputs:
            return "a constant is added to it"
        return "a convolution goes straight into the addition"

    def list_differences(self) -> list[str]:
        """What TensorRT does not round, see `SystemWrapper`."""
        return ["its inputs are not rounded to the scale of the sum"]


class RangeLinearQuantEltwiseMultWrapper(_MultiInputWrapper):
    """`EltwiseMult`: products of integers."""

    kinds = (EltwiseMult,)

    def accumulate(self, *inputs: Integers) -> Integers:
        """The product of the integers, see `RangeLinearQuantWrapper`."""
        factors = [received.integers for received in inputs]
        scale = torch.ones_like(self.output_scale)
        for received in inputs:
            scale = scale * received.scale
        most = math.prod(received.most for received in inputs)
        dtype = choose_type(1, most, 0)
        products = self.wrapped_module(*[factor.to(dtype) for factor in factors])
        return Integers(self.clamp_products(products, most), scale)


class RangeLinearQuantMatmulWrapper(_MultiInputWrapper):
    """`Matmul` and `BatchMatmul`: sums of products of two quantized tensors."""

    kinds = (Matmul, BatchMatmul)

    def accumulate(self, *inputs: Integers) -> Integers:
        """The sums of products, see `RangeLinearQuantWrapper`."""
        first, second = inputs
        largest_sum = first.integers.shape[-1] * first.most
        dtype = choose_type(largest_sum, second.most, first.most.bit_length() - 1)
        sums = self.wrapped_module(first.integers.to(dtype), second.integers.to(dtype))
        sums = self.clamp_products(sums, largest_sum * second.most)
        return Integers(sums, first.scale * second.scale)
