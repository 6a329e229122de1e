"""Quantizers in front of functions that a module's forward calls: `x + identity`, `torch.matmul`, `F.interpolate`.

No graph is rewritten: the module keeps its own forward, and gets a class that watches the functions which that forward
calls (`torch.overrides.TorchFunctionMode`). A call is known by its function and by how many calls of that function the
forward made before; what the modules inside call does not count.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.fx
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpointing
from torch.utils._pytree import tree_flatten, tree_unflatten

from qdq.errors import StateError
from qdq.forward import is_in_place, name_function
from qdq.nn.registry import derive_class
from qdq.quantizer import TensorQuantizer

logger = logging.getLogger(__name__)


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
            return _run_watched(
                self, super(cls, self).forward, *args, **kwargs
            )  # a graph may have written another

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
            site: {
                operand: copy.deepcopy(getattr(self, attribute), memo)
                for operand, attribute in operands.items()
            }
            for site, operands in sites.items()
        }
        with self._as_float():
            twin = copy.deepcopy(self, memo)
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
        with self._as_float():  # that class gets the new forward
            return self.recompile()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The plain graph as torch pickles it, whose class cannot be imported, and the quantizers beside it."""
        quantizers = {
            site: {operand: getattr(self, attribute) for operand, attribute in operands.items()}
            for site, operands in self._function_quantizers.items()
        }
        graph: Any
        with self._as_float():
            graph = self.__reduce__()
        return _rebuild_graph, (*graph, quantizers, self._function_calls)

    @contextmanager
    def _as_float(self) -> Iterator[None]:
        """What torch does with the plain graph, it does within the block."""
        rewired_class = type(self)
        self.__class__ = self.float_class  # type: ignore[assignment]
        try:
            yield
        finally:
            self.__class__ = rewired_class


def _rebuild_graph(
    rebuild: Callable[..., nn.Module],
    arguments: tuple[Any, ...],
    quantizers: dict[str, dict[int, TensorQuantizer]],
    calls: Sequence[str],
) -> nn.Module:
    """A rewired graph from its pickle."""
    module = rebuild(*arguments)
    add_function_quantizers(module, quantizers, calls)
    return module


def _count_calls(module: QuantGraphMixin) -> Counter[str]:
    """How often the graph of a module calls each function that is quantized."""
    functions = {_function_of(site) for site in module._function_quantizers}
    calls = (node for node in module._graph.nodes if node.op in ("call_function", "call_method"))
    names = (
        name_function(node.target) if callable(node.target) else node.target.strip("_")
        for node in calls
    )
    return Counter(name for name in names if name in functions)


def name_quantizer(site: str, operand: int, count: int) -> str:
    """The attribute for the quantizer of one of `count` operands of a call: `_add_quantizer`, `_linear_input0_...`."""
    return f"_{site}_quantizer" if count == 1 else f"_{site}_input{operand}_quantizer"


def _run_watched(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward; one on the instance may call that of the class, and both are one forward."""
    watches = vars(_running).get("watches", ())
    if watches and watches[-1].is_in_forward_of(module):
        return forward(*args, **kwargs)
    with _Watch(module):
        return forward(*args, **kwargs)


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
    if (own_forward := vars(module).get("forward")) is not None:
        watched = functools.partial(
            _run_watched, module, own_forward
        )  # copies with the module, as no closure does
        vars(module)["forward"] = functools.update_wrapper(watched, own_forward)
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
    if (watched := vars(module).get("forward")) is not None:
        vars(module)["forward"] = watched.args[1]
    module.__class__ = module.float_class  # type: ignore[assignment]


def _function_of(site: str) -> str:
    """The function of a call: "add" of "add_1"."""
    return re.sub(r"_\d+$", "", site)


def _identify(module: nn.Module) -> int:
    """The same for a module and for the proxies that torch.export hands out in its place: they have its attributes."""
    return id(vars(module))


# The generators behind checkpoints without reentrant autograd: of torch 2.14, and of torch up to 2.13.
_CHECKPOINT_GENERATORS: tuple[str, ...] = tuple(
    name
    for name in (
        "_checkpoint_without_reentrant_generator_impl",
        "_checkpoint_without_reentrant_generator",
    )
    if name in vars(checkpointing)
)

# Of this thread: `.watches`, those of the forwards that run, outermost first; `.checkpoints`, how many of torch's run.
_running = threading.local()
_warned: WeakSet[nn.Module] = WeakSet()


class _Watch(TorchFunctionMode):
    """Quantizes tensors on their way into the functions that one forward calls itself.

    Args:
        module: The module whose forward runs.
        counts: How often it has called each function so far.
    """

    def __init__(
        self, module: QuantFunctionsMixin, counts: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.counts: Counter[str] = Counter(counts)
        self._sites = module._function_quantizers
        self._functions = {_function_of(site) for site in self._sites}
        self._inner = {_identify(inner) for inner in module.modules()}
        self._depth = 0  # how many modules inside this one are running
        self._has_gradients = torch.is_grad_enabled()

    def __enter__(self) -> _Watch:
        _torch_hooks.acquire()
        vars(_running).setdefault("watches", []).append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _running.watches.pop()
        _torch_hooks.release()

    def is_in_forward_of(self, module: nn.Module) -> bool:
        """Whether the forward of a module runs, and none of the modules inside it."""
        return not self.is_paused and _identify(self.module) == _identify(module)

    def count_module(self, module: nn.Module, step: int) -> None:
        """A module begins (1) or ends (-1); one that the forward has just made for itself is part of the forward."""
        if _identify(module) in self._inner:
            self.pause(step)

    @property
    def is_paused(self) -> bool:
        """Whether what runs is not the forward's own."""
        return self._depth > 0

    def pause(self, step: int) -> None:
        """What runs now is not the forward's own (1), or no longer (-1)."""
        self._depth += step

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        function = name_function(func)
        is_paused = self._depth > 0  # torch.compile cannot read a property of a mode here
        if is_paused or function not in self._functions:
            return func(*args, **kwargs)
        index, self.counts[function] = self.counts[function], self.counts[function] + 1
        operands = self._sites.get(f"{function}_{index}" if index else function)
        return (
            func(*args, **kwargs) if operands is None else self._call(func, args, kwargs, operands)
        )

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: dict[int, str],
    ) -> Any:
        self._warn_if_recomputed_elsewhere()
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[place] for place in places]
        for operand, attribute in operands.items():
            leaves[places[operand]] = getattr(self.module, attribute)(tensors[operand])
        args, kwargs = tree_unflatten(leaves, structure)
        result = func(*args, **kwargs)
        if 0 in operands and is_in_place(func):
            return tensors[0].copy_(
                result
            )  # the tensor that was given changes, not its quantized copy
        return result

    def _warn_if_recomputed_elsewhere(self) -> None:
        """A checkpoint of another library runs the forward without gradients, then again where nothing watches.

        So does one of a torch whose functions are not those that are exchanged here.
        """
        if (
            not _CHECKPOINT_GENERATORS
            and not vars(_running).get("checkpoints", 0)
            and _is_in_checkpoint()
        ):
            _warn_of_torch()
        is_foreign = (
            self._has_gradients
            and not torch.is_grad_enabled()
            and not vars(_running).get("checkpoints", 0)
        )
        if is_foreign and self.module not in _warned:
            _warned.add(self.module)
            logger.warning(
                "%s calls a quantized function without gradients inside a forward that has them. If that is a "
                "checkpoint of another library than torch, the backward pass computes it again without quantizers: use "
                "torch.utils.checkpoint, or checkpoint whole modules.",
                type(self.module).__name__,
            )


def _is_in_checkpoint() -> bool:
    """Whether a function of `torch.utils.checkpoint` runs inside the innermost watched forward."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _run_watched.__code__:
        if frame.f_globals is vars(checkpointing):
            return True
        frame = frame.f_back
    return False


@functools.cache  # once
def _warn_of_torch() -> None:
    logger.warning(
        "torch %s has another checkpoint than qdq knows: the backward pass computes functions inside of it again "
        "without their quantizers. Use checkpoint(..., use_reentrant=True), or checkpoint whole modules.",
        torch.__version__,
    )


class _Recomputed:
    """A function that `torch.utils.checkpoint` calls again in the backward pass, with the quantizers of the first time.

    By then the forward around it has ended, and nothing would watch. So it goes on from where the forward was.

    Args:
        function: What is called.
        has_run: Whether the first time is over, or is no business of this object.
    """

    def __init__(self, function: Callable[..., Any], *, has_run: bool) -> None:
        self._function = function
        self._has_run = has_run
        watches = vars(_running).get("watches", ())
        self._started = [
            (watch.module, Counter(watch.counts)) for watch in watches if not watch.is_paused
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = vars(_running)
        state["checkpoints"] = state.get("checkpoints", 0) + 1
        try:
            return self._run(*args, **kwargs)
        finally:
            state["checkpoints"] -= 1

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_run:
            self._has_run = True
            return self._function(*args, **kwargs)
        interrupted = list(vars(_running).get("watches", ()))  # of a backward pass inside a forward
        with ExitStack() as stack:
            for watch in interrupted:
                watch.pause(1)
                stack.callback(watch.pause, -1)
            for module, counts in self._started:
                stack.enter_context(_Watch(module, counts))
            return self._function(*args, **kwargs)


def _recompute_watched(function: Callable[..., Any], *, has_run: bool) -> Callable[..., Any]:
    return function if isinstance(function, _Recomputed) else _Recomputed(function, has_run=has_run)


class _TorchHooks:
    """What is changed in torch as long as any thread watches.

    There are hooks on all modules: each watch sees every begin with its end. And both kinds of checkpoints are handed
    functions that remember the watches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stack = ExitStack()

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                for handle in (
                    hooks.register_module_forward_pre_hook(_enter_module),
                    hooks.register_module_forward_hook(_leave_module, always_call=True),
                ):
                    self._stack.callback(handle.remove)
                self._stack.enter_context(_watched_checkpoints())

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


@contextmanager
def _watched_checkpoints() -> Iterator[None]:
    """Torch offers no hook where a checkpoint begins: functions of `torch.utils.checkpoint` are exchanged."""
    reentrant = checkpointing.CheckpointFunction
    forward = reentrant.forward
    generators = {name: vars(checkpointing)[name] for name in _CHECKPOINT_GENERATORS}

    def run_reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _recompute_watched(function, has_run=False), *args)  # type: ignore[no-untyped-call]

    def generate(
        generator: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return generator(_recompute_watched(function, has_run=True), *args, **kwargs)

    reentrant.forward = staticmethod(run_reentrant)  # type: ignore[method-assign]
    vars(checkpointing).update(
        {name: functools.partial(generate, own) for name, own in generators.items()}
    )
    try:
        yield
    finally:
        reentrant.forward = staticmethod(forward)  # type: ignore[method-assign]
        vars(checkpointing).update(generators)


_torch_hooks = _TorchHooks()


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
