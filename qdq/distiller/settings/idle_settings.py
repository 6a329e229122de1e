"""Settings of overrides that have no effect on any of the layers that the override applies to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qdq.distiller.settings.overrides import Overrides
from qdq.schema import describe

logger = logging.getLogger(__name__)


def warn_of_idle_settings(
    overrides: Overrides | None,
    origins: Mapping[str, str],
    layers: Mapping[str, nn.Module],
    explain: Callable[[str, Any, nn.Module], str],
) -> None:
    """Log the settings that have no effect on any layer of their override.

    Args:
        overrides: The overrides.
        origins: Name of a layer -> the override that applies to it.
        layers: Name -> what became of a layer; one that is left out is reported elsewhere.
        explain: Key, value and layer -> why the setting has no effect on it; "" if it has one.
    """
    for pattern, values in (overrides or {}).items():
        names = [name for name, origin in origins.items() if origin == pattern and name in layers]
        for key, value in values.items():
            reasons = [explain(key, value, layers[name]) for name in names]
            if reasons and all(reasons):
                text = "override %s: %s has no effect: %s"
                logger.warning(text, describe(pattern), key, reasons[0])
