"""Store equal initializers once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import onnx_ir as ir

from qdq.graph.pairs import QDQ_OPS, Parameters, is_op, parameters_of

_LARGE = 1024  # elements; equal parameters above this size are tied weights, smaller ones may be equal by chance


class MergeConstants(ir.passes.InPlacePass):
    """Merge initializers of the same type, shape and bytes.

    `onnx_ir.passes.common.DeduplicateInitializersPass` keeps whichever name comes first. Here a parameter keeps its
    dotted name: nameless constants are merged into it, and two parameters become one only if they are large (tied
    weights). Scales and zero points stay separate, because their names say which quantizer they belong to. Equal codes
    with different scales stay separate too: they are different weights.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the initializers of the main graph."""
        graph = model.graph
        first_values: dict[Hashable, ir.Value] = {}
        modified = False
        # Parameters first, so that a constant meets the parameter that it equals.
        for value in sorted(graph.initializers.values(), key=_is_nameless):
            identity = _identity_of(value)
            if identity is None:
                continue

            first_value = first_values.setdefault(identity, value)
            if first_value is value or _is_small_parameter(value):
                continue

            value.replace_all_uses_with(first_value)
            del graph.initializers[str(value.name)]
            modified = True

        return ir.passes.PassResult(model, modified=modified)


def _is_nameless(value: ir.Value) -> bool:
    """Whether a constant lacks the dotted name that the parameters of a module have."""
    return "." not in str(value.name)


def _is_small_parameter(value: ir.Value) -> bool:
    """Whether a parameter is too small to be taken for a tied weight.

    Small parameters, such as biases, are often equal by chance, for example all zeros.
    """
    tensor = value.const_value
    return tensor is not None and tensor.size <= _LARGE and not _is_nameless(value)


def _identity_of(value: ir.Value) -> Hashable | None:
    """Everything that must be equal for two initializers to be merged.

    It has a digest instead of the bytes, so that large weights need not stay in memory.

    Returns:
        None for an initializer that does not change.
    """
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    if _must_stay(value):
        return None

    digest = hashlib.sha256(tensor.tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape), digest, _parameters_of_readers(value)


def _parameters_of_readers(value: ir.Value) -> frozenset[Parameters | None]:
    """The parameters of each Q or DQ that reads a value as data.

    They turn codes into numbers, so equal codes with different parameters are different weights.

    Args:
        value: The initializer.
    """
    parameters = set()
    for user, position in value.uses():
        if position == 0 and is_op(user, *QDQ_OPS):
            parameters.add(parameters_of(user))

    return frozenset(parameters)


def _must_stay(value: ir.Value) -> bool:
    """Whether an initializer must keep its name.

    It must if it belongs to the signature of the graph, or if it is the scale or zero point of a Q or DQ, whose name
    says which quantizer it belongs to.

    Args:
        value: The initializer.
    """
    if value.is_graph_input() or value.is_graph_output():
        return True

    return any(position > 0 and is_op(user, *QDQ_OPS) for user, position in value.uses())
