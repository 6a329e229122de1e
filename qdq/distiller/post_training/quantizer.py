"""`PostTrainLinearQuantizer`: a trained float model becomes one whose layers compute on codes.

The steps: BatchNorm is folded, ranges are cut to what activations use, a ReLU moves into the layer before it, and each
layer gets a wrapper. Function calls stay float; `modularize` makes modules of them before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.distiller.command.log import LOADING_STATS, PREPARING
from qdq.distiller.layers.swap_layers import WeightOptions
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.post_training.adjust import list_clipping, list_params, set_param
from qdq.distiller.post_training.idle_overrides import warn_of_idle
from qdq.distiller.post_training.preparation import prepare_layers, require_float
from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.ranges.number_tensors import Numbers
from qdq.distiller.settings.layer_settings import LayerSettings, update_settings
from qdq.distiller.settings.names import is_wrapper
from qdq.distiller.settings.overrides import Overrides, Resolution, resolve
from qdq.distiller.settings.values import read_value
from qdq.distiller.statistics.records import ModelStatistics
from qdq.distiller.statistics.statistics_file import read_statistics
from qdq.forward import require_model, unwrap_compiled
from qdq.systems.settings import require_bits
from qdq.systems.unquantized import UnquantizedReport

logger = logging.getLogger(__name__)


class PostTrainLinearQuantizer:
    """Quantizes a model after training, in place.

    Args:
        model: A trained float model.
        bits_activations: Bits of outputs and inputs; None or 0: float.
        bits_parameters: Bits of weights, likewise.
        bits_accum: Bits of sums.
        overrides: Settings of single layers: name or pattern -> settings, the first that matches.
        mode: A mode or its name, or one for activations and one for weights.
        clip_acts: The clip mode of activations or its name.
        per_channel_wts: Whether each output channel of a weight has its own scale.
        model_activation_stats: Statistics, or the YAML file of them; None: the range of each batch counts (dynamic).
        fp16: Deprecated form of `fpq_module=16`.
        clip_n_stds: Number of standard deviations for the clip mode N_STD.
        clip_half_range: Whether layers before a ReLU clip half of a distribution. They always do; elsewhere it has no
            effect.
        scale_approx_mult_bits: Bits of integer multipliers that stand for scales; None: exact scales.
        inputs_quant_auto_fallback: Whether an input without a scale is quantized as the output of its layer.
        fpq_module: 16, 32 or 64: layers run in this float type and are not quantized.
        save_fp_weights: Keep the float weights, so that weights can be quantized again.
        also_clip_weights: The clip mode holds for weights, too.

    Attributes:
        model: The model.
        model_activation_stats: Its statistics; after `prepare_model`, as folding and cuts left them.
        resolution: The settings of all layers, and the overrides that apply to none; None before `prepare_model`.
        left_float: The layers and calls that stay float, with the reasons, after `prepare_model`.
        layers: Name -> quantized layer, after `prepare_model`.

    Raises:
        ArgumentError: An invalid value, or the statistics file does not exist.
        ArgumentTypeError: A value of another type.
        DataError: The statistics file is damaged.
        StateError: The model is quantized already.
    """

    def __init__(
        self,
        model: nn.Module,
        bits_activations: int | None = 8,
        bits_parameters: int | None = 8,
        bits_accum: int = 32,
        overrides: Overrides | None = None,
        mode: LinearQuantMode | ModePair | Mapping[str, Any] | str = LinearQuantMode.SYMMETRIC,
        clip_acts: ClipMode | str = ClipMode.NONE,
        per_channel_wts: bool = False,
        model_activation_stats: ModelStatistics | Mapping[str, Any] | Path | str | None = None,
        fp16: bool = False,
        clip_n_stds: float | None = None,
        clip_half_range: bool = False,
        scale_approx_mult_bits: int | None = None,
        inputs_quant_auto_fallback: bool = True,
        fpq_module: int | None = None,
        save_fp_weights: bool = False,
        also_clip_weights: bool = False,
    ) -> None:
        require_model(model)
        require_float(model)
        require_bits(bits_accum, "bits_accum", 2)
        values = {
            "bits_activations": bits_activations,
            "bits_weights": bits_parameters,
            "mode": mode,
            "clip_acts": clip_acts,
            "per_channel_wts": per_channel_wts,
            "clip_n_stds": clip_n_stds,
            "clip_half_range": clip_half_range,
            "scale_approx_mult_bits": scale_approx_mult_bits,
            "inputs_quant_auto_fallback": inputs_quant_auto_fallback,
            "fpq_module": fpq_module,
            "fp16": fp16,
        }
        place = type(self).__name__
        self.defaults = update_settings(LayerSettings(), values, place, values.keys())
        self.model = model
        self.overrides = overrides
        self.weight_options = WeightOptions(
            bits_accum,
            read_value("save_fp_weights", save_fp_weights, place),
            read_value("also_clip_weights", also_clip_weights, place),
        )
        self.model_activation_stats: ModelStatistics | None = None
        if model_activation_stats is not None:
            if isinstance(model_activation_stats, str | Path):
                logger.info(LOADING_STATS, model_activation_stats)
            self.model_activation_stats = read_statistics(model_activation_stats)
        self.resolution: Resolution | None = None
        self.left_float = UnquantizedReport((), "")
        self.layers: dict[str, RangeLinearQuantWrapper] = {}
        self._readers: dict[str, frozenset[str]] = {}

    def prepare_model(self, dummy_input: Any) -> None:
        """Quantize the model in place. It runs on the dummy input a few times, whose values do not matter.

        Args:
            dummy_input: A batch, as the model is called with.

        Raises:
            ArgumentError: The statistics lack layers, or statistics, weights or settings give no range.
            ArgumentTypeError: An unknown setting in an override.
            StateError: The model is quantized already.
        """
        require_float(self.model)
        logger.info(PREPARING, type(self).__name__)
        core = unwrap_compiled(self.model)
        core = core.get_submodule("module") if is_wrapper(core) else core
        resolution = resolve(core, self.defaults, self.overrides)
        prepared = prepare_layers(
            core,
            dummy_input,
            resolution.settings,
            self.model_activation_stats,
            self.weight_options,
        )
        warn_of_idle(self.overrides, resolution.origins, core)
        self.resolution = replace(resolution, settings=prepared.settings)
        self.model_activation_stats = prepared.statistics
        self.layers = prepared.layers
        self.left_float = prepared.left_float
        self._readers = prepared.readers

    @property
    def linear_quant_params(self) -> dict[str, torch.Tensor]:
        """Name -> scale or zero point that one may set; weights have them with `save_fp_weights`."""
        return list_params(self.layers)

    @property
    def clipping_params(self) -> dict[str, torch.Tensor]:
        """Name -> range that gets codes: its largest absolute value, or both ends for an asymmetric mode."""
        return list_clipping(self.layers)

    def set_linear_quant_param(self, name: str, value: Numbers) -> None:
        """Set a scale, a zero point or a range; what depends on it follows in the next forward.

        Args:
            name: One of `linear_quant_params` or `clipping_params`.
            value: Of the shape that it has there, or a number.

        Raises:
            ArgumentError: An unknown name or an invalid value.
            NumberTypeError: The value is no number.
        """
        layer = set_param(self.layers, name, value)
        layer.force_readjust = True
        for reader in self._readers[name.rpartition(".")[0]]:
            self.layers[reader].force_readjust = True

    def update_linear_quant_params(self, values: Mapping[str, Numbers]) -> None:
        """Set several of them, see `set_linear_quant_param`.

        Args:
            values: Name -> value.
        """
        for name, value in values.items():
            self.set_linear_quant_param(name, value)
