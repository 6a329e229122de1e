"""Quantizers before functions that a module's forward calls: `x + identity`, `torch.matmul`, `F.interpolate`.

No graph is rewritten: the module keeps its forward, and gets a class that watches the functions that this forward
calls (`torch.overrides.TorchFunctionMode`). A call is identified by its function and by the number of earlier calls of
that function in the forward. Calls inside child modules do not count.
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
from qdq.nn.attend import SOFTMAX, attend, takes_place
from qdq.nn.registry import derive_class
from qdq.quantizer import TensorQuantizer

logger = logging.getLogger(__name__)


class QuantFunctionsMixin(nn.Module):
    """A module whose forward passes quantized tensors to some functions; made by `add_function_quantizers`."""

    float_class: ClassVar[type[nn.Module]]
    _function_quantizers: dict[str, dict[int, str]]
    _function_calls: tuple[str, ...]

    @property
    def function_quantizers(self) -> dict[str, dict[int, str]]:
        """Call ("add", "add_1") -> position among its tensors -> attribute of the quantizer."""
        return self._function_quantizers

    @property
    def function_calls(self) -> tuple[str, ...]:
        """All calls that this module makes in one forward of the model, in order, over all runs of the module."""
        return self._function_calls

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class the forward of the module, with its signature, which torch.export reads."""
        super().__init_subclass__(**kwargs)
        module_forward = super().forward

        @functools.wraps(module_forward)
        def forward(self: QuantFunctionsMixin, *args: Any, **kwargs: Any) -> Any:
            # Not `module_forward`: a graph may have written another one since.
            return _run_watched(self, super(cls, self).forward, *args, **kwargs)

        cls.forward = forward


class QuantGraphMixin(QuantFunctionsMixin):
    """The same for a `torch.fx.GraphModule`, which writes its forward and copies only the modules in its graph."""

    _graph: torch.fx.Graph
    _graph_calls: Counter[str]
    """Number of calls of each quantized function in the graph."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the plain graph, then attach copies of the quantizers."""
        quantizers = copy.deepcopy(_collect_quantizers(self), memo)
        calls = self._function_calls
        with self._as_float():
            twin = copy.deepcopy(self, memo)
        add_function_quantizers(twin, quantizers, calls)
        return twin

    def recompile(self) -> Any:
        """Write the forward again, for example when an evaluation graph becomes a training graph; keep the quantizers.

        Raises:
            StateError: The number of calls of a quantized function in the graph has changed: calls are identified by
                their number.
        """
        if _count_calls(self) != self._graph_calls:
            raise StateError(
                "the calls in the graph of a rewired GraphModule have changed, so its quantizers no longer fit.",
                "call restore_modules, change the graph, then swap, rewire and calibrate again.",
            )
        with self._as_float():  # the float class gets the new forward
            return self.recompile()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the plain graph like torch, because its class cannot be imported, and the quantizers beside it."""
        quantizers = _collect_quantizers(self)
        graph: Any
        with self._as_float():
            graph = self.__reduce__()
        return _rebuild_graph, (*graph, quantizers, self._function_calls)

    @contextmanager
    def _as_float(self) -> Iterator[None]:
        """Make this the plain graph in the block, for functions of torch that need it."""
        rewired_class = type(self)
        self.__class__ = self.float_class  # type: ignore[assignment]
        try:
            yield
        finally:
            self.__class__ = rewired_class


def _collect_quantizers(module: QuantFunctionsMixin) -> dict[str, dict[int, TensorQuantizer]]:
    """Call -> position among its tensors -> quantizer."""
    quantizers: dict[str, dict[int, TensorQuantizer]] = {}
    for site, operands in module._function_quantizers.items():
        quantizers[site] = {}
        for operand, attribute in operands.items():
            quantizers[site][operand] = getattr(module, attribute)
    return quantizers


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
    """Number of calls of each quantized function in the graph of a module."""
    functions = {_function_of(site) for site in module._function_quantizers}
    counts: Counter[str] = Counter()
    for node in module._graph.nodes:
        if node.op == "call_function":
            name = name_function(node.target)
        elif node.op == "call_method":
            name = node.target.strip("_")
        else:
            continue
        if name in functions:
            counts[name] += 1
    return counts


def name_quantizer(site: str, operand: int, count: int) -> str:
    """The attribute of an operand's quantizer: `_add_quantizer`, or `_linear_input0_quantizer` if there are several.

    Args:
        site: The call.
        operand: Position among its tensors, or `attend.SOFTMAX`.
        count: Number of quantized operands.
    """
    if operand == SOFTMAX:
        return f"_{site}_softmax_quantizer"
    if count == 1:
        return f"_{site}_quantizer"
    return f"_{site}_input{operand}_quantizer"


def _run_watched(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module; if a forward on the instance calls the class's, both count as one."""
    watches = vars(_running).get("watches", ())
    if watches and watches[-1].is_in_forward_of(module):
        return forward(*args, **kwargs)
    with _Watch(module):
        return forward(*args, **kwargs)


def add_function_quantizers(
    module: nn.Module, quantizers: dict[str, dict[int, TensorQuantizer]], calls: Sequence[str]
) -> None:
    """Make a module quantize tensors that it passes to functions; only its class changes, not its identity.

    Args:
        module: Any module; a quantized layer only if it calls attention.
        quantizers: Call -> position among its tensors -> quantizer.
        calls: All calls, including those without quantizers, in the order of one forward of the model.
    """
    sites: dict[str, dict[int, str]] = {}
    for site, operands in quantizers.items():
        for operand, quantizer in operands.items():
            attribute = name_quantizer(site, operand, len(operands))
            setattr(module, attribute, quantizer)
            sites.setdefault(site, {})[operand] = attribute
    instance_forward = vars(module).get("forward")
    if instance_forward is not None:
        # A partial, because a closure would not be copied with the module.
        watched = functools.partial(_run_watched, module, instance_forward)
        vars(module)["forward"] = functools.update_wrapper(watched, instance_forward)
    is_graph = isinstance(module, torch.fx.GraphModule)
    mixin = QuantGraphMixin if is_graph else QuantFunctionsMixin
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
    watched = vars(module).get("forward")
    if watched is not None:
        _, instance_forward = watched.args
        vars(module)["forward"] = instance_forward
    module.__class__ = module.float_class  # type: ignore[assignment]


def _function_of(site: str) -> str:
    """The function of a call: "add" for "add_1"."""
    return re.sub(r"_\d+$", "", site)


def _identify(module: nn.Module) -> int:
    """The same number for a module and for its proxies in torch.export, which share its attributes."""
    return id(vars(module))


# The generators that implement checkpoints without reentrant autograd: in torch 2.14, and in torch up to 2.13.
_ALL_CHECKPOINT_GENERATORS = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)
_CHECKPOINT_GENERATORS = [
    name for name in _ALL_CHECKPOINT_GENERATORS if name in vars(checkpointing)
]

# State of this thread. `.watches`: the watches of the running forwards, outermost first. `.checkpoints`: the number of
# running checkpoints of torch.
_running = threading.local()
_warned: WeakSet[nn.Module] = WeakSet()


class _Watch(TorchFunctionMode):
    """Quantizes the tensors that one forward passes to functions, except inside child modules.

    Args:
        module: The module whose forward runs.
        counts: Number of its calls of each function so far.
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
        self._depth = 0  # number of running child modules
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
        """Count a module that begins (1) or ends (-1). A module that the forward has created is part of the forward."""
        if _identify(module) in self._inner:
            self.pause(step)

    @property
    def is_paused(self) -> bool:
        """Whether the running code is outside of the forward itself."""
        return self._depth > 0

    def pause(self, step: int) -> None:
        """Pause (1) or continue (-1), when other code than the forward begins or ends."""
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
        index = self.counts[function]
        self.counts[function] = index + 1
        operands = self._sites.get(f"{function}_{index}" if index else function)
        if operands is None:
            return func(*args, **kwargs)
        return self._call(func, args, kwargs, operands)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: dict[int, str],
    ) -> Any:
        """Call a function with quantized operands."""
        self._warn_if_recomputed_elsewhere()
        if takes_place(name_function(func), operands):
            return self._attend(func, args, kwargs, operands)
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[place] for place in places]
        for operand, attribute in operands.items():
            leaves[places[operand]] = getattr(self.module, attribute)(tensors[operand])
        args, kwargs = tree_unflatten(leaves, structure)
        result = func(*args, **kwargs)
        if 0 in operands and is_in_place(func):
            # The function has changed the quantized copy instead of its first argument.
            return tensors[0].copy_(result)
        return result

    def _attend(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: dict[int, str],
    ) -> Any:
        """Call attention with quantized operands, or the function itself while all of them are off."""
        quantizers = {}
        for operand, attribute in operands.items():
            quantizers[operand] = getattr(self.module, attribute)
        if not any(quantizer.is_active for quantizer in quantizers.values()):
            return func(*args, **kwargs)
        return attend(quantizers, *args, **kwargs)

    def _warn_if_recomputed_elsewhere(self) -> None:
        """Warn of a checkpoint whose functions are not replaced here.

        A checkpoint of another library, or of an unknown version of torch, runs the forward without gradients, and in
        the backward pass again without the quantizers.
        """
        if vars(_running).get("checkpoints", 0):
            return
        if not _CHECKPOINT_GENERATORS and _is_in_checkpoint():
            _warn_of_torch()
        is_foreign = self._has_gradients and not torch.is_grad_enabled()
        if is_foreign and self.module not in _warned:
            _warned.add(self.module)
            logger.warning(
                "%s calls a quantized function without gradients inside a forward that has them. If that is a "
                "checkpoint of a library other than torch, the backward pass computes it again without quantizers: use "
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


@functools.cache  # warns once
def _warn_of_torch() -> None:
    logger.warning(
        "qdq does not know the checkpoint of torch %s: the backward pass computes functions inside it again "
        "without their quantizers. Use checkpoint(..., use_reentrant=True), or checkpoint whole modules.",
        torch.__version__,
    )


class _Recomputed:
    """A function that `torch.utils.checkpoint` calls again in the backward pass, with the quantizers of the first call.

    By then the forward around it and its watches have ended. So this object restores the watches and their counts.

    Args:
        function: The function of the checkpoint.
        has_run: Whether the first call is over, or does not go through this object.
    """

    def __init__(self, function: Callable[..., Any], *, has_run: bool) -> None:
        self._function = function
        self._has_run = has_run
        self._started = []
        for watch in vars(_running).get("watches", ()):
            if not watch.is_paused:
                self._started.append((watch.module, Counter(watch.counts)))

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
        # A backward pass inside a forward interrupts the watches of that forward.
        interrupted = list(vars(_running).get("watches", ()))
        with ExitStack() as stack:
            for watch in interrupted:
                watch.pause(1)
                stack.callback(watch.pause, -1)
            for module, counts in self._started:
                stack.enter_context(_Watch(module, counts))
            return self._function(*args, **kwargs)


def _recompute_watched(function: Callable[..., Any], *, has_run: bool) -> Callable[..., Any]:
    if isinstance(function, _Recomputed):
        return function
    return _Recomputed(function, has_run=has_run)


class _TorchHooks:
    """The changes in torch while any thread has a watch.

    Hooks on all modules tell the watches where a module begins and ends. Both kinds of checkpoints get functions that
    restore the watches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stack = ExitStack()

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                pre_hook = hooks.register_module_forward_pre_hook(_enter_module)
                self._stack.callback(pre_hook.remove)
                hook = hooks.register_module_forward_hook(_leave_module, always_call=True)
                self._stack.callback(hook.remove)
                self._stack.enter_context(_watched_checkpoints())

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


@contextmanager
def _watched_checkpoints() -> Iterator[None]:
    """Replace functions of `torch.utils.checkpoint` in the block: torch has no hook where a checkpoint begins."""
    reentrant = checkpointing.CheckpointFunction
    forward = reentrant.forward
    generators = {name: vars(checkpointing)[name] for name in _CHECKPOINT_GENERATORS}
    replacements: dict[str, Callable[..., Any]] = {}

    def run_reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _recompute_watched(function, has_run=False), *args)  # type: ignore[no-untyped-call]

    def generate(
        generator: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return generator(_recompute_watched(function, has_run=True), *args, **kwargs)

    for name, generator in generators.items():
        replacements[name] = functools.partial(generate, generator)
    reentrant.forward = staticmethod(run_reentrant)  # type: ignore[method-assign]
    vars(checkpointing).update(replacements)
    try:
        yield
    finally:
        reentrant.forward = staticmethod(forward)  # type: ignore[method-assign]
        vars(checkpointing).update(generators)


_torch_hooks = _TorchHooks()


def run_again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward of a module again, without hooks, from one of its hooks.

    torch calls a forward hook after the module has ended, so its calls would count for the forward around it.

    Args:
        module: The module of the hook.
        args: Positional arguments.
        kwargs: Keyword arguments.
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
