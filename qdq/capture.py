"""A model captured as an ONNX graph, with a number in the place of each scale that says whose quantizer it is.

Names in a captured graph are text that torch writes: the modules around a node, as far as torch has seen them. They are
wrong or missing where a forward is set on the instance, where a region switches autocast or gradients, or where the
model is a `torch.fx.GraphModule`. So while the model is captured each quantizer has a range that only stands for it; no
two are alike, and whatever the exporter does to the graph, the scale of a Q still says which quantizer made it.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils._pytree import tree_map

from qdq.errors import ExportError
from qdq.graph.names import QuantizerScale
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.trace import evaluating, unwrap_compiled

_MARK_UNIT = 2.0**60  # no range of a real tensor; times a number of 17 bits and 127 it is exact in float32


@dataclass(frozen=True)
class CapturedGraph:
    """What torch made of a model.

    Args:
        graph: The ONNX model; its Q and DQ have marks for scales.
        scales: Mark -> the quantizer that it stands for, of all that were enabled.
        ran: Names of the quantizers that quantized something while the model was captured.
    """

    graph: ir.Model
    scales: Mapping[float, QuantizerScale]
    ran: frozenset[str]


def capture_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int, *, dynamic_batch: bool
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
    try:
        signature = _sign_call(model, args, kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        dynamic_shapes = tree_map(_batch_of, dict(arguments)) if dynamic_batch else None
        with _quiet(), evaluating(model), _marked(model) as marks:
            program = torch.onnx.export(
                _as_root(model, signature),
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds here
        raise ExportError(
            f"torch.export cannot capture the model: {_summarize(error.__cause__ or error)}",
            "change the forward as torch says, or try dynamic_batch=False if it names a dimension.",
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing.", "update torch to 2.11 or newer.")
    scales = {mark.scale: _scale_of(mark) for mark in marks}
    ran = frozenset(mark.name for mark in marks if mark.has_run)
    return CapturedGraph(program.model, scales, ran)


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
        return torch.full(shape, self.scale * self.quantizer.format.qmax, dtype=torch.float32, device=inputs.device)


@contextmanager
def _marked(model: nn.Module) -> Iterator[list[_Mark]]:
    """Give each enabled quantizer a range that tells it from all others."""
    enabled = [(name, quantizer) for name, quantizer in named_quantizers(model) if not quantizer._disabled]
    marks = [_Mark(name, quantizer, number) for number, (name, quantizer) in enumerate(enabled, 1)]
    try:
        for mark in marks:
            vars(mark.quantizer)["_range_for"] = mark
        yield marks
    finally:
        for mark in marks:
            vars(mark.quantizer).pop("_range_for", None)


def _scale_of(mark: _Mark) -> QuantizerScale:
    scale = mark.quantizer.scale.detach().cpu()
    is_per_tensor = scale.numel() == 1  # a scale of shape [1] costs TensorRT-RTX the int8 kernel (R-SHAPE)
    return QuantizerScale(mark.name, scale.reshape(() if is_per_tensor else -1).numpy())


def _as_root(model: nn.Module, signature: inspect.Signature) -> nn.Module:
    """A module that has all the model has and calls it: with its hooks, its own `__call__`, whatever its forward is.

    torch runs a `GraphModule` that it is given node by node, and its forward is then never called.
    """
    called = _unwrap(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return called(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]  # names the inputs of the graph
    body = {
        "__call__": lambda _, *args, **kwargs: call(*args, **kwargs),
        "forward": property(lambda _: call),
        "training": False,  # a compiled module has none of its own
    }
    root: nn.Module = object.__new__(type("Root", (nn.Module,), body))
    root.__dict__ = vars(model)
    return root


def _unwrap(model: nn.Module) -> nn.Module:
    """What a wrapper calls that torch.export does not follow: of `torch.compile`, and of training in processes."""
    model = unwrap_compiled(model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _sign_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.Signature:
    """The arguments of one call, each a parameter of its own, also where the forward takes `*args` or `**kwargs`."""
    names = [*_name_positional(model, len(args)), *kwargs]
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(args) + [inspect.Parameter.KEYWORD_ONLY] * len(kwargs)
    return inspect.Signature([inspect.Parameter(name, kind) for name, kind in zip(names, kinds, strict=True)])


def _name_positional(model: nn.Module, count: int) -> list[str]:
    """The names that the forward gives its first arguments; `args_0` for the first of `*args`."""
    names: list[str] = []
    for parameter in inspect.signature(_unwrap(model).forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from printing steps and from warning about its own future; an error says enough."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _batch_of(value: Any) -> dict[int, str] | None:
    """The dynamic dimension of one input, by name; None for flags and scalars."""
    return {0: "batch"} if isinstance(value, torch.Tensor) and value.dim() else None


def _summarize(error: BaseException) -> str:
    """The beginning of a long message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."
