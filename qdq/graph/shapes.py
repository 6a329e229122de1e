"""Fill in the shapes and types that onnx can infer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qdq.graph.edits import is_needed


@contextmanager
def silence_onnx_ir() -> Iterator[None]:
    """Keep onnx-ir from logging what is unusual in a file, because the rules of `qdq check` report it."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def complete_shapes(model: ir.Model, *, data_prop: bool = True) -> None:
    """Infer shapes and types, in place, if a needed one is missing.

    Args:
        model: The model.
        data_prop: Also follow the values of shape computations (`infer_shapes`).
    """
    for node in model.graph:
        if any(_lacks_type(output) for output in node.outputs):
            infer_shapes(model, data_prop=data_prop)
            return


def _lacks_type(value: ir.Value) -> bool:
    """Whether a value that is needed has no type or no shape yet.

    A value that nothing reads, such as an optional output, does not need them.
    """
    is_complete = value.dtype is not None and value.shape is not None
    return not is_complete and is_needed(value)


def infer_shapes(model: ir.Model, *, data_prop: bool = True) -> None:
    """Infer shapes and types, in place; those that onnx cannot infer do not change, without an error.

    Args:
        model: The model.
        data_prop: Also follow the values of shape computations.
    """
    graph = model.graph
    inputs = list(graph.inputs)
    initializers = list(graph.initializers.values())
    constants = [value.const_value for value in initializers]
    try:
        with silence_onnx_ir():  # it logs a traceback if inference fails
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=data_prop)(model)
    except Exception:
        # If a constant cannot be written, the pass has turned all of them into inputs.
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        for value, constant in zip(initializers, constants, strict=True):
            value.const_value = constant
            if constant is not None:
                graph.register_initializer(value)
