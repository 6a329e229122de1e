"""A model captured as an ONNX graph, with a number in the place of each scale that says whose quantizer it is.

Names in a captured graph are text that torch writes: the modules around a node, as far as torch has seen them. They are
wrong or missing where a forward is set on the instance, where a region switches autocast or gradients, or where the
model is a `torch.fx.GraphModule`. So while the model is captured each quantizer has a range that only stands for it; no
two are alike, and whatever the exporter does to the graph, the scale of a Q still says which quantizer made it.
"""

from __future__ import annotations

import enum
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qdq.errors import ExportError
from qdq.forward import evaluating, make_identifiers, name_leaves, unwrap_compiled
from qdq.graph.names import QuantizerScale
from qdq.quantize import compute_scale
from qdq.quantizer import TensorQuantizer, named_quantizers
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
_MARK_UNIT = (
    2.0**60
)  # no range of a real tensor; times a number of 17 bits and 127 it is exact in float32


@dataclass(frozen=True)
class CapturedGraph:
    """What torch made of a model.

    Args:
        graph: The ONNX model; its Q and DQ have marks for scales.
        names: Of the tensors of the example, in order; the graph has no input for one that it does not read.
        scales: Mark -> the quantizer that it stands for, of all that were enabled.
        ran: Names of the quantizers that quantized something while the model was captured.
    """

    graph: ir.Model
    names: tuple[str, ...]
    scales: Mapping[float, QuantizerScale]
    ran: frozenset[str]


def capture_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int,
    *,
    dynamic_batch: bool,
) -> CapturedGraph:
    """Capture a model whose quantizers have ranges; they and the model are left as they were.

    Args:
        model: Any module that can be called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        opset: The opset that torch writes.
        dynamic_batch: Leave the first dimension of every tensor open.

    Raises:
        ExportError: torch cannot capture the model.
    """
    call = _describe_call(_unwrap(model), args, kwargs)
    tensors = call.tensors
    dimensions = [{0: "batch"} if tensor.dim() else None for tensor in tensors.values()]
    dynamic_shapes = dict(zip(call.parameters, dimensions, strict=True))
    try:
        with _quiet(), _inference_as_made(model), evaluating(model), _marked(model) as marks:
            program = torch.onnx.export(
                _as_root(model, call),
                tuple(tensors.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes if dynamic_batch else None,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds here
        raise ExportError(
            f"torch.export cannot capture the model: {_summarize(error.__cause__ or error)}",
            _advise(model),
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing.", "update torch to 2.11 or newer.")
    if not program.model.graph.outputs:
        raise ExportError(
            f"the model returns no tensor: {', '.join(call.left_out) or 'nothing'}.",
            "export a module that returns some.",
        )
    if call.left_out:
        logger.warning(
            "outputs that are no tensors are not in the file: %s", ", ".join(call.left_out)
        )
    names = dict(zip(call.parameters, tensors, strict=True))
    for value in program.model.graph.inputs:
        value.name = names.get(str(value.name), value.name)
    scales = {mark.scale: _scale_of(mark) for mark in marks}
    ran = frozenset(mark.name for mark in marks if mark.has_run)
    return CapturedGraph(program.model, tuple(tensors), scales, ran)


def _advise(model: nn.Module) -> str:
    """What to do about a model that torch cannot capture."""
    parametrized = [
        name or "the model" for name, module in model.named_modules() if is_parametrized(module)
    ]
    if parametrized:  # torch speaks of operators that no forward calls
        return (
            f"{list_names(parametrized, 5)} compute parameters from others: call "
            "torch.nn.utils.parametrize.remove_parametrizations there, before swap_modules."
        )
    return "change the forward as torch says, or try dynamic_batch=False if it names a dimension."


def _inference_as_made(model: nn.Module) -> torch.inference_mode:
    """Inference mode for a model whose tensors were made there: torch refuses to capture it elsewhere."""
    is_made_there = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    return torch.inference_mode(is_made_there or torch.is_inference_mode_enabled())


class _Mark:
    """Stands for `TensorQuantizer._range_for` while a model is captured.

    Args:
        name: Dotted name of the quantizer.
        quantizer: The quantizer.
        number: From 1; no other quantizer of the model has it.
    """

    def __init__(self, name: str, quantizer: TensorQuantizer, number: int) -> None:
        self.name = name
        self.quantizer = quantizer
        self.scale = number * _MARK_UNIT
        self.has_run = False

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.has_run = True
        amax = self.quantizer.amax
        shape = () if amax is None else amax.shape
        return torch.full(
            shape,
            self.scale * self.quantizer.format.qmax,
            dtype=torch.float32,
            device=inputs.device,
        )


@contextmanager
def _marked(model: nn.Module) -> Iterator[list[_Mark]]:
    """Give each enabled quantizer a range that tells it from all others."""
    enabled = [
        (name, quantizer) for name, quantizer in named_quantizers(model) if quantizer.is_enabled
    ]
    marks = [_Mark(name, quantizer, number) for number, (name, quantizer) in enumerate(enabled, 1)]
    try:
        for mark in marks:
            vars(mark.quantizer)["_range_for"] = mark
        yield marks
    finally:
        for mark in marks:
            vars(mark.quantizer).pop("_range_for", None)


def _scale_of(mark: _Mark) -> QuantizerScale:
    amax = mark.quantizer.amax
    assert amax is not None  # noqa: S101  # export_onnx has looked
    scale = (
        compute_scale(amax, mark.quantizer.format).detach().cpu()
    )  # `scale` has another meaning in qdq.compat
    is_per_tensor = (
        scale.numel() == 1
    )  # a scale of shape [1] costs TensorRT-RTX the int8 kernel (R-SHAPE)
    return QuantizerScale(mark.name, scale.reshape(() if is_per_tensor else -1).numpy())


class _Call:
    """The call of a model on its example, as a function of the tensors alone, each with a name.

    Flags and texts among the arguments are those of the example. Of what the model returns the tensors are left.

    Args:
        model: What is called.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        ExportError: An argument that is neither a tensor nor a constant.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._leaves, self._structure = tree_flatten((args, kwargs))
        named = name_leaves(
            dict(zip(_name_positional(model, len(args)), args, strict=True)) | kwargs
        )
        for name, leaf in named.items():
            _require_constant(name, leaf)
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in self._leaves]
        self.tensors = {
            name: leaf for name, leaf in named.items() if isinstance(leaf, torch.Tensor)
        }
        self.parameters = make_identifiers(name.lower() for name in self.tensors)
        """The names of the tensors as torch writes them, in small letters."""
        self.left_out: list[str] = []

    @property
    def signature(self) -> inspect.Signature:
        """One parameter for each tensor."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.parameters])

    def __call__(self, *tensors: torch.Tensor) -> Any:
        remaining = iter(tensors)
        leaves = [
            next(remaining) if is_tensor else leaf
            for leaf, is_tensor in zip(self._leaves, self._is_tensor, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self._structure)
        outputs = tree_leaves(self._model(*args, **kwargs))
        others = [
            (index, leaf)
            for index, leaf in enumerate(outputs)
            if not isinstance(leaf, torch.Tensor)
        ]
        self.left_out = [
            f"number {index} ({type(leaf).__name__})" for index, leaf in others if leaf is not None
        ]
        return tuple(leaf for leaf in outputs if isinstance(leaf, torch.Tensor))


def _describe_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    try:
        return _Call(model, args, kwargs)
    except (
        ValueError
    ) as error:  # more arguments than the forward has; a container that torch cannot take apart
        raise ExportError(
            f"the example inputs cannot be named: {_summarize(error)}.",
            "give tensors, in lists, tuples and dictionaries, as the forward takes them.",
        ) from error


def _require_constant(name: str, leaf: Any) -> None:
    if not isinstance(leaf, torch.Tensor | _CONSTANTS):
        raise ExportError(
            f"the argument {name} is a {type(leaf).__name__}; expected tensors, numbers and texts, in lists, tuples "
            "and dictionaries.",
            "wrap the model in a module whose forward takes tensors and makes that argument of them.",
        )


def _as_root(model: nn.Module, call: _Call) -> nn.Module:
    """A module that has all the model has and calls it: with its hooks, its own `__call__`, whatever its forward is.

    torch runs a `GraphModule` that it is given node by node, and its forward is then never called.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*call.signature.bind(*args, **kwargs).args)

    forward.__signature__ = call.signature  # type: ignore[attr-defined]  # names the inputs of the graph
    body = {
        "__call__": lambda _, *args, **kwargs: forward(*args, **kwargs),
        "forward": property(lambda _: forward),
        # torch looks up there where a module stands that runs, and the model runs
        "named_modules": lambda _, *args, **kwargs: model.named_modules(*args, **kwargs),
        "training": False,  # a compiled module has none of its own
    }
    root: nn.Module = object.__new__(type("Root", (nn.Module,), body))
    root.__dict__ = vars(model)
    return root


def _unwrap(model: nn.Module) -> nn.Module:
    """What a wrapper calls that torch.export does not follow: of `torch.compile`, and of training in processes."""
    model = unwrap_compiled(model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _name_positional(model: nn.Module, count: int) -> list[str]:
    """The names that the forward gives its first arguments; `args_0` for the first of `*args`."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
    return names[:count]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from printing steps and from warning about its own future; an error says enough."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _summarize(error: BaseException) -> str:
    """The beginning of a long message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."
