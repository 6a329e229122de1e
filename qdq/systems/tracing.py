"""The graph of a model as torch.fx sees it, with layers and quantizers as modules."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from qdq.errors import UnsupportedError
from qdq.forward import name_function
from qdq.functions import SHAPE_READERS
from qdq.quantizer import TensorQuantizer
from qdq.systems.quantizer import SystemQuantizer

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers that become quantized ones."""


class _Tracer(fx.Tracer):
    """Sees layers, normalizations and quantizers as modules, and everything else as functions."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(module, (*WEIGHTED, _NormBase, SystemQuantizer, TensorQuantizer))


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a model; `node.meta` of a size, and of what is computed from sizes only, has "is_size".

    Args:
        model: A model of any number system.

    Raises:
        UnsupportedError: torch.fx cannot trace it.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise UnsupportedError(
            f"torch.fx cannot say what is before and after the layers, where quantizers stand: {error}",
            "write the forward without branches on values and sizes, or make the quantizers parts of the layers.",
        ) from error
    _mark_sizes(graph)
    return graph


def _mark_sizes(graph: fx.Graph) -> None:
    """Mark the nodes that are sizes, as in `x.view(x.size(0), -1)`, or are computed from sizes only."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = node.args[1] if node.target is getattr else name_of(node)
        inputs = node.all_input_nodes
        is_computed = bool(inputs) and all("is_size" in other.meta for other in inputs)
        if name in SHAPE_READERS or is_computed:
            node.meta["is_size"] = True


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls, as in `qdq.functions`."""
    return name_function(node.target) if callable(node.target) else str(node.target).strip("_")
