"""`modularize`: function calls of a network become modules, so that each has a name, statistics and a quantizer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import fx, nn

from qdq.batch import floats_of, split_inputs
from qdq.device import find_device, move_batch
from qdq.distiller.layers import modules
from qdq.distiller.layers.call_modules import find_module
from qdq.distiller.layers.lstm import DistillerLSTM
from qdq.distiller.layers.lstm_cell import DistillerLSTMCell
from qdq.distiller.settings.names import is_layer
from qdq.errors import UnsupportedError
from qdq.forward import call_model, evaluating, join_name, name_function, require_model

_RECURRENT = (DistillerLSTM, DistillerLSTMCell)  # they consist of modules, and loop over time steps
_TOLERANCE = 1e-5  # of the largest output: the same functions run, in float32


class _Tracer(fx.Tracer):
    """Sees layers as modules, also those that are no classes of torch."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        is_known = type(module).__module__ == modules.__name__ or isinstance(module, _RECURRENT)
        if is_known or super().is_leaf_module(module, qualified_name):
            return True
        has_weight = "weight" in module._parameters
        return has_weight and is_layer(module)


def modularize(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Make modules of function calls: additions, multiplications, concatenations, matrix products and activations.

    A call in the forward of `layer1.0` becomes the module `layer1.0.add`, the next one `layer1.0.add_1`. A module
    without parameters that runs several times gets a copy for each run, such as `layer1.0.relu_1`. All others keep
    their names, so the parameters do. Modules that do not run in evaluation are left out.

    Args:
        model: A network that torch.fx can trace.
        example_inputs: A batch, as the model is called with, on which both are compared.

    Returns:
        A network of the same layers, which it shares with the model. What depends on training is as in evaluation.

    Raises:
        UnsupportedError: torch.fx cannot trace the model, or what it traces has other outputs.
    """
    require_model(model)
    with evaluating(model):
        traced = fx.GraphModule(model, _trace(model), type(model).__name__)
        namer = _Namer(traced)
        floats = _find_floats(traced, example_inputs)
        for node in list(traced.graph.nodes):
            is_call = node.op in ("call_function", "call_method")
            if is_call and floats.issuperset({node, *node.all_input_nodes}):
                floats.add(_replace_call(node, traced, namer))
        _separate_runs(traced, namer)
        traced.recompile()
        _require_equal(model, traced.eval(), example_inputs)
    for module in set(traced.modules()).difference(model.modules()):
        module.training = model.training
    return traced


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the code of the user, which can raise anything
        raise UnsupportedError(
            f"torch.fx cannot trace the model: {error}",
            "put the modules of qdq.distiller into its forward: EltwiseAdd, EltwiseMult, Concat, Matmul, ...",
        ) from error


class _FloatFinder(fx.Interpreter):
    """Runs a network and notes which nodes give float tensors; others give sizes, flags or tuples."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.floats: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.floats.add(n)
        return result


def _find_floats(traced: fx.GraphModule, example_inputs: Any) -> set[fx.Node]:
    """The nodes that give float tensors on a batch."""
    args, kwargs = split_inputs(move_batch(example_inputs, find_device(traced)))
    inputs = inspect.signature(traced.forward).bind(*args, **kwargs)
    inputs.apply_defaults()
    finder = _FloatFinder(traced)
    finder.run(*inputs.args)
    return finder.floats


class _Namer:
    """Finds names for new modules.

    Args:
        traced: The network.
    """

    def __init__(self, traced: nn.Module) -> None:
        self._taken = {name for name, _ in traced.named_modules()}
        self._taken.update(name for name, _ in traced.named_parameters())
        self._taken.update(name for name, _ in traced.named_buffers())

    def find(self, plain: str) -> str:
        """A free name: the plain one, or with the smallest number from 1 on behind it.

        Args:
            plain: Dotted name.
        """
        name = plain
        number = 0
        while name in self._taken:
            number += 1
            name = f"{plain}_{number}"
        self._taken.add(name)
        return name


def _replace_call(node: fx.Node, traced: fx.GraphModule, namer: _Namer) -> fx.Node:
    """Put a module in the place of a call, if there is one that does the same.

    Returns:
        The node that gives the result.
    """
    function = name_function(node.target) if callable(node.target) else str(node.target).strip("_")
    replacement = find_module(function, node)
    if replacement is None:
        return node
    module, inputs = replacement
    stack = node.meta.get("nn_module_stack") or {}
    name = namer.find(join_name(next(reversed(stack), ""), function))
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(name, inputs)
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)
    return call


def _separate_runs(traced: fx.GraphModule, namer: _Namer) -> None:
    """Give each run of a module that has no parameters and no buffers a module of its own."""
    names = set()
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = traced.get_submodule(name)
        is_stateless = not any(True for _ in (*module.parameters(), *module.buffers()))
        if name in names and is_stateless:
            node.target = namer.find(name)
            traced.add_submodule(node.target, copy.deepcopy(module))
        names.add(name)


def _require_equal(model: nn.Module, traced: nn.Module, example_inputs: Any) -> None:
    """Refuse a network that computes something else.

    Raises:
        UnsupportedError: It does.
    """
    expected = floats_of(call_model(model, example_inputs))
    outputs = floats_of(call_model(traced, example_inputs))
    for output, reference in zip(outputs, expected, strict=True):
        error = float((output - reference).abs().max())
        largest = float(reference.abs().max())
        if not error <= _TOLERANCE * largest:
            raise UnsupportedError(
                f"the forward that torch.fx traces has other outputs, which differ by {error:.3g} of {largest:.3g}.",
                "write the forward without branches on values and sizes.",
            )
