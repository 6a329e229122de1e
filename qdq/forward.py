"""One recorded forward: which modules ran, which module read whose output, which weights plain functions used.

The record follows the tensors by their identity. So it needs neither attribute names nor a model that torch.fx can
trace. It is valid for the path that the example inputs took.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from keyword import iskeyword
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path

from qdq.batch import split_inputs, tensors_of, to_plain
from qdq.device import find_device, move_batch
from qdq.errors import ArgumentTypeError, DataError
from qdq.functions import ALIASES, CONTRACTIONS
from qdq.text import list_names

# How torch says that tensors of several devices met. A convolution shows their types: torch.FloatTensor and
# torch.cuda.FloatTensor. If only the part behind the last dot differs, the devices are the same.
_OF_FUNCTIONS = re.compile(
    "the same device|not on the expected device|different from other tensors on"
)
_OWN_NAMESPACES = ("aten", "prim", "prims", "quantized", "qdq")
_OF_CONVOLUTIONS = re.compile(r"Input type \((.*?)\) and (?:weight|bias) type \((.*?)\)")


@dataclass(frozen=True)
class Contraction:
    """A matrix product or convolution that a module's forward called as a function.

    Args:
        module: Dotted name of the innermost module that made the call ("" for the model itself).
        function: Name of the function, e.g. "conv2d".
        storages: Memory addresses of its arguments, which identify a parameter or a view of one.
    """

    module: str
    function: str
    storages: frozenset[int]


@dataclass(frozen=True)
class Operation:
    """One call of a torch function that took and returned tensors.

    Tensors are identified by numbers; one that is changed in place gets a new number.

    Args:
        module: Dotted name of the innermost module that made the call ("" for the model itself).
        function: Name of the function without underscores around it: "add" for `+`, `+=`, `torch.add`, `Tensor.add_`.
        index: Number of earlier calls of that function in the same run of the module.
        inputs: The tensors among its arguments, in order.
        outputs: The tensors it returned.
        arguments: Its other arguments by keyword.
        metered: By how much the meter of `trace_forward` rose during the call.
        is_foreign: Whether it is an operator that another library registered, such as torchvision.
    """

    module: str
    function: str
    index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: dict[str, Any]
    metered: int = 0
    is_foreign: bool = False

    @property
    def site(self) -> str:
        """The name of the call in its module: "add", then "add_1"."""
        return f"{self.function}_{self.index}" if self.index else self.function

    @property
    def name(self) -> str:
        """Dotted name of the call."""
        return join_name(self.module, self.site)


def join_name(module: str, attribute: str) -> str:
    """Dotted name of a call in a module, or of an attribute of it.

    Args:
        module: Dotted name of the module, "" for the model itself.
        attribute: Name of the call or attribute.
    """
    return f"{module}.{attribute}" if module else attribute


@dataclass(frozen=True)
class ModuleRun:
    """One call of a module.

    Args:
        module: Dotted name.
        caller: Dotted name of the module whose forward made the call, None for the model itself.
        inputs: The tensors among its positional and keyword arguments, numbered as in `Operation`.
        outputs: The tensors that it returned.
    """

    module: str
    caller: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()


@dataclass
class ForwardTrace:
    """The record of one forward.

    Args:
        calls: How often each module ran, by dotted name.
        contractions: Matrix products and convolutions, in order.
        only_reader: Module -> the module that read its output, if exactly one did.
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
    """Refuse an object that quantizers cannot be put into.

    Args:
        model: Any object.

    Raises:
        ArgumentTypeError: It is not a module, or a scripted one, a graph of operators or data-parallel. The message
            says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        kind = f"of type {type(model).__name__}"
        if isinstance(model, type):
            kind = f"the class {model.__name__}"
        raise ArgumentTypeError(
            f"model is {kind}; expected a torch.nn.Module.", "pass the module itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentTypeError(
            "the model is scripted (TorchScript): it cannot be quantized.",
            "use the Python module that it was made from.",
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ArgumentTypeError(
                f"{name or 'the model'} is a DataParallel over {len(module.device_ids)} devices, whose replicas lose"
                " what their quantizers collect.",
                "use its module; torchrun runs several GPUs in processes of their own.",
            )
        if isinstance(module, torch.fx.GraphModule) and _has_operators(module):
            raise ArgumentTypeError(
                f"{name or 'the model'} is a graph of operators, as torch.export makes it, and has no layers.",
                "use the Python module that was exported.",
            )


def _has_operators(module: torch.fx.GraphModule) -> bool:
    """Whether a graph calls the operators that implement torch's functions, which traced code never does."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            return True
    return False


def name_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf of named arguments by its path, named like the inputs of a graph: `images_0`, `boxes_left`.

    The names are unique identifiers: for `a.b` and `a_b`, the second is named `a_b_1`.

    Args:
        arguments: Name -> argument, as for `batch.list_leaves`.
    """
    leaves_by_path, _ = tree_flatten_with_path(to_plain(dict(arguments)))
    texts = []
    leaves = []
    for path, leaf in leaves_by_path:
        texts.append("_".join(_describe_key(key) for key in path))
        leaves.append(leaf)
    return dict(zip(make_identifiers(texts), leaves, strict=True))


def make_identifiers(texts: Iterable[str]) -> list[str]:
    """A Python identifier for each text, all of them unique: a repeated one gets the smallest number that is free.

    Args:
        texts: Any texts.
    """
    identifiers = [_as_identifier(text) for text in texts]
    taken: set[str] = set()
    for index, name in enumerate(identifiers):
        if name in taken:
            identifiers[index] = _number_name(name, taken.union(identifiers))
        taken.add(identifiers[index])
    return identifiers


def _number_name(name: str, taken: set[str]) -> str:
    """A name with the smallest number that makes it unique."""
    numbered = (f"{name}_{number}" for number in count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


def _as_identifier(text: str) -> str:
    """A text with underscores for all characters that an identifier cannot have."""
    name = re.sub(r"\W", "_", text)
    if name.isidentifier() and not iskeyword(name):
        return name
    return f"_{name}"


def _describe_key(key: Any) -> str:
    """A step of the path to a leaf: the key of a dictionary, the index in a list, or the name of an attribute."""
    if isinstance(key, MappingKey):
        return str(key.key)
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(getattr(key, "name", key))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on an item of a loader, see `split_inputs`, which is moved to the device of the model.

    A model that `torch.compile` has compiled runs uncompiled, so that hooks and quantizers take effect; in training
    (with gradients) it runs compiled.

    Args:
        model: The model.
        inputs: The item.

    Raises:
        ArgumentTypeError: The forward cannot be called with the arguments of the item, or one is a cache of
            transformers.
        DataError: The item cannot be moved to the device of the model, or tensors of other devices meet in the model.
    """
    device = find_device(model)
    _refuse_caches(inputs)
    args, kwargs = _place_inputs(model, split_inputs(inputs), device)
    fix = (
        "give batches of tensors in lists, tuples and dictionaries, which are moved to the device of the model; "
        "keep constants of the model in buffers, or make them on the device of an input."
    )
    with explaining_devices(f"the model is on {device}, and a function in it", fix):
        try:
            return _run_uncompiled(model, args, kwargs)
        except TypeError as error:
            _explain_arguments(model, inputs, args, kwargs, error)
            raise


def _refuse_caches(batch: Any) -> None:
    """Refuse the keys and values of earlier tokens, which transformers keeps in an object that each forward changes.

    Raises:
        ArgumentTypeError: There are such keys and values.
    """
    _, kwargs = split_inputs(batch)
    for name, value in kwargs.items():
        if hasattr(value, "get_seq_length"):
            raise ArgumentTypeError(
                f"the input {name} is a {type(value).__name__}, which every forward changes.",
                f"leave {name} out, and set model.config.use_cache = False.",
            )


def _explain_arguments(
    model: nn.Module,
    batch: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: TypeError,
) -> None:
    """Explain the error of a call whose arguments are not those of the forward; any other error is left alone.

    Raises:
        ArgumentTypeError: The forward takes other arguments.
    """
    signature = inspect.signature(unwrap_compiled(model).forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as reason:
        given = list_names(list(kwargs), 5) or f"{len(args)} positional"
        raise ArgumentTypeError(
            f"the forward of {type(model).__name__} takes {signature}, and a batch of type {type(batch).__name__} "
            f"gives it {given}: {reason}.",
            "pass a dictionary of its arguments, or qdq.Labelled((first, second), labels): the only input in a bare "
            "tuple or list is its first item.",
        ) from error


@contextmanager
def explaining_devices(subject: str, fix: str) -> Iterator[None]:
    """Replace the error of torch about tensors of several devices in the block.

    Args:
        subject: What gets these tensors, for the message.
        fix: What to do.

    Raises:
        DataError: Tensors of several devices met.
    """
    try:
        yield
    except RuntimeError as error:
        if not says_devices_differ(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{subject} gets tensors of another device: {reason}", fix) from error


def says_devices_differ(error: Exception) -> bool:
    """Whether an error of torch says that tensors of several devices met in one function.

    Args:
        error: Any error.
    """
    text = str(error)
    if _OF_FUNCTIONS.search(text):
        return True
    types = _OF_CONVOLUTIONS.search(text)
    if types is None:
        return False
    first, second = types.groups()
    return first.rpartition(".")[0] != second.rpartition(".")[0]


def _place_inputs(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """Inputs on the device of a model, if it has one.

    Raises:
        DataError: The device is "meta", and the inputs have values.
    """
    tensors = tensors_of(inputs)
    if all(tensor.device == device for tensor in tensors):
        return inputs
    if not all(tensor.is_meta for tensor in tensors):
        require_data(model)
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    is_elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    if is_elsewhere and len(devices) != 1:
        return inputs  # a model on several devices, or without tensors: the caller knows where its inputs belong
    return move_batch(inputs, device)


def require_data(model: nn.Module) -> None:
    """Refuse a model whose parameters have no values.

    Args:
        model: Any module.

    Raises:
        DataError: It is on the device "meta".
    """
    if find_device(model).type == "meta":
        raise DataError(
            "the model is on the device 'meta': its parameters have no values, so it cannot run on data.",
            "load it with its values, for instance model.to_empty(device='cpu') and load_state_dict.",
        )


def _run_uncompiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a model; without gradients, one that is compiled runs uncompiled."""
    can_be_compiled = "torch._dynamo" in sys.modules
    if torch.is_grad_enabled() or not can_be_compiled:
        return model(*args, **kwargs)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Using `torch.compile\\(module\\)` when there are global hooks"
        )
        return unwrap_compiled(model)(*args, **kwargs)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped; the model itself if it is not compiled.

    Args:
        model: Any module.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return model  # its children are no dictionary
    wrapped = model._modules.get("_orig_mod")
    return model if wrapped is None else wrapped


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag of every module is restored at the end."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def trace_forward(
    model: nn.Module, inputs: Any, meter: Callable[[], int] | None = None
) -> ForwardTrace:
    """Run a model once in evaluation mode, without gradients, and record what it did.

    Args:
        model: Any module; its training flags are put back.
        inputs: As for `call_model`; one small batch is enough.
        meter: A counter that is read before and after each function, for example of its arithmetic.

    Raises:
        ArgumentTypeError: The inputs hold no tensor.
    """
    if not tensors_of(split_inputs(inputs)):
        raise ArgumentTypeError(
            f"the example inputs, of type {type(inputs).__name__}, hold no tensor.",
            "pass one batch: a tensor, (inputs, labels), a dictionary of keyword arguments, or qdq.Labelled.",
        )
    recorder = _Recorder(model, meter or (lambda: 0))
    handles = [
        hooks.register_module_forward_pre_hook(recorder.enter),
        hooks.register_module_forward_hook(recorder.leave, with_kwargs=True),
    ]
    try:
        with evaluating(model), recorder:
            outputs = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
            # torch leaves the number here, and would pass keyword arguments to a later hook with the same number.
            hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)
    return recorder.finish(outputs)


@dataclass(frozen=True)
class _Running:
    """A module that runs.

    Args:
        module: Dotted name.
        index: Position of its run in the trace.
        moment: How many tensors had numbers when it started.
    """

    module: str
    index: int
    moment: int


class _Recorder(TorchFunctionMode):
    """Sees every torch function (as a mode) and every module call (as global hooks).

    Args:
        model: The model that runs.
        meter: As for `trace_forward`.
    """

    def __init__(self, model: nn.Module, meter: Callable[[], int]) -> None:
        super().__init__()
        self._meter = meter
        self._names = {id(module): name for name, module in model.named_modules()}
        # The running modules, innermost last, and for each of them the number of calls of each function.
        self._stack: list[_Running] = []
        self._counters: list[Counter[str]] = [Counter()]
        # Tensors are identified by `id`. They stay in memory, so that no `id` is used twice.
        self._numbers: dict[int, list[int]] = {}
        self._numbered: list[torch.Tensor] = []
        self._makers: dict[int, str] = {}  # tensor -> module that returned it
        self._outputs: list[torch.Tensor] = []
        self._last_input: dict[str, int] = {}  # module -> tensor that another module returned
        # Module -> readers of its output.
        self._readers: defaultdict[str, set[str]] = defaultdict(set)
        self._trace = ForwardTrace()

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that a module starts to run; a hook before its forward."""
        name = self._names.get(id(module))
        if name is None:
            return
        tensors = tensors_of(args)
        caller = self._stack[-1].module if self._stack else None
        inputs = self._number_all(tensors)
        self._stack.append(_Running(name, len(self._trace.runs), len(self._numbered)))
        self._trace.runs.append(ModuleRun(name, caller, inputs))
        self._counters.append(Counter())
        self._trace.calls[name] += 1
        self._note_inputs(name, tensors)

    def _note_inputs(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Note which tensors that modules made a module gets."""
        for tensor in tensors:
            if id(tensor) in self._makers:
                self._last_input[name] = id(tensor)

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note that a module has run; a hook after its forward. Only this one gets the keyword arguments."""
        name = self._names.get(id(module))
        if name is None:
            return
        running = self._stack.pop()
        self._counters.pop()
        tensors = tensors_of(kwargs)
        numbers = tuple(self._number_at(tensor, running.moment) for tensor in tensors)
        run = self._trace.runs[running.index]
        outputs = self._number_all(tensors_of(output))
        inputs = (*run.inputs, *numbers)
        self._trace.runs[running.index] = replace(run, inputs=inputs, outputs=outputs)
        self._note_inputs(name, tensors)
        if not isinstance(output, torch.Tensor):
            return
        is_leaf = next(module.children(), None) is None
        if is_leaf or id(output) not in self._makers:
            self._makers[id(output)] = name
            self._outputs.append(output)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function and record it."""
        kwargs = kwargs or {}
        arguments = tensors_of((args, kwargs))
        inputs = self._number_all(arguments)  # before the call may change one in place
        function = name_function(func)
        index = self._counters[-1][function]
        self._counters[-1][function] += 1
        reading = self._meter()
        result = func(*args, **kwargs)
        metered = self._meter() - reading

        changed = arguments[:1] if function == "setitem" else tensors_of(result)
        if not changed:  # a size or a flag: the values are not read
            return result
        module = self._innermost()
        self._record_readers(module, function, arguments)
        outputs = tuple(self._renumber(tensor) for tensor in changed)
        constants = _list_constants(args, kwargs)
        operation = Operation(
            module, function, index, inputs, outputs, constants, metered, _is_foreign(func)
        )
        self._trace.operations.append(operation)
        return result

    def _innermost(self) -> str:
        """The innermost running module; "" for the model itself or for code outside of it."""
        return self._stack[-1].module if self._stack else ""

    def _record_readers(self, module: str, function: str, arguments: list[torch.Tensor]) -> None:
        """Note whose output a module reads, and the memory that its products read.

        Args:
            module: Dotted name of the module that calls a function.
            function: Name of the function.
            arguments: The tensors among its arguments.
        """
        for tensor in arguments:
            if id(tensor) in self._makers:
                self._readers[self._makers[id(tensor)]].add(module)
        if function in CONTRACTIONS:
            storages = frozenset(tensor.untyped_storage().data_ptr() for tensor in arguments)
            self._trace.contractions.append(Contraction(module, function, storages))

    def _number_all(self, tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
        """The numbers of tensors, in order."""
        return tuple(self._number(tensor) for tensor in tensors)

    def _number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor; a new one if it has none."""
        numbers = self._numbers.get(id(tensor))
        return numbers[-1] if numbers else self._renumber(tensor)

    def _number_at(self, tensor: torch.Tensor, moment: int) -> int:
        """The number that a tensor had at a moment: a later change in place gives it another.

        Args:
            tensor: The tensor.
            moment: How many numbers there were.
        """
        numbers = self._numbers.get(id(tensor)) or [self._renumber(tensor)]
        earlier = [number for number in numbers if number <= moment]
        return earlier[-1] if earlier else numbers[0]

    def _renumber(self, tensor: torch.Tensor) -> int:
        """A number that no tensor has had."""
        self._numbered.append(tensor)
        number = len(self._numbered)
        self._numbers.setdefault(id(tensor), []).append(number)
        self._trace.shapes[number] = tuple(tensor.shape)
        return number

    def finish(self, outputs: Any) -> ForwardTrace:
        """The record, once the model has run.

        Args:
            outputs: The outputs of the model.
        """
        returned = tensors_of(outputs)
        runs_of_model = [run for run in self._trace.runs if run.caller is None]
        if runs_of_model:
            self._trace.inputs = runs_of_model[0].inputs
        self._trace.outputs = self._number_all(returned)
        identities = {id(tensor) for tensor in returned}
        for identity, name in self._makers.items():
            readers = self._readers[name]
            if len(readers) != 1 or identity in identities or self._trace.calls[name] != 1:
                continue
            (reader,) = readers
            if self._last_input.get(reader) == identity:
                self._trace.only_reader[name] = reader
        return self._trace


def _list_constants(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without tensors, by their position or keyword as text."""
    constants: dict[str, Any] = {}
    for key, value in (*enumerate(args), *kwargs.items()):
        if not tensors_of(value):
            constants[str(key)] = value
    return constants


def name_function(func: Callable[..., Any]) -> str:
    """One name for the operator, the function, the method and the in-place method.

    Args:
        func: A function as `__torch_function__` gets it, or an overload of an operator.
    """
    name = str(getattr(func, "__name__", None) or resolve_name(func) or "")
    if name == "__get__":  # of an attribute such as `Tensor.T`
        attribute = getattr(func, "__self__", None)
        name = str(getattr(attribute, "__name__", name))
    name = name.partition(".")[0].strip("_")  # torch.ops.aten.mm.default
    return ALIASES.get(name, name)


def _is_foreign(func: Callable[..., Any]) -> bool:
    """Whether a function is a registered operator that is not torch's own, such as `torchvision::nms`."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace not in _OWN_NAMESPACES
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.partition("::")[0] not in _OWN_NAMESPACES
    return False


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first tensor: `add_`, `__iadd__`.

    Args:
        func: As for `name_function`.
    """
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    if name.endswith("__"):
        return name.startswith("__i")
    return name.endswith("_")
