"""`QuantWeightWrapper`: what layers with a weight of codes have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from qdq.distiller.layers.grids import describe_params, mark_accumulators
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.linear_params import LinearParams
from qdq.distiller.ranges.solve import solve_weight
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentError
from qdq.systems.grid import Grid


class QuantWeightWrapper(RangeLinearQuantWrapper):
    """A layer with a weight.

    Args:
        wrapped_module: The float layer; its weight becomes codes.
        settings: As for `RangeLinearQuantWrapper`.
        statistics: Likewise.
        bits_accum: Likewise.
        save_fp_weights: Keep the float weight, so that it can be quantized with other scales.
        also_clip_weights: The clip mode of the activations holds for the weight, too.
        name: As for `RangeLinearQuantWrapper`.

    Attributes:
        w_scale: Multiplier of the weight, of a shape that broadcasts to it; it does not exist if the weight is float.
        w_zero_point: Its zero point, likewise.
        float_weight: The float weight, if it is kept.

    Raises:
        ArgumentError: Statistics, a weight or settings that give no range.
    """

    w_scale: torch.Tensor
    w_zero_point: torch.Tensor
    float_weight: torch.Tensor
    wrapped_module: Any

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
        super().__init__(wrapped_module, settings, statistics, bits_accum=bits_accum, name=name)
        if settings.bits_weights is None:
            return
        weight = self.wrapped_module.weight.detach()
        self.weight_dtype = weight.dtype
        if save_fp_weights:
            self.register_buffer("float_weight", weight.clone())
        clip = settings.clip_acts if also_clip_weights else ClipMode.NONE
        params = self._solve_weight(weight, settings.bits_weights, clip)
        self.register_buffer("w_scale", params.scale)
        self.register_buffer("w_zero_point", params.zero_point)
        self.set_codes(params.quantize(weight))

    def _solve_weight(self, weight: torch.Tensor, bits: int, clip: ClipMode) -> LinearParams:
        settings = self.settings
        mode = settings.mode.weights
        try:
            return solve_weight(weight, bits, mode, clip, settings.clip_n_stds, self.channel_axis)
        except ArgumentError as error:
            raise ArgumentError(f"{self.label}, weight: {error.message}", error.fix) from None

    @property
    def channel_axis(self) -> int | None:
        """The axis of the weight along which scales differ; None: it has one scale."""
        if not self.settings.per_channel_wts:
            return None
        return 1 if isinstance(self.wrapped_module, _ConvTransposeNd) else 0

    def set_codes(self, codes: torch.Tensor) -> None:
        """Replace the codes of the weight.

        Args:
            codes: In float32.
        """
        # A new parameter: another layer may share the old one.
        self.wrapped_module.weight = nn.Parameter(codes, requires_grad=False)

    @property
    def weight_params(self) -> LinearParams | None:
        """Scale and zero point of the weight; None if it is float."""
        if self.settings.bits_weights is None:
            return None
        mode = self.settings.mode.weights
        return LinearParams(self.w_scale, self.w_zero_point, self.settings.bits_weights, mode)

    @torch.no_grad()
    def readjust(self) -> None:
        """Quantize the float weight, if it was kept, with the scale and zero point that are set now."""
        params = self.weight_params
        float_weight = self.read_float_weight()
        if params is not None and float_weight is not None:
            self.set_codes(params.quantize(float_weight))

    @torch.no_grad()
    def read_weight(self) -> torch.Tensor | None:
        """The quantized values of the weight; None if it is float."""
        params = self.weight_params
        return None if params is None else params.dequantize(self.wrapped_module.weight)

    def read_float_weight(self) -> torch.Tensor | None:
        """The weight before it was quantized; None if it was not kept."""
        return getattr(self, "float_weight", None)

    def restore(self) -> nn.Module:
        """The layer with quantized values; where they change anyway, with the float weight if it was kept."""
        weight = self.read_weight()
        layer: nn.Module = self.wrapped_module
        self._codes = dict(layer._parameters)
        if weight is None:
            return layer
        has_zero_point = bool((self.w_zero_point != 0).any())
        float_weight = self.read_float_weight()
        if has_zero_point and float_weight is not None:
            weight = float_weight
        layer.weight = nn.Parameter(weight.to(self.weight_dtype))
        return layer

    def rewrap(self) -> None:
        """The layer with codes again, see `SystemWrapper`."""
        self.wrapped_module._parameters.update(self._codes)

    def describe_weight(self) -> Grid | None:
        """The grid of the weight, see `SystemWrapper`."""
        params = self.weight_params
        if params is None or self.float_reason():
            return None
        return mark_accumulators(describe_params(params), self.bits_accum)
