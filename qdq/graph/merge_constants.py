"""Equal initializers stored once."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from qdq.graph.pairs import Parameters, is_op, parameters_of

_LARGE = 1024  # elements
_PAIR = ("QuantizeLinear", "DequantizeLinear")


class MergeConstants(ir.passes.InPlacePass):
    """Initializers of the same type, shape and bytes become one.

    `onnx_ir.passes.common.DeduplicateInitializersPass` keeps whichever name comes first. Here a parameter keeps its
    dotted name: nameless constants go into it, and two parameters become one only if they are large (tied weights).
    Scales and zero points say whose they are by name, and stay apart. So do equal codes with other scales: they are
    other weights, which differ by a factor for each channel.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the initializers of the main graph."""
        graph = model.graph
        kept: dict[tuple[object, ...], ir.Value] = {}
        modified = False
        # parameters first, so that a constant finds the parameter it equals
        for value in sorted(graph.initializers.values(), key=lambda v: "." not in str(v.name)):
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or _must_stay(value):
                continue
            digest = hashlib.sha256(tensor.tobytes()).digest()
            keeper = kept.setdefault(
                (tensor.dtype, tuple(tensor.shape), digest, _scales_of(value)), value
            )
            if keeper is value or ("." in str(value.name) and tensor.size <= _LARGE):
                continue
            value.replace_all_uses_with(keeper)
            del graph.initializers[str(value.name)]
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _scales_of(value: ir.Value) -> frozenset[Parameters | None]:
    """What turns codes into numbers: the parameters of each DQ that reads them."""
    return frozenset(
        parameters_of(user)
        for user, position in value.uses()
        if not position and is_op(user, *_PAIR)
    )


def _must_stay(value: ir.Value) -> bool:
    if value.is_graph_input() or value.is_graph_output():
        return True
    return any(position and is_op(user, *_PAIR) for user, position in value.uses())
