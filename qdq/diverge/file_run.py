"""The tensors that a file computes: in ONNX Runtime, or in an engine whose tensors were dumped."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from qdq.check.parity import OnnxModel
from qdq.diverge.places import Places, find_places
from qdq.graph.shapes import complete_shapes
from qdq.metrics import Array
from qdq.predictor import list_file_inputs

_DUMPED = ".dumped"


class FileRun:
    """A file as a function of batches, which returns its inner tensors too. A with-block: it is a temporary file.

    With dumps, the tensors in them take the place of those that ONNX Runtime would compute. So what follows from them
    by Q, DQ and copies is that of the engine.

    Args:
        model: The graph, which is not changed.
        quantizers: Dotted names of the quantizers whose tensors are returned.
        layers: Likewise the layers.
        dumps: Name of a tensor -> its dump.

    Attributes:
        places: Where the quantizers and layers are.
        outputs: Names of the outputs of the file.

    Raises:
        CheckError: ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizers: Collection[str],
        layers: Collection[str],
        dumps: Mapping[str, Array],
    ) -> None:
        copy = model.clone()
        complete_shapes(copy)
        self.outputs = [str(value.name) for value in copy.graph.outputs]
        self.places: Places = find_places(copy, quantizers, layers, add_outputs=True)
        self._dumps = _read_as_inputs(copy.graph, dumps)
        self._folder = tempfile.TemporaryDirectory(prefix="qdq-")
        path = Path(self._folder.name) / "model.onnx"
        try:
            ir.save(copy, path)
            self._file = OnnxModel(path)
        except BaseException:
            self._folder.cleanup()
            raise
        self._names = [name for name in self._file.inputs if not name.endswith(_DUMPED)]

    def __enter__(self) -> FileRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def __call__(self, batch: Any) -> dict[str, Array]:
        """All tensors of the places by name, and inputs and outputs.

        Raises:
            CheckError: The batch does not fit.
        """
        inputs = dict(zip(self._names, list_file_inputs(self._file, batch), strict=False))
        feeds = {**inputs, **{f"{name}{_DUMPED}": array for name, array in self._dumps.items()}}
        arrays = self._file(*(feeds[name] for name in self._file.inputs))
        return {**inputs, **dict(zip(self._file.outputs, arrays, strict=True)), **self._dumps}


def _read_as_inputs(graph: ir.Graph, dumps: Mapping[str, Array]) -> dict[str, Array]:
    """Let the readers of dumped tensors read inputs of the graph instead.

    Returns:
        The dumps in the types of the graph.
    """
    arrays = {}
    for node in list(graph):
        for value in node.outputs:
            name = str(value.name)
            if name not in dumps:
                continue
            dtype = value.dtype or ir.DataType.FLOAT
            arrays[name] = np.ascontiguousarray(dumps[name].astype(dtype.numpy()))
            dumped = ir.Value(
                name=f"{name}{_DUMPED}",
                type=ir.TensorType(dtype),
                shape=ir.Shape(dumps[name].shape),
            )
            for reader, position in list(value.uses()):
                reader.replace_input_with(position, dumped)
            graph.inputs.append(dumped)
    return arrays
