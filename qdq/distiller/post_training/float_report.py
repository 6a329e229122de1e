"""What stays float in a quantized model, and which settings have no effect."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from qdq.dataflow import Dataflow
from qdq.distiller.layers.swap_layers import Planned
from qdq.distiller.post_training.fusion import Cuts
from qdq.forward import ForwardTrace
from qdq.functions import ACTIVATIONS, COPIES, MAX_POOLINGS
from qdq.systems.unquantized import Unquantized, UnquantizedReport
from qdq.text import list_names

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 5
_KEEPING = ACTIVATIONS | COPIES | MAX_POOLINGS  # functions that compute no new sums


def list_float(planned: Mapping[str, Planned], trace: ForwardTrace) -> UnquantizedReport:
    """The layers with a reason to stay float, and the calls that compute outside of layers.

    Args:
        planned: The layers by name.
        trace: One forward.
    """
    entries = []
    for name, layer in planned.items():
        if layer.choice.reason:
            kind = type(layer.module).__name__
            entries.append(Unquantized(name, kind, layer.choice.reason))
    flow = Dataflow(trace)
    inside = tuple(f"{name}." for name in planned)
    for operation in trace.operations:
        is_call = f"{operation.module}." not in inside and not operation.module.startswith(inside)
        is_computed = any(map(flow.is_computed, operation.inputs))
        if is_call and is_computed and operation.function not in _KEEPING:
            entries.append(Unquantized(operation.name, operation.function, "a function call"))
    return UnquantizedReport(tuple(entries), "")


def warn_of_effects(
    left_float: UnquantizedReport, planned: Mapping[str, Planned], cuts: Cuts | None
) -> None:
    """Log what stays float, and settings without an effect.

    Args:
        left_float: What stays float.
        planned: The layers by name.
        cuts: What a ReLU does to ranges; None: dynamic.
    """
    if left_float.entries:
        for line in left_float.format_table().splitlines():  # the log has one line a record
            logger.warning("%s", line)
    if cuts is None:
        return
    unfounded = []
    for name, layer in planned.items():
        if layer.settings.clip_half_range and name not in cuts.before_relu:
            unfounded.append(name)
    if unfounded:
        names = list_names(unfounded, _SHOWN_NAMES)
        logger.warning("clip_half_range has no effect without a ReLU behind the layer: %s", names)
