"""The wrappers of a model: built from what was chosen for each layer, then put in the place of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from qdq.distiller.layers.leaves import (
    FPWrapper,
    RangeLinearEmbeddingWrapper,
    RangeLinearFakeQuantWrapper,
)
from qdq.distiller.layers.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from qdq.distiller.layers.multi_input import (
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantMatmulWrapper,
)
from qdq.distiller.layers.param_layer import RangeLinearQuantParamLayerWrapper
from qdq.distiller.layers.wrapping import Choice, Kind
from qdq.distiller.post_training.fusion import Cuts
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentError
from qdq.systems.wrapper import SystemWrapper
from qdq.text import list_names

_SHOWN_NAMES = 5
_NEEDING: tuple[Kind, ...] = ("weighted", "several inputs")
_SEVERAL_INPUTS: dict[type[nn.Module], Any] = {
    Concat: RangeLinearQuantConcatWrapper,
    EltwiseAdd: RangeLinearQuantEltwiseAddWrapper,
    EltwiseMult: RangeLinearQuantEltwiseMultWrapper,
    Matmul: RangeLinearQuantMatmulWrapper,
    BatchMatmul: RangeLinearQuantMatmulWrapper,
}


class FusedActivation(SystemWrapper):
    """In the place of an activation that the layer before applies."""

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The input itself."""
        (values,) = (*inputs, *keywords.values())
        return values


class Planned(NamedTuple):
    """A layer, what becomes of it, and its settings."""

    module: nn.Module
    choice: Choice
    settings: LayerSettings


class WeightOptions(NamedTuple):
    """Options of all layers with weights, see `PostTrainLinearQuantizer`."""

    bits_accum: int
    save_fp_weights: bool
    also_clip_weights: bool


def require_statistics(planned: Mapping[str, Planned], names: Mapping[str, Any]) -> None:
    """Refuse statistics of another model, all missing layers in one error.

    Args:
        planned: The layers by name.
        names: The statistics by name.

    Raises:
        ArgumentError: Layers whose output is rounded have none.
    """
    missing = []
    for name, layer in planned.items():
        is_rounded = layer.settings.bits_activations is not None
        if layer.choice.kind in _NEEDING and is_rounded and name not in names:
            missing.append(name)
    if missing:
        raise ArgumentError(
            f"the statistics have no entry for {len(missing)} layers: {list_names(missing, _SHOWN_NAMES)}.",
            "collect statistics of this very model, after modularize if that is used.",
        )


def build_wrappers(
    planned: Mapping[str, Planned], cuts: Cuts | None, options: WeightOptions
) -> dict[str, nn.Module]:
    """The modules that take the place of layers, whose weights become codes.

    Args:
        planned: The layers by name.
        cuts: The statistics and what a ReLU does to ranges; None: dynamic.
        options: Those of layers with weights.

    Raises:
        ArgumentError: Statistics, a weight or settings that give no range.
    """
    builder = _Builder(cuts, options)
    wrappers: dict[str, nn.Module] = {}
    for name, layer in planned.items():
        if layer.choice.kind != "float":
            wrappers[name] = builder.build(name, layer)
    return wrappers


class _Builder:
    """Builds wrappers.

    Args:
        cuts: As for `build_wrappers`.
        options: Likewise.
    """

    def __init__(self, cuts: Cuts | None, options: WeightOptions) -> None:
        self._cuts = cuts
        self._options = options
        self._builders: dict[Kind, Callable[..., nn.Module]] = {
            "weighted": self._build_weighted,
            "embedding": self._build_embedding,
            "several inputs": self._build_several,
            "fake": self._build_fake,
            "float type": self._build_float_type,
            "identity": self._build_identity,
        }

    def build(self, name: str, layer: Planned) -> nn.Module:
        """The module in the place of a layer."""
        cuts = self._cuts
        if cuts is not None and name in cuts.fused:
            return FusedActivation(layer.module)
        is_before_relu = cuts is not None and name in cuts.before_relu
        layer = layer._replace(settings=replace(layer.settings, clip_half_range=is_before_relu))
        statistics = None if cuts is None else cuts.statistics.get(name)
        return self._builders[layer.choice.kind](name, layer, statistics)

    def _build_weighted(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        return RangeLinearQuantParamLayerWrapper(
            layer.module, layer.settings, statistics, name=name, **self._options._asdict()
        )

    def _build_embedding(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        save_fp_weights = self._options.save_fp_weights
        return RangeLinearEmbeddingWrapper(
            layer.module, layer.settings, save_fp_weights=save_fp_weights, name=name
        )

    def _build_several(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        kind = next(kind for kind in _SEVERAL_INPUTS if isinstance(layer.module, kind))
        bits_accum = self._options.bits_accum
        wrapper: nn.Module = _SEVERAL_INPUTS[kind](
            layer.module, layer.settings, statistics, bits_accum=bits_accum, name=name
        )
        return wrapper

    def _build_fake(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        return RangeLinearFakeQuantWrapper(layer.module, layer.settings, statistics, name=name)

    def _build_float_type(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        precision = layer.settings.fpq_module
        assert precision is not None  # noqa: S101  # so it was chosen
        return FPWrapper(layer.module, precision)

    def _build_identity(
        self, name: str, layer: Planned, statistics: LayerStatistics | None
    ) -> nn.Module:
        return nn.Identity()
