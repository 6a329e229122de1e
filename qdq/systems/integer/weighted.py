"""`QWeighted`: what layers with weights have in common in integer-only inference; `module` has the formula."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qdq.errors import StateError
from qdq.systems.affine import FakeQuantize, Scheme
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid
from qdq.systems.integer.arithmetic import (
    find_bias_block,
    find_ratio,
    fits_int32,
    quantize_bias,
    report_coarse_bias,
    rescale,
    split_blocks,
)
from qdq.systems.integer.checks import naming_layer, require_int32
from qdq.systems.integer.module import QModule
from qdq.systems.integer.qparam import QParam
from qdq.systems.integer.state import fit_parameters

logger = logging.getLogger(__name__)


class QWeighted(QModule):
    """A layer with a weight.

    Args:
        layer: The float layer, which keeps its place in the model; `freeze` changes it.
        qi: As for `QModule`.
        qo: As for `QModule`.
        num_bits: Width of all codes.
        scheme: As for `affine.find_codes`.
        axis: As for `QParam`, for the weight.
        groups: As for `QParam`, for the weight.

    Attributes:
        qw: Range of the weight.
        M: Sw * Sx / Sa after `freeze`: one number, or one for each output channel or block of inputs; before, empty.
    """

    M: torch.Tensor
    attribute: str
    """Name of the attribute that holds the float layer; `freeze` replaces its weight by qw - Zw and its bias by qb."""
    has_relu = False
    has_integer_kernel = True
    """Whether torch computes the layer on integers, on a CPU."""

    def __init__(
        self,
        layer: nn.Module,
        qi: bool = True,
        qo: bool = True,
        num_bits: int = 8,
        *,
        scheme: Scheme = "unsigned",
        axis: int | None = None,
        groups: int | None = None,
    ) -> None:
        label = f"{type(self).__name__} of {layer}"
        super().__init__(qi, qo, num_bits, scheme=scheme, label=label)
        options: Any = {"scheme": scheme, "axis": axis, "groups": groups}
        self.qw = QParam(num_bits, label=f"{label}, weight", **options)
        setattr(self, self.attribute, layer)
        self.register_buffer("M", torch.empty(0, dtype=torch.float64))

    @property
    def layer(self) -> Any:
        """The float layer."""
        return getattr(self, self.attribute)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Calibrate: compute on the fake-quantized input and weight, which widen their ranges, then fake-quantize."""
        x = self.observe_input(x)
        weight, bias = self.fold(x)
        self.qw.observe(weight)
        with naming_layer(self.label, x):
            x = self.operate(x, FakeQuantize.apply(weight, self.qw), bias)
        return self.observe_output(F.relu(x) if self.has_relu else x)

    def fold(self, x: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias to quantize.

        Args:
            x: The input; None: what was learned from earlier inputs counts.
        """
        return self.layer.weight, self.layer.bias

    def operate(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The float layer with another weight."""
        raise NotImplementedError

    def per_channel(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number, or one for each output channel, in a shape that fits the output."""
        return numbers

    def check_freeze(self, qi: QParam | None = None, qo: QParam | None = None) -> list[QParam]:
        """The ranges of the input and the output; the weight has a range, too. See `QModule.check_freeze`."""
        ranges = super().check_freeze(qi, qo)
        if not self.layer.weight.is_floating_point():
            raise StateError(
                f"{self.label}: the weight holds codes already.",
                "freeze once; a layer that two QModules share needs a copy for each.",
            )
        self.qw.require_calibrated()
        weight, bias = self.fold(None)
        require_values(weight, self.qw.label)
        if bias is not None:
            require_values(bias, f"{self.label}, bias")
        return ranges

    @torch.no_grad()
    def freeze(self, qi: QParam | None = None, qo: QParam | None = None) -> None:
        """Compute M, and replace the weight by qw - Zw and the bias by qb; once. See `QModule.freeze`."""
        self.take_ranges(qi, qo)
        weight, bias = self.fold(None)
        codes = self.qw.quantize_tensor(weight)
        codes = codes - self.qw.spread(self.qw.zero_point, codes).to(torch.int32)
        self.M = find_ratio(self.qw, codes, self.qi.scale, self.qo.scale)
        if bias is not None:
            scale = self.bias_scale()
            bias_codes = quantize_bias(bias, scale, self.label)
            report_coarse_bias(bias, bias_codes, scale, self.qo.scale, self.label)
            self.layer.bias = nn.Parameter(bias_codes, requires_grad=False)
        self.layer.weight = nn.Parameter(codes, requires_grad=False)
        self.is_frozen = True
        if not self._fits_int32():
            text = "%s: its sums may exceed int32; they are computed in float64"
            logger.warning(text, self.label)

    @torch.no_grad()
    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of the output, int32. See `QModule.quantize_inference`."""
        codes = self.require_codes(x) - self.qi.zero_point.to(torch.int32)
        require_int32(self.layer.weight, self.label)
        with naming_layer(self.label, x):
            sums = self.accumulate(codes)
        by_block = self.qw.axis == 1
        ratio = self.M.reshape(-1, *[1] * codes.dim()) if by_block else self.per_channel(self.M)
        scaled = rescale(sums, ratio, is_shared=by_block, is_integer=self._fits_int32())
        zero_point = self.qo.zero_point.long()
        lowest, highest = self.qo.codes
        result = (scaled + zero_point).clamp(lowest, highest)
        if self.has_relu:
            result = torch.maximum(result, zero_point)
        return result.to(torch.int32)

    def accumulate(self, codes: torch.Tensor) -> torch.Tensor:
        """The sums of products and the bias: in int32 on a CPU, exact in float64 on other devices; returned as int64.

        Args:
            codes: Codes of the input minus its zero point, int32.

        Returns:
            `[blocks, N, C, ...]`; one block, unless the weight has several scales along its inputs.
        """
        layer = self.layer
        has_kernel = codes.device.type == "cpu" and self.has_integer_kernel
        is_integer = has_kernel and self._fits_int32()
        dtype = torch.int32 if is_integer else torch.float64
        sums = []
        for weight in split_blocks(layer.weight, self.qw):
            products = self.operate(codes.to(dtype), weight.to(dtype), None)
            sums.append(products.long())
        if layer.bias is not None:
            sums[find_bias_block(self.qw)] += self.per_channel(layer.bias)
        return torch.stack(sums)

    def grids(self) -> dict[str, Grid]:
        """The grids of "input", "weight" and "output", those that it has. See `QModule.grids`."""
        grids = super().grids()
        if self.qw.is_calibrated:
            grids["weight"] = self.qw.describe(channels=len(self.layer.weight))
        return grids

    def bias_scale(self) -> torch.Tensor:
        """Scale of the bias codes in float64: Sw * Sx = M * Sa."""
        ratio = self.M[find_bias_block(self.qw)] if self.qw.axis == 1 else self.M
        return ratio * self.qo.scale.double()

    def _fits_int32(self) -> bool:
        return fits_int32(self.layer.weight, self.layer.bias, self.qi)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        ratio = state_dict.get(f"{prefix}M")
        if ratio is not None:
            self.M = torch.empty(ratio.shape, dtype=torch.float64, device=self.M.device)
            self.is_frozen = ratio.numel() > 0
            fit_parameters(self.layer, state_dict, f"{prefix}{self.attribute}.", self.is_frozen)
        super()._load_from_state_dict(state_dict, prefix, *args)
