"""One recorded forward: which modules ran, who read whose output, which weights were used by plain functions.

The record is of the real data flow, by the identity of tensors, so that it needs neither attribute names nor a model
that torch.fx can trace. It holds for the path that the example inputs took.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from keyword import iskeyword
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path, tree_leaves

from qdq.errors import ArgumentTypeError
from qdq.functions import ALIASES, CONTRACTIONS


@dataclass(frozen=True)
class Contraction:
    """A matrix product or convolution that a module's forward called as a function.

    Args:
        module: Dotted name of the innermost module that made the call ("" for the model itself).
        function: Name of the function, e.g. "conv2d".
        storages: Addresses of the memory of its arguments; a parameter or a view of one is known by it.
    """

    module: str
    function: str
    storages: frozenset[int]


@dataclass(frozen=True)
class Operation:
    """One torch function that took tensors and gave tensors.

    Tensors are known by numbers; one that is changed in place gets a new number.

    Args:
        module: Dotted name of the innermost module that made the call ("" for the model itself).
        function: Name of the function without underscores around it: "add" for `+`, `+=`, `torch.add`, `Tensor.add_`.
        index: How many calls of that function the same run of the module made before.
        inputs: The tensors among its arguments, in order.
        outputs: The tensors it returned.
        arguments: Its other arguments by keyword.
        metered: How far the meter of `trace_forward` went meanwhile.
    """

    module: str
    function: str
    index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: dict[str, Any]
    metered: int = 0

    @property
    def site(self) -> str:
        """The name of the call in its module: "add", then "add_1"."""
        return f"{self.function}_{self.index}" if self.index else self.function

    @property
    def name(self) -> str:
        """Dotted name of the call."""
        return join_name(self.module, self.site)


def join_name(module: str, attribute: str) -> str:
    """Dotted name of a call in a module, or of an attribute of it; the model itself has the name ""."""
    return f"{module}.{attribute}" if module else attribute


@dataclass(frozen=True)
class ModuleRun:
    """One call of a module.

    Args:
        module: Dotted name.
        caller: Dotted name of the module whose forward made the call, None for the model itself.
        inputs: The tensors among its positional arguments, numbered as in `Operation`.
    """

    module: str
    caller: str | None
    inputs: tuple[int, ...]


@dataclass
class ForwardTrace:
    """What one forward did.

    Args:
        calls: How often each module ran, by dotted name.
        contractions: Matrix products and convolutions, in order.
        only_reader: Module -> the module that alone read its output, where there is exactly one.
        operations: Every function on tensors, in order.
        runs: Every call of a module, in order.
        shapes: Shape of each tensor by its number.
        inputs: Numbers of the tensors that the model was given.
        outputs: Numbers of the tensors that it returned.
    """

    calls: Counter[str] = field(default_factory=Counter)
    contractions: list[Contraction] = field(default_factory=list)
    only_reader: dict[str, str] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    runs: list[ModuleRun] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def require_model(model: Any) -> None:
    """Refuse what no quantizer can be put into.

    Raises:
        ArgumentTypeError: No module, a scripted one, or a graph of operators; with what to pass instead.
    """
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}"
            if isinstance(model, type)
            else f"of type {type(model).__name__}"
        )
        raise ArgumentTypeError(
            f"model is {what}; expected a torch.nn.Module.", "pass the module itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentTypeError(
            "the model is scripted (TorchScript): it cannot be quantized.",
            "use the Python module that it was made from.",
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule) and _has_operators(module):
            raise ArgumentTypeError(
                f"{name or 'the model'} is a graph of operators, as torch.export makes it, and has no layers.",
                "use the Python module that was exported.",
            )


def _has_operators(module: torch.fx.GraphModule) -> bool:
    """Whether a graph calls the operators behind torch's functions, as no code that is traced does."""
    targets = (node.target for node in module.graph.nodes)
    return any(
        isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
        for target in targets
    )


def require_batches(batches: Any) -> None:
    """Refuse a single tensor or dictionary where batches are expected: iterating it would give its rows or its keys.

    Raises:
        ArgumentTypeError: With what to pass instead.
    """
    is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str | bytes | nn.Module) or not is_iterable:
        raise ArgumentTypeError(
            f"batches is of type {type(batches).__name__}; expected something that yields batches.",
            "pass a list of batches, or a DataLoader.",
        )
    if isinstance(batches, torch.Tensor | Mapping):
        raise ArgumentTypeError(
            f"batches is one {type(batches).__name__}; expected something that yields batches.",
            "pass [batch].",
        )


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of what a model takes or gives, in order; whatever else is in it is passed over."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def floats_of(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors of what a model takes or gives, in order."""
    return [tensor for tensor in tensors_of(tree) if tensor.is_floating_point()]


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model, from what a loader yields.

    A tensor is the input; a mapping gives keyword arguments; of a tuple or list the first item is the input, as in
    `(images, labels)`.
    """
    if isinstance(inputs, tuple | list) and inputs:
        inputs = inputs[0]
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def name_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf of named arguments by its path, as the inputs of a graph are called: `images_0`, `boxes_left`.

    The names are identifiers. No two are alike: of `a.b` and `a_b` the second is called `a_b_1`.
    """
    leaves, _ = tree_flatten_with_path(dict(arguments))
    names = make_identifiers("_".join(_describe_key(key) for key in path) for path, _ in leaves)
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def make_identifiers(texts: Iterable[str]) -> list[str]:
    """A Python identifier for each text; one that repeats gets the smallest number that makes it unlike all others."""
    identifiers = [_as_identifier(text) for text in texts]
    taken: set[str] = set()
    for index, name in enumerate(identifiers):
        numbered = (f"{name}_{number}" for number in count(1))
        if name in taken:
            identifiers[index] = next(
                other for other in numbered if other not in {*taken, *identifiers}
            )
        taken.add(identifiers[index])
    return identifiers


def _as_identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    return name if name.isidentifier() and not iskeyword(name) else f"_{name}"


def _describe_key(key: Any) -> str:
    if isinstance(key, MappingKey):
        return str(key.key)
    return str(key.idx) if isinstance(key, SequenceKey) else str(getattr(key, "name", key))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on what a loader yields, see `split_inputs`.

    What `torch.compile` has compiled runs as it was before, but in training: hooks and quantizers are to be seen.
    """
    args, kwargs = split_inputs(inputs)
    if (
        torch.is_grad_enabled() or "torch._dynamo" not in sys.modules
    ):  # nothing can be compiled without
        return model(*args, **kwargs)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Using `torch.compile\\(module\\)` when there are global hooks"
        )
        return unwrap_compiled(model)(*args, **kwargs)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` has wrapped; the model itself if it has not."""
    wrapped = model._modules.get("_orig_mod")
    return model if wrapped is None else wrapped


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own training flag back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def find_device(model: nn.Module) -> torch.device:
    """Where the parameters of a model lie; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def trace_forward(
    model: nn.Module, inputs: Any, meter: Callable[[], int] | None = None
) -> ForwardTrace:
    """Run a model once in evaluation mode, without gradients, and record what it did.

    Args:
        model: Any module; its training flags are put back.
        inputs: As for `call_model`; one small batch is enough.
        meter: A count that is read before and after each function, of its arithmetic say.

    Raises:
        ArgumentTypeError: The inputs hold no tensor.
    """
    if not tensors_of(split_inputs(inputs)):
        raise ArgumentTypeError(
            f"the example inputs, of type {type(inputs).__name__}, hold no tensor.",
            "pass one batch: a tensor, (inputs, labels), or a dictionary of keyword arguments.",
        )
    recorder = _Recorder(model, meter or (lambda: 0))
    handles = [
        hooks.register_module_forward_pre_hook(recorder.enter),
        hooks.register_module_forward_hook(recorder.leave),
    ]
    try:
        with evaluating(model), recorder:
            outputs = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.finish(outputs)


class _Recorder(TorchFunctionMode):
    """Sees every torch function (as a mode) and every module call (as global hooks)."""

    def __init__(self, model: nn.Module, meter: Callable[[], int]) -> None:
        super().__init__()
        self._meter = meter
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._counters: list[Counter[str]] = [Counter()]
        self._numbers: dict[int, int] = {}  # of tensors by identity
        self._held: list[torch.Tensor] = []  # so that no identity is used twice
        self._outputs: dict[
            int, tuple[str, torch.Tensor]
        ] = {}  # holds the tensors, so that no id is used twice
        self._readers: defaultdict[str, set[str]] = defaultdict(set)
        self._given: dict[str, int] = {}
        self._trace = ForwardTrace()

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        caller = self._stack[-1] if self._stack else None
        self._trace.runs.append(ModuleRun(name, caller, tuple(map(self._number, tensors_of(args)))))
        if caller is None and not self._trace.inputs:
            self._trace.inputs = self._trace.runs[-1].inputs
        self._stack.append(name)
        self._counters.append(Counter())
        self._trace.calls[name] += 1
        for tensor in tensors_of(args):
            if id(tensor) in self._outputs:
                self._given[name] = id(tensor)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self._stack.pop()
        self._counters.pop()
        is_leaf = next(module.children(), None) is None
        if isinstance(output, torch.Tensor) and (is_leaf or id(output) not in self._outputs):
            self._outputs[id(output)] = (name, output)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        arguments = tensors_of((args, kwargs or {}))
        numbers = tuple(map(self._number, arguments))  # before the call may change one in place
        function = name_function(func)
        index = self._counters[-1][function]
        self._counters[-1][function] += 1
        reading = self._meter()
        result = func(*args, **(kwargs or {}))
        metered = self._meter() - reading
        changed = arguments[:1] if function == "setitem" else tensors_of(result)
        if changed:  # sizes and flags are no reading of the values
            self._record(func, arguments)
            here = self._stack[-1] if self._stack else ""
            outputs = tuple(self._renumber(tensor) for tensor in changed)
            others = {str(key): value for key, value in (*enumerate(args), *(kwargs or {}).items())}
            plain = {key: value for key, value in others.items() if not tensors_of(value)}
            operation = Operation(here, function, index, numbers, outputs, plain, metered)
            self._trace.operations.append(operation)
        return result

    def _number(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._renumber(tensor)
        return self._numbers[id(tensor)]

    def _renumber(self, tensor: torch.Tensor) -> int:
        """A number that no tensor has had; each stays in memory, so that its identity is not given to another."""
        self._held.append(tensor)
        number = self._numbers[id(tensor)] = len(self._held)
        self._trace.shapes[number] = tuple(tensor.shape)
        return number

    def _record(self, func: Callable[..., Any], arguments: list[torch.Tensor]) -> None:
        here = self._stack[-1] if self._stack else ""
        for tensor in arguments:
            if id(tensor) in self._outputs:
                self._readers[self._outputs[id(tensor)][0]].add(here)
        function = name_function(func)
        if function in CONTRACTIONS:
            storages = frozenset(tensor.untyped_storage().data_ptr() for tensor in arguments)
            self._trace.contractions.append(Contraction(here, function, storages))

    def finish(self, outputs: Any) -> ForwardTrace:
        self._trace.outputs = tuple(map(self._number, tensors_of(outputs)))
        returned = {id(tensor) for tensor in tensors_of(outputs)}
        for identity, (name, _) in self._outputs.items():
            readers = self._readers[name]
            if len(readers) == 1 and identity not in returned and self._trace.calls[name] == 1:
                (reader,) = readers
                if self._given.get(reader) == identity:
                    self._trace.only_reader[name] = reader
        return self._trace


def name_function(func: Callable[..., Any]) -> str:
    """One name for the operator, the function, the method and the method in place."""
    name = str(getattr(func, "__name__", None) or resolve_name(func) or "")
    if name == "__get__":  # of an attribute such as `Tensor.T`
        name = str(getattr(getattr(func, "__self__", None), "__name__", name))
    name = name.partition(".")[0].strip("_")  # torch.ops.aten.mm.default
    return ALIASES.get(name, name)


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first tensor: `add_`, `__iadd__`."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")
