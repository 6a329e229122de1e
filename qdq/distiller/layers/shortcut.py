"""Which inputs of an addition TensorRT rounds: all but one that comes straight from a convolution (R-ADD-1)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.systems.wrapper import SystemWrapper

if TYPE_CHECKING:
    from qdq.distiller.layers.multi_input import RangeLinearQuantEltwiseAddWrapper


def find_shortcuts(addition: RangeLinearQuantEltwiseAddWrapper) -> list[int]:
    """Positions of the inputs that are rounded before an addition.

    The kernel of a convolution adds the other inputs to its sums before they are rounded. If several inputs come from
    convolutions, this is the one that is farther from where their paths split (R-ADD-2). No input is rounded before the
    addition of a constant.

    Args:
        addition: An addition that has run.
    """
    if addition.constant_inputs:
        return []
    sources = addition.sources
    straight = [index for index, source in sources.items() if _is_fusing(source)]
    if not straight:
        return sorted(sources)
    fused = straight[0]
    for index in straight[1:]:
        if _is_longer(sources[index], sources[fused]):
            fused = index
    return [index for index in sorted(sources) if index != fused]


def _is_fusing(source: SystemWrapper | None) -> bool:
    """Whether an output is that of a convolution or linear layer in int8, without an activation."""
    if not isinstance(source, QuantWeightWrapper):
        return False
    return not source.float_reason() and not source.settings.clip_half_range


def _is_longer(first: SystemWrapper | None, second: SystemWrapper | None) -> bool:
    """Whether the first of two wrappers is farther from the nearest one that both come from."""
    to_first = _measure_distances(first)
    to_second = _measure_distances(second)
    common = to_first.keys() & to_second.keys()
    if not common:
        return False
    fork = min(common, key=lambda wrapper: to_first[wrapper] + to_second[wrapper])
    return to_first[fork] > to_second[fork]


def _measure_distances(wrapper: SystemWrapper | None) -> dict[SystemWrapper | None, int]:
    """Wrapper that another one comes from -> number of wrappers between; None stands for what came unrounded."""
    distances: dict[SystemWrapper | None, int] = {wrapper: 0}
    queue = deque([wrapper])
    while queue:
        current = queue.popleft()
        if current is None:
            continue
        for source in current.sources.values():
            if source not in distances:
                distances[source] = distances[current] + 1
                queue.append(source)
    return distances
