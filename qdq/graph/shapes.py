"""Shapes and types that onnx can infer, filled in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


@contextmanager
def silence_onnx_ir() -> Iterator[None]:
    """Keep onnx-ir from logging what is unusual in a file: the rules of `qdq check` say it."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def complete_shapes(model: ir.Model, *, data_prop: bool = True) -> None:
    """Infer shapes and types, in place, if any is not written down; see `infer_shapes`."""
    values = [
        value
        for node in model.graph
        for value in node.outputs
        if value.uses() or value.is_graph_output()
    ]
    if not all(value.dtype is not None and value.shape is not None for value in values):
        infer_shapes(model, data_prop=data_prop)


def infer_shapes(model: ir.Model, *, data_prop: bool = True) -> None:
    """Infer shapes and types, in place; where onnx cannot tell them, they stay as they are, without a word.

    Args:
        model: The model.
        data_prop: Also follow the values of shape computations.
    """
    graph = model.graph
    inputs, initializers = list(graph.inputs), list(graph.initializers.values())
    constants = [value.const_value for value in initializers]
    try:
        with silence_onnx_ir():  # it logs a traceback where inference fails
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=data_prop)(model)
    except (
        Exception
    ):  # a constant that cannot be written: the pass has then made inputs of all of them
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        for value, constant in zip(initializers, constants, strict=True):
            value.const_value = constant
            if constant is not None:
                graph.register_initializer(value)
