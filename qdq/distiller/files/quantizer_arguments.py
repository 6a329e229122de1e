"""The arguments of a `PostTrainLinearQuantizer` as plain values, from which files build it again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from qdq.distiller.files.plain import to_plain
from qdq.distiller.files.quantizer_classes import list_keys
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.statistics.records import ModelStatistics


def describe_arguments(
    quantizer: PostTrainLinearQuantizer, statistics: ModelStatistics | Path | None
) -> dict[str, Any]:
    """All arguments that are still to be seen in a quantizer.

    Args:
        quantizer: The quantizer; a search may have changed its settings.
        statistics: The statistics of the float model, or their file; `prepare_model` replaces those of the quantizer.
    """
    values = {
        **vars(quantizer.defaults),
        **quantizer.weight_options._asdict(),
        "bits_parameters": quantizer.defaults.bits_weights,
        "model_activation_stats": statistics,
    }
    arguments = {}
    for key in list_keys(PostTrainLinearQuantizer):
        if key in values:
            arguments[key] = to_plain(values[key], key)
    overrides: OrderedDict[str, Any] = OrderedDict()
    for name, settings in (quantizer.overrides or {}).items():
        overrides[name] = to_plain(dict(settings), f"overrides.{name}")
    arguments["overrides"] = overrides
    return arguments
