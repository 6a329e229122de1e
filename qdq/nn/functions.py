"""Quantizers in front of functions that a module's forward calls: `x + identity`, `torch.matmul`, `F.interpolate`.

No graph is rewritten: the module keeps its own forward, and gets a class that watches the functions which that forward
calls (`torch.overrides.TorchFunctionMode`). A call is known by its function and by how many calls of that function the
forward made before; what the modules inside call does not count.
"""

from __future__ import annotations

import copy
import functools
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from qdq.errors import StateError
from qdq.nn.registry import derive_class
from qdq.quantizer import TensorQuantizer
from qdq.trace import is_in_place, name_function


class QuantFunctionsMixin(nn.Module):
    """A module whose forward hands quantized tensors to some functions; made by `add_function_quantizers`."""

    float_class: ClassVar[type[nn.Module]]
    _function_quantizers: dict[str, dict[int, str]]
    """Call ("add", "add_1") -> position among its tensors -> attribute that holds the quantizer."""
    _function_calls: tuple[str, ...]
    """All calls that one forward of the model makes of this module's forward, in order; from each run of the module."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class its forward: the module's own, under its own signature, which torch.export reads."""
        super().__init_subclass__(**kwargs)
        own_forward = super().forward

        @functools.wraps(own_forward)
        def forward(self: QuantFunctionsMixin, *args: Any, **kwargs: Any) -> Any:
            with _Watch(self):
                return super(cls, self).forward(*args, **kwargs)  # a graph may have written another since

        cls.forward = forward


class QuantGraphMixin(QuantFunctionsMixin):
    """The same for a `torch.fx.GraphModule`, which writes its own forward and knows only the modules in its graph."""

    _graph: torch.fx.Graph
    _graph_calls: Counter[str]
    """How often the graph calls each function that is quantized."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the plain graph, which has copies of the quantizers then."""
        sites, calls = self._function_quantizers, self._function_calls
        quantizers = {
            site: {operand: copy.deepcopy(getattr(self, attribute), memo) for operand, attribute in operands.items()}
            for site, operands in sites.items()
        }
        rewired_class = type(self)
        self.__class__ = self.float_class  # type: ignore[assignment]
        try:
            twin = copy.deepcopy(self, memo)
        finally:
            self.__class__ = rewired_class
        add_function_quantizers(twin, quantizers, calls)
        return twin

    def recompile(self) -> Any:
        """Write the forward anew, as an evaluation graph that becomes a training graph does; the quantizers stay.

        Raises:
            StateError: The graph calls a quantized function more or less often: calls are known by number.
        """
        if _count_calls(self) != self._graph_calls:
            raise StateError(
                "the graph of a rewired GraphModule has other calls now: its quantizers stand at the former ones.",
                "call restore_modules, change the graph, then swap, rewire and calibrate again.",
            )
        rewired_class = type(self)
        self.__class__ = self.float_class  # type: ignore[assignment]  # that class gets the new forward
        try:
            return self.recompile()
        finally:
            self.__class__ = rewired_class


def _count_calls(module: QuantGraphMixin) -> Counter[str]:
    """How often the graph of a module calls each function that is quantized."""
    functions = {_function_of(site) for site in module._function_quantizers}
    calls = (node for node in module._graph.nodes if node.op in ("call_function", "call_method"))
    names = (name_function(node.target) if callable(node.target) else node.target.strip("_") for node in calls)
    return Counter(name for name in names if name in functions)


def name_quantizer(site: str, operand: int, count: int) -> str:
    """The attribute for the quantizer of one of `count` operands of a call: `_add_quantizer`, `_linear_input0_...`."""
    return f"_{site}_quantizer" if count == 1 else f"_{site}_input{operand}_quantizer"


def add_function_quantizers(
    module: nn.Module, quantizers: dict[str, dict[int, TensorQuantizer]], calls: Sequence[str]
) -> None:
    """Have a module quantize what it hands to functions; it keeps its identity, only its class changes.

    Args:
        module: Any module that is not quantized itself.
        quantizers: Call -> position among its tensors -> quantizer.
        calls: All calls, those without quantizers too, in the order in which one forward of the model makes them.
    """
    sites: dict[str, dict[int, str]] = {}
    for site, operands in quantizers.items():
        for operand, quantizer in operands.items():
            attribute = name_quantizer(site, operand, len(operands))
            setattr(module, attribute, quantizer)
            sites.setdefault(site, {})[operand] = attribute
    mixin = QuantGraphMixin if isinstance(module, torch.fx.GraphModule) else QuantFunctionsMixin
    module.__class__ = derive_class(mixin, type(module))
    vars(module).update(_function_quantizers=sites, _function_calls=tuple(calls))
    if isinstance(module, QuantGraphMixin):
        vars(module)["_graph_calls"] = _count_calls(module)


def remove_function_quantizers(module: QuantFunctionsMixin) -> None:
    """Undo `add_function_quantizers`."""
    for operands in module._function_quantizers.values():
        for attribute in operands.values():
            delattr(module, attribute)
    del module._function_quantizers, module._function_calls
    vars(module).pop("_graph_calls", None)
    module.__class__ = module.float_class  # type: ignore[assignment]


def _function_of(site: str) -> str:
    """The function of a call: "add" of "add_1"."""
    return re.sub(r"_\d+$", "", site)


def _identify(module: nn.Module) -> int:
    """The same for a module and for the proxies that torch.export hands out in its place: they have its attributes."""
    return id(vars(module))


_running = threading.local()  # `.watches`: those of the forwards that run in this thread, outermost first


class _Watch(TorchFunctionMode):
    """Quantizes tensors on their way into the functions that one forward calls itself."""

    def __init__(self, module: QuantFunctionsMixin) -> None:
        super().__init__()
        self._module = module
        self._sites = module._function_quantizers
        self._functions = {_function_of(site) for site in self._sites}
        self._inner = {_identify(inner) for inner in module.modules()}
        self._depth = 0  # how many modules inside this one are running
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> _Watch:
        _module_hooks.acquire()
        vars(_running).setdefault("watches", []).append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _running.watches.pop()
        _module_hooks.release()

    def count_module(self, module: nn.Module, step: int) -> None:
        """A module begins (1) or ends (-1); one that the forward has just made for itself is part of the forward."""
        if _identify(module) in self._inner:
            self._depth += step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        function = name_function(func)
        if self._depth or function not in self._functions:
            return func(*args, **kwargs)
        index, self._counts[function] = self._counts[function], self._counts[function] + 1
        operands = self._sites.get(f"{function}_{index}" if index else function)
        return func(*args, **kwargs) if operands is None else self._call(func, args, kwargs, operands)

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], operands: dict[int, str]
    ) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        given = [leaves[place] for place in places]
        for operand, attribute in operands.items():
            leaves[places[operand]] = getattr(self._module, attribute)(given[operand])
        args, kwargs = tree_unflatten(leaves, structure)
        result = func(*args, **kwargs)
        if 0 in operands and is_in_place(func):
            return given[0].copy_(result)  # the tensor that was given changes, not its quantized copy
        return result


class _ModuleHooks:
    """torch's hooks on all modules, there as long as any thread watches: each watch sees every begin with its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._handles: list[RemovableHandle] = []

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._handles = [
                    hooks.register_module_forward_pre_hook(_enter_module),
                    hooks.register_module_forward_hook(_leave_module, always_call=True),
                ]

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for handle in self._handles:
                    handle.remove()


_module_hooks = _ModuleHooks()


def run_again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module's forward, without hooks, from one of its own hooks.

    torch calls these when the module has ended: what it runs now would count as calls of the forward around it.
    """
    _enter_module(module, ())
    try:
        return module.forward(*args, **kwargs)
    finally:
        _leave_module(module, (), None)


def _enter_module(module: nn.Module, args: Any) -> None:
    for watch in vars(_running).get("watches", ()):
        watch.count_module(module, 1)


def _leave_module(module: nn.Module, args: Any, output: Any) -> None:
    for watch in vars(_running).get("watches", ()):
        watch.count_module(module, -1)
