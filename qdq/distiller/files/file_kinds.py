"""The YAML files of Distiller, told apart by their content: users pass one where another is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATISTICS_FILE = "acts_quantization_stats.yaml"
PREPARED_STATISTICS_FILE = "quant_stats_after_prepare_model.yaml"
PARAMETERS_FILE = "layer_quant_params.yaml"

SECTIONS = ("version", "quantizers", "policies", "lr_schedulers")
"""The sections of a configuration."""

PARAMETERS_KEY = "linear_quant_params"


def describe_kind(content: Any) -> str:
    """What a file holds, and where it belongs; "" if it is none of these files.

    Args:
        content: Its content, as `qdq.schema.read_yaml` returns it.
    """
    if not isinstance(content, Mapping) or not content:
        return ""
    if any(section in content for section in SECTIONS[1:]):
        return "a configuration, which belongs to --qe-config-file or --compress"
    if _is_settings(content):
        return f"the settings of layers, such as {PARAMETERS_FILE}, which nothing reads"
    if any(_has(entry, "output") for entry in content.values()):
        return "statistics, which belong to --qe-stats-file or model_activation_stats"
    return ""


def _is_settings(content: Mapping[str, Any]) -> bool:
    if PARAMETERS_KEY in content:
        return True
    return any(_has(entry, "bits_activations") for entry in content.values())


def _has(entry: Any, key: str) -> bool:
    return isinstance(entry, Mapping) and key in entry
