"""Models in which some layers are quantized and the others are still float, as a greedy search tries them."""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qdq.distiller.layers.swap_layers import FusedActivation
from qdq.distiller.post_training.fusion import list_outputs
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.settings.names import plain_names
from qdq.distiller.settings.overrides import Overrides
from qdq.distiller.statistics.records import ModelStatistics
from qdq.errors import StateError
from qdq.fold import fold_batchnorm
from qdq.forward import trace_forward

Settings = Mapping[str, Any]
"""An override: key -> value."""

FLOAT: Settings = {"bits_activations": None, "bits_weights": None}
"""The override of a layer that stays float."""


class Trials:
    """Makes quantized copies of a float model.

    Args:
        quantizer: A quantizer whose model is still float; it stays as it is.
        dummy_input: One batch for its `prepare_model`.

    Attributes:
        layers: The layers that the quantizer quantizes, in the order in which they run: name -> float module.
        batchnorms: Layer -> the BatchNorm behind it that is folded into it.

    Raises:
        StateError: It quantizes no layer, or its model is quantized already.
    """

    def __init__(self, quantizer: PostTrainLinearQuantizer, dummy_input: Any) -> None:
        self._quantizer = quantizer
        self._dummy_input = dummy_input
        complete = copy.deepcopy(quantizer)
        with _without_warnings():
            complete.prepare_model(dummy_input)
        if not complete.layers:
            raise StateError("the quantizer quantizes no layer.", "give bits and statistics.")

        modules = plain_names(quantizer.model)
        folded = copy.deepcopy(quantizer.model)
        pairs = fold_batchnorm(folded, dummy_input)
        self.batchnorms = {pair.layer: pair.batchnorm for pair in pairs if pair.folded}
        trace = trace_forward(folded, dummy_input)
        order = dict.fromkeys(run.module for run in trace.runs)
        self.layers = {name: modules[name] for name in order if name in complete.layers}

        quantized = plain_names(complete.model)
        makers = {}
        for name, tensors in list_outputs(trace, self.layers).items():
            makers.update(dict.fromkeys(tensors, name))
        self._fused_into: dict[str, str] = {}
        for operation in trace.operations:
            if isinstance(quantized.get(operation.module), FusedActivation):
                self._fused_into[operation.module] = makers[operation.inputs[0]]

    def prepare(
        self, decided: Mapping[str, Settings], statistics: ModelStatistics
    ) -> PostTrainLinearQuantizer:
        """A quantizer that has quantized a copy of the model.

        Args:
            decided: Layer -> what its override adds to that of the user. All other layers are float.
            statistics: Those of the float model.
        """
        overrides = self.make_overrides(decided)
        for name in self.layers:
            overrides.setdefault(name, FLOAT)
        for activation, layer in self._fused_into.items():
            if layer not in decided:
                overrides[activation] = FLOAT
        trial = copy.deepcopy(self._quantizer)
        trial.overrides = overrides
        trial.model_activation_stats = statistics
        with _without_warnings():
            trial.prepare_model(self._dummy_input)
        return trial

    def make_overrides(self, decided: Mapping[str, Settings]) -> Overrides:
        """The overrides of the user with those of decided layers, one entry for each layer.

        Args:
            decided: As for `prepare`.
        """
        overrides: Overrides = OrderedDict()
        for name, module in plain_names(self._quantizer.model).items():
            settings = _find_override(self._quantizer.overrides, name)
            if name in decided:
                overrides[name] = {**settings, **decided[name]}
            elif settings and name not in self.layers and _is_leaf(module):
                overrides[name] = settings
        return overrides


def _find_override(overrides: Overrides | None, name: str) -> Settings:
    """The override of the user for a layer: that of its name, or of the first pattern that matches it."""
    if not overrides:
        return {}
    if name in overrides:
        return overrides[name]
    for pattern, settings in overrides.items():
        if re.fullmatch(pattern, name):
            return settings
    return {}


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Switch off the warnings of the flow in the block, which each trial would repeat."""
    logger = logging.getLogger("qdq.distiller")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
