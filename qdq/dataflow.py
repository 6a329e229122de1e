"""Which function read which tensor in one forward: what `trace` recorded, with questions answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf

from qdq.forward import ForwardTrace, Operation
from qdq.functions import (
    ACTIVATIONS,
    AVERAGES,
    CONCATS,
    CONTRACTIONS,
    CONVOLUTIONS,
    COPIES,
    MAX_POOLINGS,
    SCALINGS,
)

_FUSED = ACTIVATIONS | SCALINGS


def clamp_of(operation: Operation) -> tuple[float, float] | None:
    """Lower and upper bound of a function that clamps to constants; None for any other."""
    if operation.function in ("relu", "relu6"):
        return 0.0, 6.0 if operation.function == "relu6" else inf
    names = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max")}.get(operation.function)
    if names is None or len(operation.inputs) != 1:  # a bound may be a tensor
        return None
    defaults = (-1.0, 1.0) if operation.function == "hardtanh" else (None, None)
    given = operation.arguments
    low, high = (
        given.get(n, given.get(str(i), d))
        for i, (n, d) in enumerate(zip(names, defaults, strict=True), 1)
    )
    return -inf if low is None else float(low), inf if high is None else float(high)


class Dataflow:
    """The functions of one forward and the tensors between them, known by number.

    Args:
        trace: What `trace_forward` recorded.
    """

    def __init__(self, trace: ForwardTrace) -> None:
        self.operations = trace.operations
        self.runs = trace.runs
        self.inputs = frozenset(trace.inputs)
        self.outputs = trace.outputs
        self.shapes = trace.shapes
        self._producers: dict[int, Operation] = {}
        self._readers: dict[int, list[Operation]] = {}
        self._computed = set(trace.inputs)
        for operation in trace.operations:
            for value in operation.inputs:
                self._readers.setdefault(value, []).append(operation)
            for value in operation.outputs:
                self._producers[value] = operation
            if not self._computed.isdisjoint(operation.inputs):
                self._computed.update(operation.outputs)

    def is_computed(self, value: int) -> bool:
        """Whether a tensor depends on the input of the network; weights and other constants do not."""
        return value in self._computed

    def is_stored(self, value: int) -> bool:
        """Whether a tensor is there before the forward, or a view of one that is: a parameter, not made from some."""
        while (producer := self._producers.get(value)) is not None and producer.function in COPIES:
            value = producer.inputs[0]
        return producer is None

    def is_copy(self, operation: Operation) -> bool:
        """Whether a function only moves or repeats values."""
        if operation.function == "interpolate":
            return operation.arguments.get("mode", operation.arguments.get("3", "nearest")) in (
                "nearest",
                "nearest-exact",
            )
        return operation.function in COPIES

    def backbone_of(self, value: int, *, through_activations: bool = False) -> Operation | None:
        """The convolution that a tensor comes from in a straight line: bias, BatchNorm and scaling fuse into it.

        Args:
            value: The tensor.
            through_activations: Also behind activations, which do not fuse with what follows them (R-ADD-5).
        """
        while (operation := self._producers.get(value)) is not None:
            if operation.function in CONVOLUTIONS:
                return operation
            passes = operation.function in SCALINGS or (
                through_activations and operation.function in ACTIVATIONS
            )
            computed = [other for other in operation.inputs if other in self._computed]
            if not passes or len(computed) != 1:
                return None
            (value,) = computed
        return None

    def passing_interval(self, value: int) -> tuple[float, float]:
        """Between which values a tensor matters: what the ReLU or clamp passes on that alone reads it."""
        readers = self._readers.get(value, [])
        if len(readers) != 1 or value in self.outputs:
            return -inf, inf
        return clamp_of(readers[0]) or (-inf, inf)

    def find_fork(self, first: int, second: int) -> tuple[int, int, int] | None:
        """The nearest tensor that two others come from, and how many functions lie between it and each of them."""
        distances: tuple[dict[int, int], dict[int, int]] = ({first: 0}, {second: 0})
        edges = [[first], [second]]
        best = (0, first) if first == second else (inf, 0)
        radius = 0
        while radius < best[0] and any(
            edges
        ):  # what is not seen yet is farther than the radius from one of them
            radius += 1
            for side, own in enumerate(distances):
                edges[side] = self._step_back(edges[side], own)
                common = [value for value in edges[side] if value in distances[1 - side]]
                best = min(
                    [
                        best,
                        *((distances[0][value] + distances[1][value], value) for value in common),
                    ]
                )
        fork = best[1]
        return (fork, distances[0][fork], distances[1][fork]) if best[0] < inf else None

    def output_convolutions(self) -> list[Operation]:
        """Convolutions that write an output of the network: nothing pools or multiplies behind them (R-OUT)."""
        found: list[Operation] = []
        seen, queue = set(self.outputs), deque(self.outputs)
        while queue:
            producer = self._producers.get(queue.popleft())
            if producer is None or producer.function in AVERAGES | (CONTRACTIONS - CONVOLUTIONS):
                continue
            if producer.function in CONVOLUTIONS:
                if not self._reads_pooled(
                    producer
                ):  # a classifier may be a convolution of one pixel
                    found.append(producer)
                continue
            fresh = [
                value
                for value in producer.inputs
                if value not in seen and not self._feeds_product(value)
            ]
            seen.update(fresh)
            queue.extend(fresh)
        return found

    def _feeds_product(self, value: int) -> bool:
        """Whether a convolution or product reads a tensor, perhaps behind activations: then it is no mere output."""
        passing = _FUSED | MAX_POOLINGS | CONCATS
        readers = (
            op for here in self._values_behind(value, passing) for op in self._readers.get(here, ())
        )
        return any(operation.function in CONTRACTIONS for operation in readers)

    def _reads_pooled(self, operation: Operation) -> bool:
        """Whether the input of a function is a pooled map, perhaps behind activations and copies."""
        producer = self._producers.get(operation.inputs[0])
        while producer is not None and producer.function in _FUSED | COPIES:
            producer = self._producers.get(producer.inputs[0])
        return producer is not None and producer.function in AVERAGES

    def _step_back(self, edge: list[int], distances: dict[int, int]) -> list[int]:
        """Unseen tensors that those of an edge were computed from; they have a distance now."""
        further: list[int] = []
        for value in edge:
            producer = self._producers.get(value)
            for source in producer.inputs if producer else ():
                if source in self._computed and source not in distances:
                    distances[source] = distances[value] + 1
                    further.append(source)
        return further

    def readers_behind(self, value: int) -> Iterator[Operation]:
        """Functions on a tensor, as it is or behind activations, BatchNorm, copies, pooling and concats."""
        for here in self._values_behind(value, _FUSED | COPIES | MAX_POOLINGS | CONCATS):
            yield from self._readers.get(here, ())

    def _values_behind(self, value: int, passing: frozenset[str]) -> Iterator[int]:
        """A tensor and those that come from it through functions of some names only."""
        seen, queue = {value}, deque([value])
        while queue:
            here = queue.popleft()
            yield here
            for operation in self._readers.get(here, ()):
                fresh = [
                    result
                    for result in operation.outputs
                    if operation.function in passing and result not in seen
                ]
                seen.update(fresh)
                queue.extend(fresh)
