"""Queries on the record of `trace_forward`: which function read which tensor in one forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import inf, prod
from typing import NamedTuple

from qdq.forward import ForwardTrace, Operation
from qdq.functions import (
    ACTIVATIONS,
    ADDITIONS,
    AVERAGES,
    CASTS,
    CONCATS,
    CONTRACTIONS,
    CONVOLUTIONS,
    COPIES,
    FUNCTIONS,
    IDENTITIES,
    MATRIX_PRODUCTS,
    MAX_POOLINGS,
    RESIZES,
    SCALINGS,
    SOFTMAX,
    STREAM,
)

_FUSED = ACTIVATIONS | SCALINGS
_END_OF_OUTPUT = AVERAGES | (CONTRACTIONS - CONVOLUTIONS)
_COPYING_MODES = ("nearest", "nearest-exact")


class Fork(NamedTuple):
    """The tensor at which the paths to two other tensors split.

    Args:
        value: Number of the tensor.
        to_first: Number of functions between it and the first tensor.
        to_second: Number of functions between it and the second tensor.
    """

    value: int
    to_first: int
    to_second: int


def clamp_of(operation: Operation) -> tuple[float, float] | None:
    """Lower and upper bound of a function that clamps to constants.

    Args:
        operation: A call of any function.

    Returns:
        The bounds, which may be infinite; None for a function that does not clamp, or whose bounds are tensors.
    """
    function = FUNCTIONS.get(operation.function)
    if function is None or function.clamp is None:
        return None
    clamp = function.clamp
    if not clamp.parameters:
        return clamp.low, clamp.high
    if len(operation.inputs) != 1:  # a bound may be a tensor
        return None
    low_parameter, high_parameter = clamp.parameters
    low = _bound_of(operation, low_parameter, 1, clamp.low)
    high = _bound_of(operation, high_parameter, 2, clamp.high)
    return low, high


def _bound_of(operation: Operation, parameter: str, position: int, default: float) -> float:
    """One bound of a clamp, as passed to it.

    Args:
        operation: The call.
        parameter: Name of the parameter that holds the bound.
        position: Its position among the arguments.
        default: The bound if none was passed, or None.
    """
    by_position = operation.arguments.get(str(position), default)
    bound = operation.arguments.get(parameter, by_position)
    return default if bound is None else float(bound)


def _keeps_probabilities(operation: Operation) -> bool:
    """Whether a call leaves the values of its first input in 0 to 1: a copy, a cast, dropout, or a mask that writes 0.

    Args:
        operation: A call of any function.
    """
    if operation.function == "masked_fill":
        written = operation.arguments.get("value", operation.arguments.get("2"))
        return written == 0
    return operation.function in COPIES | CASTS


class Dataflow:
    """The functions of one forward and the tensors between them, which are identified by numbers.

    Args:
        trace: The record of `trace_forward`.
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
        """Whether a tensor depends on the input of the network; weights and other constants do not.

        Args:
            value: Number of the tensor.
        """
        return value in self._computed

    def is_stored(self, value: int) -> bool:
        """Whether a tensor exists before the forward, like a parameter, or is a view of such a tensor.

        Args:
            value: Number of the tensor.
        """
        producer = self._producers.get(value)
        while producer is not None and producer.function in COPIES:
            producer = self._producers.get(producer.inputs[0])
        return producer is None

    def producer_of(self, value: int) -> Operation | None:
        """The call that computed a tensor; None for an input and for what exists before the forward.

        Args:
            value: Number of the tensor.
        """
        return self._producers.get(value)

    def list_readers(self, value: int) -> list[Operation]:
        """The calls that read a tensor, once for each time that they do.

        Args:
            value: Number of the tensor.
        """
        return list(self._readers.get(value, ()))

    def is_copy(self, operation: Operation) -> bool:
        """Whether a call only moves or repeats values (R-COPY, R-RSZ).

        Args:
            operation: The call; a resize is a copy in the mode "nearest".
        """
        if operation.function not in RESIZES:
            return operation.function in COPIES
        by_position = operation.arguments.get("3", "nearest")
        return operation.arguments.get("mode", by_position) in _COPYING_MODES

    def first_convolution(self) -> Operation | None:
        """The convolution that runs first, None in a network without convolutions."""
        for operation in self.operations:
            if operation.function in CONVOLUTIONS:
                return operation
        return None

    def output_convolutions(self) -> list[Operation]:
        """Convolutions that write an output of the network: no pooling or product follows them (R-OUT).

        The search goes back from each output. It stops at convolutions, and at averages and products, because their
        input is not an output. It passes an expectation over a softmax, which decodes an output. A convolution of
        pooled pixels is a classifier and does not count, nor does one whose result reaches an output along a residual
        stream only: later products add to it.

        Returns:
            Each of them once, those nearest to the outputs first.
        """
        convolutions: list[Operation] = []
        visited = set(self.outputs)
        queue = deque(self.outputs)
        while queue:
            producer = self._producers.get(queue.popleft())
            if producer is None:
                continue
            softmax = self._find_distribution(producer)
            if softmax is not None:
                queue.append(softmax.inputs[0])
                continue
            if producer.function in _END_OF_OUTPUT:
                continue
            if producer.function in CONVOLUTIONS:
                if not self._reads_pooled(producer):  # a classifier may be a convolution of 1 pixel
                    convolutions.append(producer)
                continue
            for value in producer.inputs:
                if value not in visited and not self._feeds_product(value):
                    visited.add(value)
                    queue.append(value)
        return convolutions

    def expectations(self) -> list[Operation]:
        """Products that average the classes of a softmax: they have one constant for each class.

        So a detector decodes the side of a box from the probabilities of its lengths (the distribution focal loss of
        Li et al., NeurIPS 2020, arXiv 2006.04388). It is a convolution, a linear layer or a product with a vector.
        """
        return [
            operation
            for operation in self.operations
            if self._find_distribution(operation) is not None
        ]

    def _find_distribution(self, operation: Operation) -> Operation | None:
        """The softmax whose expectation a call computes; None for any other call."""
        if operation.function not in CONTRACTIONS or len(operation.inputs) < 2:
            return None
        probabilities, constants = operation.inputs[:2]
        producer = self._producers.get(probabilities)
        while producer is not None and producer.function in COPIES:
            producer = self._producers.get(producer.inputs[0])
        if producer is None or producer.function not in SOFTMAX or self.is_computed(constants):
            return None
        axis = producer.arguments.get("dim", producer.arguments.get("1"))
        if axis is None:
            return None
        num_classes = self.shapes[producer.inputs[0]][axis]
        is_vector = num_classes == prod(self.shapes[constants]) == max(self.shapes[constants])
        return producer if is_vector else None

    def _feeds_product(self, value: int) -> bool:
        """Whether a product reads a tensor, possibly through sums and normalisations; then it is not only an output.

        Args:
            value: Number of the tensor.
        """
        readers = self._readers_behind([value], STREAM)
        return any(reader.function in CONTRACTIONS for reader in readers)

    def _reads_pooled(self, operation: Operation) -> bool:
        """Whether the input of a call is a pooled map, directly or through activations, copies and offsets."""
        producer = self._producers.get(operation.inputs[0])
        while producer is not None and (
            producer.function in _FUSED | COPIES or self._subtracts_constant(producer)
        ):
            producer = self._producers.get(producer.inputs[0])
        return producer is not None and producer.function in AVERAGES

    def _subtracts_constant(self, operation: Operation) -> bool:
        """Whether a call subtracts what does not depend on the input of the network, as a centered layer does."""
        computed = [self.is_computed(value) for value in operation.inputs]
        return operation.function == "sub" and computed[0] and not any(computed[1:])

    def attention_products(self) -> list[Operation]:
        """The products of attention that is written out: one before a softmax, and one that reads the softmax."""
        products: list[Operation] = []
        for operation in self.operations:
            if operation.function not in SOFTMAX:
                continue
            before = self._products_before(operation)
            after = self._products_after(operation)
            if before and after:
                products += before + after
        return products

    def _products_before(self, operation: Operation) -> list[Operation]:
        """The products of matrices that a call comes from, with no other product between."""
        products: list[Operation] = []
        visited = set(operation.inputs)
        queue = deque(operation.inputs)
        while queue:
            producer = self._producers.get(queue.popleft())
            if producer is None:
                continue
            if producer.function in CONTRACTIONS:
                products.append(producer)
                continue
            fresh = [value for value in producer.inputs if value not in visited]
            visited.update(fresh)
            queue.extend(fresh)
        return [product for product in products if product.function in MATRIX_PRODUCTS]

    def _products_after(self, operation: Operation) -> list[Operation]:
        """The products of matrices that read the result of a call, with no other product between."""
        products: list[Operation] = []
        visited = set(operation.outputs)
        queue = deque(operation.outputs)
        while queue:
            for reader in self._readers.get(queue.popleft(), ()):
                if reader.function in CONTRACTIONS:
                    products.append(reader)
                    continue
                fresh = [value for value in reader.outputs if value not in visited]
                visited.update(fresh)
                queue.extend(fresh)
        return [product for product in products if product.function in MATRIX_PRODUCTS]

    def comes_from_softmax(self, value: int) -> bool:
        """Whether a tensor is the output of a softmax, after copies, casts, dropout and masks: it is at most 1.

        Args:
            value: Number of the tensor.
        """
        producer = self._producers.get(value)
        while producer is not None and _keeps_probabilities(producer):
            producer = self._producers.get(producer.inputs[0])
        return producer is not None and producer.function in SOFTMAX

    def backbone_of(self, value: int, *, through_activations: bool = False) -> Operation | None:
        """The convolution that a tensor comes from in a straight line: bias, BatchNorm and scaling fuse into it.

        Args:
            value: Number of the tensor.
            through_activations: Also look through activations, which do not fuse with the function after them
                (R-ADD-5).

        Returns:
            The call of the convolution; None if another function or a second computed tensor comes first.
        """
        passing = _FUSED if through_activations else SCALINGS
        while (operation := self._producers.get(value)) is not None:
            if operation.function in CONVOLUTIONS:
                return operation
            sources = [source for source in operation.inputs if source in self._computed]
            if operation.function not in passing or len(sources) != 1:
                return None
            value = sources[0]
        return None

    def passing_interval(self, value: int) -> tuple[float, float]:
        """The interval of values that matter: those that the only reader passes on, if it is a ReLU or a clamp.

        Args:
            value: Number of the tensor.

        Returns:
            The bounds; infinite ones if other values matter, too.
        """
        readers = self._readers.get(value, [])
        if len(readers) != 1 or value in self.outputs:
            return -inf, inf
        return clamp_of(readers[0]) or (-inf, inf)

    def normalization_behind(self, value: int) -> Operation | None:
        """The LayerNorm that divides each row of a tensor by its deviation, directly or after sums with other rows.

        Args:
            value: Number of the tensor.

        Returns:
            The first one; None if a function of another kind reads the tensor or such a sum, or if it is an output.
        """
        passing = ADDITIONS | IDENTITIES
        normalizations: list[Operation] = []
        for reader in self._readers_behind([value], passing):
            if reader.function == "layer_norm":
                normalizations.append(reader)
            elif reader.function not in passing:
                return None
        if not normalizations or value in self.outputs:
            return None
        first = normalizations[0]
        is_same_shape = self.shapes[first.inputs[0]] == self.shapes[value]
        return first if is_same_shape else None

    def readers_behind(self, values: Iterable[int]) -> Iterator[Operation]:
        """Functions that read some tensors, directly or through activations, BatchNorm, copies, pooling and concats.

        Args:
            values: Numbers of the tensors.

        Yields:
            Each call that reads one of the tensors or one that comes from them, once for each such input.
        """
        return self._readers_behind(values, _FUSED | COPIES | MAX_POOLINGS | CONCATS)

    def _readers_behind(
        self, values: Iterable[int], passing: frozenset[str]
    ) -> Iterator[Operation]:
        """Functions that read some tensors, directly or through certain functions only.

        Args:
            values: Numbers of the tensors.
            passing: Names of the functions that may lie between.
        """
        queue = deque(values)
        visited = set(queue)
        while queue:
            for reader in self._readers.get(queue.popleft(), ()):
                yield reader
                if reader.function not in passing:
                    continue
                fresh = [result for result in reader.outputs if result not in visited]
                visited.update(fresh)
                queue.extend(fresh)

    def find_fork(self, first: int, second: int) -> Fork | None:
        """The nearest tensor that two tensors both come from.

        The nearest has the fewest functions on both paths together; of equally near tensors, the earliest counts. The
        search goes back from both tensors in turn, one function at a time.

        Args:
            first: Number of a tensor.
            second: Number of another tensor, or the same.

        Returns:
            The fork; None if the tensors have no common origin that depends on the input.
        """
        if first == second:
            return Fork(first, 0, 0)
        distances: tuple[dict[int, int], dict[int, int]] = ({first: 0}, {second: 0})
        edges = [[first], [second]]
        radius = 0
        shortest: float = inf
        nearest: Fork | None = None
        # A tensor that is not reached yet is farther than the radius from one of the two.
        while radius < shortest and any(edges):
            radius += 1
            for side in (0, 1):
                edges[side] = self._step_back(edges[side], distances[side])
                for value in edges[side]:
                    if value not in distances[1 - side]:
                        continue
                    fork = Fork(value, distances[0][value], distances[1][value])
                    if nearest is None or _rank(fork) < _rank(nearest):
                        nearest = fork
                        shortest = fork.to_first + fork.to_second
        return nearest

    def _step_back(self, edge: list[int], distances: dict[int, int]) -> list[int]:
        """The tensors from which the tensors of an edge come, without those that have a distance already.

        Args:
            edge: Numbers of tensors that are equally far from a tensor.
            distances: Tensor -> its distance; the tensors of the next edge are added.
        """
        next_edge: list[int] = []
        for value in edge:
            producer = self._producers.get(value)
            if producer is None:
                continue
            for source in producer.inputs:
                if source in self._computed and source not in distances:
                    distances[source] = distances[value] + 1
                    next_edge.append(source)
        return next_edge


def _rank(fork: Fork) -> tuple[int, int]:
    """The order of forks: the total length of both paths, then the age of the tensor."""
    return fork.to_first + fork.to_second, fork.value
