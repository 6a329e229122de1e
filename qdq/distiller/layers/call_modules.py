"""The module that does what a function call does."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules import activation

from qdq.distiller.layers.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from qdq.functions import ACTIVATIONS, ADDITIONS, FUNCTIONS, MULTIPLICATIONS

_ACTIVATION_CLASSES = {name.lower(): getattr(activation, name) for name in activation.__all__}


class ModuleCall(NamedTuple):
    """A module, and the nodes that are its inputs."""

    module: nn.Module
    inputs: tuple[fx.Node, ...]


def find_module(function: str, node: fx.Node) -> ModuleCall | None:
    """The module that does what a call does; None if there is none.

    Args:
        function: Name of the function, as in `qdq.functions`.
        node: The call.
    """
    known = FUNCTIONS.get(function)
    if known is None:
        return None
    if known.onnx == ("Concat",):
        return _find_concat(node)
    if function in ACTIVATIONS:
        return _find_activation(function, node)
    if function in ADDITIONS:
        return _find_binary(EltwiseAdd(), node)
    if function in MULTIPLICATIONS:
        return _find_binary(EltwiseMult(), node)
    is_product = known.kind == "matrix product" and known.factors == (0, 1)
    if is_product and "MatMul" in known.onnx:
        return _find_binary(BatchMatmul() if function == "bmm" else Matmul(), node)
    return None


def _find_binary(module: nn.Module, node: fx.Node) -> ModuleCall | None:
    """A call with two tensors and nothing else."""
    tensors = tuple(operand for operand in node.args if isinstance(operand, fx.Node))
    if node.kwargs or len(node.args) != 2 or len(tensors) != 2:
        return None
    return ModuleCall(module, tensors)


def _find_concat(node: fx.Node) -> ModuleCall | None:
    """A concatenation of tensors that are listed."""
    arguments = _name_arguments(node, ("tensors", "dim"))
    tensors = arguments.get("tensors")
    dim = arguments.get("dim", arguments.get("axis", 0))
    if not isinstance(tensors, list | tuple) or not isinstance(dim, int):
        return None
    inputs = tuple(tensor for tensor in tensors if isinstance(tensor, fx.Node))
    if len(inputs) != len(tensors):
        return None
    return ModuleCall(Concat(dim), inputs)


def _find_activation(function: str, node: fx.Node) -> ModuleCall | None:
    """An activation of one tensor and constants, which the class of torch takes, too."""
    kind = _ACTIVATION_CLASSES.get(function.replace("_", ""))
    if kind is None:
        return None
    arguments = _name_arguments(node, ("input", *inspect.signature(kind).parameters))
    values = arguments.pop("input", None)
    if not isinstance(values, fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if not arguments.keys() <= inspect.signature(kind).parameters.keys():
        return None
    arguments.pop("inplace", None)
    return ModuleCall(kind(**arguments), (values,))


def _name_arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name, positional ones in the order of the names."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
