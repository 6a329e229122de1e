"""An ONNX file, read and looked at by `onnx.checker`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qdq.check.parity import require_file
from qdq.errors import CheckError

_LARGEST_FILE = 2**31  # protobuf, and with it shape inference, ends here


@dataclass(frozen=True)
class LoadedModel:
    """What `load_onnx` returns.

    Args:
        model: The graph.
        type_error: What shape and type inference refuses, None if nothing.
    """

    model: ir.Model
    type_error: str | None


def load_onnx(path: Path) -> LoadedModel:
    """Read a file and have `onnx.checker` look at it.

    Types and shapes that contradict each other are not raised here: a rule may say it better (QDQ107).

    Raises:
        CheckError: The file is missing, empty, truncated, or no ONNX.
    """
    require_file(path)
    type_error = None
    try:
        try:
            onnx.checker.check_model(str(path), full_check=path.stat().st_size < _LARGEST_FILE)
        except onnx.shape_inference.InferenceError as error:
            type_error = describe(error)
            onnx.checker.check_model(str(path))
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx-ir each have their own
        raise invalid(path, describe(error)) from error
    if not len(model.graph):
        raise CheckError(f"{path} holds no ONNX graph.", "export it again: the file may be empty or truncated.")
    return LoadedModel(model, type_error)


def invalid(path: Path, reason: str) -> CheckError:
    """The error of a file that is no valid ONNX."""
    return CheckError(f"{path} is no valid ONNX file: {reason}", "export it again.")


def infer_shapes(model: ir.Model) -> None:
    """Fill in shapes and types where the file does not write them down and onnx can tell."""
    values = [value for node in model.graph for value in node.outputs if value.uses() or value.is_graph_output()]
    if all(value.dtype is not None and value.shape is not None for value in values):
        return
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it cannot tell, rules do not need
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.setLevel(level)


def describe(error: Exception) -> str:
    """The first line of an error that has any."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
