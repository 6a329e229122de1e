"""Captures a model as an ONNX graph in which each scale identifies its quantizer.

torch names each node after the modules around it, as far as it has seen them. These names are wrong or missing where a
forward is set on the instance, where a region switches autocast or gradients, or where the model is a
`torch.fx.GraphModule`. So each quantizer has a unique scale, its mark, while the model is captured (`qdq.marks`). The
scale of a Q then identifies its quantizer, whatever the exporter does to the graph.
"""

from __future__ import annotations

import enum
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from qdq.batch import map_tensors
from qdq.caches import forgetting_calls
from qdq.detector import is_detector
from qdq.dynamic import Dimensions, Dynamic, change_sizes, name_dimensions, repeat_single
from qdq.errors import ExportError
from qdq.forward import evaluating, make_identifiers, name_leaves, unwrap_compiled
from qdq.graph.expand_marks import ExpandMarks
from qdq.graph.names import QuantizerScale
from qdq.marks import TRANSLATIONS, Mark, marked
from qdq.outputs import name_other_outputs, name_outputs
from qdq.quantize import compute_scale
from qdq.text import list_names

logger = logging.getLogger(__name__)

_CONSTANTS = (
    bool
    | int
    | float
    | complex
    | str
    | bytes
    | None
    | torch.dtype
    | torch.device
    | torch.layout
    | torch.memory_format
    | enum.Enum
)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_MOST_OF_AN_ERROR = 400  # characters


@dataclass(frozen=True)
class CapturedGraph:
    """The ONNX graph of a model.

    Args:
        graph: The ONNX model; its Q and DQ have marks as scales.
        names: Names of the example's tensors, in order; the graph has no input for a tensor that it does not read.
        scales: Mark -> its quantizer, for all quantizers that were enabled.
        ran: Names of the quantizers that quantized a tensor while the model was captured.
        dimensions: The dynamic dimensions of each input.
    """

    graph: ir.Model
    names: tuple[str, ...]
    scales: Mapping[float, QuantizerScale]
    ran: frozenset[str]
    dimensions: Dimensions


def capture_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int,
    *,
    dynamic_batch: bool,
    dynamic: Dynamic | None = None,
) -> CapturedGraph:
    """Capture a model whose quantizers have ranges; they and the model do not change.

    A dynamic dimension gets a size that it did not have in the call before, so that a shape that the model keeps from
    call to call does not fix it.

    Args:
        model: Any module that can be called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        opset: The opset that torch writes.
        dynamic_batch: Make the first dimension of every tensor dynamic.
        dynamic: Further dynamic dimensions, see `dynamic.name_dimensions`.

    Raises:
        ArgumentError: Dynamic dimensions that the inputs do not have.
        ArgumentTypeError: `dynamic` of another form.
        ExportError: torch cannot capture the model.
    """
    call = _describe_call(_unwrap(model), args, kwargs)
    dimensions = name_dimensions(call.tensors, dynamic, has_batch=dynamic_batch)
    call.tensors = repeat_single(call.tensors, dimensions)
    with (
        forgetting_calls(model, _list_other_calls(call, dimensions)) as list_changed,
        marked(model) as marks,
    ):
        program = _run_export(model, call, opset, dimensions, list_changed)
    if program is None:
        raise ExportError("torch.onnx.export returned nothing.", "update torch to 2.11 or newer.")
    ExpandMarks()(program.model)
    left_out = ", ".join(call.left_out)
    if not program.model.graph.outputs:
        raise ExportError(
            f"the model returns no tensor: {left_out or 'nothing'}.",
            "export a module that returns tensors.",
        )
    if left_out:
        logger.warning("outputs that are not tensors are left out of the file: %s", left_out)

    names = dict(zip(call.parameters, call.tensors, strict=True))
    inputs = program.model.graph.inputs
    if len(inputs) == len(call.tensors):  # torch renames an input that the model returns
        names = dict(zip([str(value.name) for value in inputs], call.tensors, strict=True))
    for value in inputs:
        value.name = names.get(str(value.name), value.name)
    _name_graph_outputs(program.model.graph, call.outputs)
    scales = {mark.scale: _scale_of(mark) for mark in marks}
    ran = frozenset(mark.name for mark in marks if mark.has_run)
    return CapturedGraph(program.model, tuple(call.tensors), scales, ran, dimensions)


def _list_other_calls(call: _Call, dimensions: Dimensions) -> list[Callable[[], Any]]:
    """Calls with other sizes in all dynamic dimensions, then in the batch alone; none if all sizes are fixed."""
    if not any(dimensions.values()):
        return []
    calls: list[Callable[[], Any]] = []
    for only_batch in (False, True):
        changed = change_sizes(call.tensors, dimensions, only_batch=only_batch)
        calls.append(partial(call, *changed.values()))
    return calls


def _name_graph_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give the outputs of a graph their names; one with the name of an input gets a number.

    Args:
        graph: The graph, which changes.
        names: One for each output, in order.
    """
    taken = {str(value.name) for value in graph.inputs}
    named: list[ir.Value] = []
    for index, (output, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        is_shared = output in named or output.producer() is None
        if is_shared:  # an input that is returned as it is, or one tensor under two names
            copy = ir.node("Identity", [output])
            copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
            graph.append(copy)
            graph.outputs[index] = output = copy.outputs[0]
        named.append(output)
        output.name = _number_until_free(name, taken)
        taken.add(output.name)
    inner = [value for node in graph for value in node.outputs]
    others = [value for value in (*graph.initializers.values(), *inner) if value not in named]
    used = taken | {str(value.name) for value in others}
    for value in others:
        if value.name in taken:
            value.name = _number_until_free(str(value.name), used)
            used.add(value.name)


def _number_until_free(name: str, taken: Collection[str]) -> str:
    """A name, with the first number that makes it unique if it is taken."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _run_export(
    model: nn.Module,
    call: _Call,
    opset: int,
    dimensions: Dimensions,
    list_changed: Callable[[], list[str]],
) -> torch.onnx.ONNXProgram | None:
    """Have torch export a model.

    Args:
        model: The model.
        call: Its call on the example.
        opset: The opset that torch writes.
        dimensions: The dynamic dimensions of each input.
        list_changed: Lists what the model keeps from call to call.

    Raises:
        ExportError: torch cannot capture it.
    """
    dynamic_shapes = None
    if any(dimensions.values()):
        axes = [dict(axes) or None for axes in dimensions.values()]
        dynamic_shapes = dict(zip(call.parameters, axes, strict=True))
    try:
        with _quiet(), _inference_as_made(model), evaluating(model):
            return torch.onnx.export(
                _as_root(model, call),
                tuple(call.tensors.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # torch raises many types here
        raise ExportError(
            f"torch.export cannot capture the model: {_summarize(error.__cause__ or error)}",
            _advise(model, call, list_changed()),
        ) from error


def _advise(model: nn.Module, call: _Call, kept: list[str]) -> str:
    """The fix for a model that torch cannot capture.

    Args:
        model: The model.
        call: Its call on the example.
        kept: The attributes in which it keeps tensors or shapes of its last call.
    """
    if is_detector(model):
        return (
            "the boxes that NMS leaves depend on the data. split = qdq.split_detector(model); quantize and export "
            "split.core; split.postprocess(outputs, images) gives the detections."
        )
    if _calls_suppression(model, call):
        return (
            "the boxes that NMS leaves depend on the data: export a module that returns the outputs of backbone and "
            "head, and call NMS on them outside of it."
        )
    if getattr(getattr(model, "config", None), "use_cache", False):
        return (
            "set model.config.use_cache = False: the model returns the keys and values of its attention in an object "
            "of transformers. If that is not the reason, change the forward as torch says."
        )
    parametrized = []
    for name, module in model.named_modules():
        if is_parametrized(module):
            parametrized.append(name or "the model")
    if parametrized:  # torch's message names operators that no forward calls
        return (
            f"{list_names(parametrized, 5)} compute parameters from others: call "
            "torch.nn.utils.parametrize.remove_parametrizations there, before swap_modules."
        )
    fix = "change the forward as torch says, or try dynamic_batch=False if it names a dimension."
    if kept:
        fix += (
            f" The forward keeps {list_names(kept, 5)} from call to call: have it compute them anew in every call, or "
            "keep them in buffers of fixed size."
        )
    return fix


def _calls_suppression(model: nn.Module, call: _Call) -> bool:
    """Whether a forward calls the NMS of torchvision."""
    watch = _OperatorWatch()
    with evaluating(model), watch, suppress(Exception):  # torch has said why it cannot be captured
        call(*call.tensors.values())
    return any("nms" in name for name in watch.names)


class _OperatorWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _inference_as_made(model: nn.Module) -> torch.inference_mode:
    """Inference mode if the model's tensors were made in it: torch refuses to capture such a model outside of it."""
    tensors = (*model.parameters(), *model.buffers())
    is_made_there = any(tensor.is_inference() for tensor in tensors)
    return torch.inference_mode(is_made_there or torch.is_inference_mode_enabled())


def _scale_of(mark: Mark) -> QuantizerScale:
    """The true scale of the quantizer that has this mark."""
    amax = mark.quantizer.amax
    assert amax is not None  # noqa: S101  # export_onnx has checked
    # Not the attribute `scale`, which has another meaning in qdq.compat.
    scale = compute_scale(amax, mark.quantizer.format).detach().cpu()
    # A scale of shape [1] costs TensorRT-RTX the int8 kernel (R-SHAPE).
    shape = () if scale.numel() == 1 else (-1,)
    return QuantizerScale(mark.name, scale.reshape(shape).numpy())


class _Call:
    """The call of a model on its example, as a function of its named tensors only.

    All other arguments, such as flags and strings, keep their values. Results that are not tensors are left out.

    Args:
        model: The model that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Attributes:
        tensors: The tensors among the arguments, by name.
        parameters: The names of these tensors as torch writes them, in lower case.
        outputs: Names of the tensors that the last call returned.
        left_out: The results of the last call that are not tensors, for a message.

    Raises:
        ExportError: An argument is neither a tensor nor a constant.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._arguments = (args, kwargs)
        names = _name_positional(model, len(args))
        arguments = {**dict(zip(names, args, strict=True)), **kwargs}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, leaf in name_leaves(arguments).items():
            _require_constant(name, leaf)
            if isinstance(leaf, torch.Tensor):
                self.tensors[name] = leaf
        self.parameters = make_identifiers(name.lower() for name in self.tensors)
        self.outputs: list[str] = []
        self.left_out: list[str] = []

    @property
    def signature(self) -> inspect.Signature:
        """One parameter for each tensor, named as torch writes it."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.parameters])

    def __call__(self, *tensors: torch.Tensor) -> Any:
        remaining = iter(tensors)
        args, kwargs = map_tensors(lambda _: next(remaining), self._arguments)
        results = self._model(*args, **kwargs)
        others = name_other_outputs(results)
        self.left_out = [f"{name} ({kind})" for name, kind in others.items()]
        outputs = name_outputs(results)
        self.outputs = list(outputs)
        return tuple(outputs.values())


def _describe_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    try:
        return _Call(model, args, kwargs)
    except ValueError as error:
        # More arguments than the forward has, or a container that torch cannot flatten.
        raise ExportError(
            f"the example inputs cannot be named: {_summarize(error)}.",
            "give tensors, in lists, tuples and dictionaries, as the forward takes them.",
        ) from error


def _require_constant(name: str, leaf: Any) -> None:
    """Refuse an argument that cannot be captured.

    Args:
        name: Its name, for the message.
        leaf: The argument, or a part of one.

    Raises:
        ExportError: It is neither a tensor nor a constant.
    """
    if not isinstance(leaf, torch.Tensor | _CONSTANTS):
        raise ExportError(
            f"the argument {name} is a {type(leaf).__name__}; expected tensors, numbers and strings, in lists, tuples "
            "and dictionaries.",
            "wrap the model in a module whose forward takes tensors and builds that argument from them.",
        )


def _as_root(model: nn.Module, call: _Call) -> nn.Module:
    """A module with the attributes of the model that calls the model, with its hooks and its own `__call__`.

    torch runs a `GraphModule` node by node if it is the root, and its forward is then never called.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*call.signature.bind(*args, **kwargs).args)

    forward.__signature__ = call.signature  # type: ignore[attr-defined]  # names the inputs of the graph
    body = {
        "__call__": lambda _, *args, **kwargs: forward(*args, **kwargs),
        "forward": property(lambda _: forward),
        # torch looks up the names of running modules there, and it is the model that runs
        "named_modules": lambda _, *args, **kwargs: model.named_modules(*args, **kwargs),
        "training": False,  # a compiled module has none of its own
    }
    root: nn.Module = object.__new__(type("Root", (nn.Module,), body))
    root.__dict__ = vars(model)
    return root


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside a wrapper that torch.export does not follow, from `torch.compile` or parallel training."""
    model = unwrap_compiled(model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        wrapped: nn.Module = model.module
        return wrapped
    return model


def _name_positional(model: nn.Module, count: int) -> list[str]:
    """The names that the forward gives its first arguments; `args_0` for the first of `*args`."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in _POSITIONAL:
            names.append(parameter.name)
    return names[:count]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress output and deprecation warnings of torch's exporter; errors are still raised."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _summarize(error: BaseException) -> str:
    """The beginning of the message of an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _MOST_OF_AN_ERROR:
        return text
    return f"{text[:_MOST_OF_AN_ERROR]} ..."
