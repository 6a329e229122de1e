"""A TensorRT engine as a function of arrays, as `check.OnnxModel` is for an ONNX file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qdq.errors import BuildError, DataError, DependencyError
from qdq.files import read_file
from qdq.metrics import Array
from qdq.text import printable
from qdq.trt.backend import import_package, make_logger

RTX_SUFFIX = ".rtx.engine"
_SUFFIXES = (".engine", ".plan", ".trt")

# TensorRT's types -> the names that ONNX Runtime has for them, and torch's types.
_TYPES = {
    "FLOAT": ("tensor(float)", torch.float32),
    "HALF": ("tensor(float16)", torch.float16),
    "BF16": ("tensor(bfloat16)", torch.bfloat16),
    "INT8": ("tensor(int8)", torch.int8),
    "UINT8": ("tensor(uint8)", torch.uint8),
    "INT32": ("tensor(int32)", torch.int32),
    "INT64": ("tensor(int64)", torch.int64),
    "BOOL": ("tensor(bool)", torch.bool),
}


def is_engine(path: Path) -> bool:
    """Whether a file is an engine, by its name: `.engine`, `.plan` or `.trt`."""
    return path.name.lower().endswith(_SUFFIXES)


class Engine:
    """An engine as a function of arrays.

    Args:
        path: The file.
        package: TensorRT or TensorRT-RTX.
        device: Where its tensors are: the GPU that it was built for.

    Raises:
        BuildError: The package cannot load it.
        DataError: A tensor has a type that torch does not have.
    """

    def __init__(self, path: Path, package: ModuleType, device: torch.device) -> None:
        self.path = path
        self._package = package
        self._device = device
        log = make_logger(package)
        self._engine = package.Runtime(log).deserialize_cuda_engine(read_file(path))
        if self._engine is None:
            reasons = "; ".join(text.strip() for _, text in log.messages) or "no reason given"
            raise BuildError(
                f"{package.__name__} {package.__version__} cannot load {printable(path)}: {printable(reasons)}.",
                "an engine runs only with the version and on the kind of GPU that it was built with: build it here "
                "with `qdq build`.",
            )
        self._context = self._engine.create_execution_context()
        names = [
            self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
        ]
        self._inputs = [name for name in names if self._is_input(name)]
        self.outputs = [name for name in names if not self._is_input(name)]
        for name in names:
            self._type_of(name)

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of each input; a dynamic dimension is `?`."""
        shapes: dict[str, list[int | str]] = {}
        for name in self._inputs:
            shape = tuple(self._engine.get_tensor_shape(name))
            shapes[name] = [size if size >= 0 else "?" for size in shape]
        return shapes

    @property
    def types(self) -> dict[str, str]:
        """Type of each input, as ONNX Runtime writes it: "tensor(float)"."""
        return {name: self._type_of(name)[0] for name in self._inputs}

    def __call__(self, *inputs: Any) -> list[Array]:
        """Run once.

        Args:
            *inputs: Arrays in the order of `inputs`; for bfloat16, which numpy does not have, float32.

        Returns:
            The outputs; bfloat16 as float32.

        Raises:
            DataError: The inputs do not fit the engine, or the shape of an output depends on their values.
        """
        if len(inputs) != len(self._inputs):
            raise DataError(
                f"{printable(self.path)} takes {len(self._inputs)} inputs, and got {len(inputs)}.",
                f"give {', '.join(map(printable, self._inputs))}.",
            )
        buffers = {}
        for name, array in zip(self._inputs, inputs, strict=True):
            buffers[name] = self._load_input(name, np.asarray(array))
        for name in self.outputs:
            buffers[name] = self._allocate_output(name)
        for name, buffer in buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        stream = torch.get_device_module(self._device).current_stream(self._device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise DataError(
                f"{printable(self.path)} did not run; TensorRT's log says why.",
                "see the messages above; if there is too little memory, give smaller batches.",
            )
        stream.synchronize()
        return [_to_array(buffers[name]) for name in self.outputs]

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._package.TensorIOMode.INPUT)

    def _type_of(self, name: str) -> tuple[str, torch.dtype]:
        """The type of a tensor: ONNX Runtime's name for it, and torch's type."""
        word = self._engine.get_tensor_dtype(name).name
        if word not in _TYPES:
            raise DataError(
                f"the tensor {printable(name)} of {printable(self.path)} has type {word}; expected one of "
                f"{', '.join(_TYPES)}.",
                "build the engine from a file whose inputs and outputs have such a type.",
            )
        return _TYPES[word]

    def _device_of(self, name: str) -> torch.device:
        """Where a tensor is: inputs that hold sizes are in the memory of the host."""
        location = self._engine.get_tensor_location(name)
        is_on_host = location == self._package.TensorLocation.HOST
        return torch.device("cpu") if is_on_host else self._device

    def _load_input(self, name: str, array: Array) -> torch.Tensor:
        """Move an input to the device and set its shape.

        Raises:
            DataError: It has another type or a shape that the engine was not built for.
        """
        type_name, dtype = self._type_of(name)
        tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        if dtype == torch.bfloat16 and tensor.dtype == torch.float32:  # numpy has no bfloat16
            tensor = tensor.to(dtype)
        if tensor.dtype != dtype:
            raise DataError(
                f"the input {printable(name)} is {array.dtype}; {printable(self.path)} takes {type_name}.",
                "give batches of that type.",
            )
        if not self._fits(name, array.shape) or not self._context.set_input_shape(
            name, array.shape
        ):
            raise DataError(
                f"the input {printable(name)} has shape {list(array.shape)}; {printable(self.path)} was built for "
                f"{self._describe_shapes(name)}.",
                "give batches of such a size (--batch-size), or build with other --min-shapes and --max-shapes.",
            )
        return tensor.to(self._device_of(name))

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a shape is between the smallest and the largest of the engine."""
        smallest, largest = self._list_limits(name)
        if len(shape) != len(smallest):
            return False
        return all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )

    def _list_limits(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if min(shape, default=0) >= 0:
            return shape, shape
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        return tuple(smallest), tuple(largest)

    def _describe_shapes(self, name: str) -> str:
        smallest, largest = self._list_limits(name)
        if smallest == largest:
            return f"{list(smallest)}"
        return f"{list(smallest)} to {list(largest)}"

    def _allocate_output(self, name: str) -> torch.Tensor:
        """Memory for an output, whose shape follows from those of the inputs.

        Raises:
            DataError: It follows from their values.
        """
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise DataError(
                f"the shape of the output {printable(name)} depends on the values of the inputs.",
                "compare an output in front of the operator that selects, such as NonMaxSuppression.",
            )
        return torch.empty(shape, dtype=self._type_of(name)[1], device=self._device_of(name))


def _to_array(buffer: torch.Tensor) -> Array:
    if buffer.dtype == torch.bfloat16:
        buffer = buffer.float()
    array: Array = buffer.cpu().numpy()
    return array


def load_engine(path: Path) -> Engine:
    """Load an engine onto the GPU of this machine.

    Args:
        path: The file. One that ends in `.rtx.engine` is for TensorRT-RTX, another one for TensorRT.

    Raises:
        BuildError: It cannot be loaded here.
        DataError: There is no such file.
        DependencyError: There is no GPU, or no TensorRT.
    """
    if not path.is_file():
        raise DataError(
            f"there is no file {printable(path)}; expected an engine.", "check the path."
        )
    target = (
        f"on the machine that it was built for: qdq eval {printable(path)}, with the same flags; with nothing but "
        "TensorRT there: qdq bundle RUN -o bundle here, and sh bundle/verify.sh there."
    )
    if not torch.cuda.is_available():
        raise DependencyError(
            f"{printable(path)} is an engine, and there is no GPU here that could run it.", target
        )
    backend = "rtx" if path.name.lower().endswith(RTX_SUFFIX) else "tensorrt"
    try:
        package = import_package(backend)
    except DependencyError as error:
        raise DependencyError(
            f"{printable(path)} is an engine, and {error.message}", f"{error.fix}; or {target}"
        ) from error
    return Engine(path, package, torch.device("cuda", torch.cuda.current_device()))
