"""Read the kernels of an engine and their types from the output of the builder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qdq.errors import BuildError

# One line of the VERBOSE log of TensorRT-RTX 1.7. The lists contain brackets themselves, so the next key marks the end
# of a list.
_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<layer_type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: "
    r".*Metadata: ?(?P<metadata>.*)"
)
_LINE_TYPE = re.compile(r"Datatype: (\w+), Format: ")
_LINE_TENSOR = re.compile(
    r"Dimensions: \[(?P<dimensions>.*?)\], .*?Datatype: (?P<type>\w+), Format: "
)
# Entries are separated by the ASCII characters unit and record separator; the name of a node may contain brackets.
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s]*(?:\[ONNX Layer: |$))")

# The inspector's words for a type, from "Half" to "Thirty-two wide channel vectorized row major Int8 format"
_TYPES = {
    "int4": "Int4",
    "int8": "Int8",
    "uint8": "UInt8",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Bool",
    "fp8": "FP8",
    "fp4": "FP4",
    "fp4e2m1": "FP4",
    "e8m0": "E8M0",
    "fp8ue8m0": "E8M0",
    "half": "Half",
    "fp16": "Half",
    "bf16": "BFloat16",
    "bfloat16": "BFloat16",
    "float": "Float",
    "fp32": "Float",
}
_WORD = re.compile(r"[a-z0-9]+")
_BITS = {
    "Int4": 4,
    "Int8": 8,
    "UInt8": 8,
    "Int32": 32,
    "Int64": 64,
    "Bool": 8,
    "FP8": 8,
    "FP4": 4,
    "E8M0": 8,
    "Half": 16,
    "BFloat16": 16,
    "Float": 32,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Args:
        name: TensorRT's name for it.
        layer_type: TensorRT's type: `correlation`, `gemm`, `kgen`, `CaskConvolution` ...
        input_types: Types of the tensors it reads (`Int8`, `Float`, `Half` ...), activation first.
        constant_types: Types of its constants, weights first.
        output_types: Types of the tensors it writes.
        onnx_nodes: Names of the ONNX nodes it was made from.
        input_bytes: Bytes of the tensors it reads, without constants and without the padding of a memory format; None
            if a dimension is open, a size is missing, or a type is unknown.
        output_bytes: Likewise for the tensors it writes.
    """

    name: str
    layer_type: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    output_types: tuple[str, ...]
    onnx_nodes: tuple[str, ...]
    input_bytes: int | None = None
    output_bytes: int | None = None


class _Tensor(NamedTuple):
    dimensions: Sequence[int] | None
    dtype: str


def parse_build_log(messages: Iterable[str]) -> list[Kernel]:
    """Kernels from the VERBOSE messages of TensorRT-RTX, in order of execution.

    Without a GPU the only list of them is the message that begins with `Layers:`. Lines that only synchronize streams
    are kernels without inputs.

    Raises:
        BuildError: There is no such line: this version writes its log differently.
    """
    kernels = []
    for message in messages:
        # Not splitlines(): it splits at the separators of the metadata, too.
        for line in message.split("\n"):
            match = _LINE.match(line)
            if match is not None:
                kernels.append(_read_line(match))
    if not kernels:
        raise BuildError(
            "the engine is built, but the builder's log lists no kernels: there is no int8 census; expected "
            "lines 'Name: ..., LayerType: ..., Inputs: [...'.",
            "use tensorrt-rtx 1.7, whose log qdq can read, and report the version that you have.",
        )
    return kernels


def parse_layer_json(text: str) -> list[Kernel]:
    """Kernels from the JSON of TensorRT's engine inspector or of `trtexec --exportLayerInfo`.

    Both styles are read: `Format/Datatype` in one field (TensorRT 10) and in two (TensorRT 11).

    Raises:
        BuildError: The text is not such JSON, or has no details.
    """
    try:
        layers = json.loads(text)["Layers"]
        return [_read_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"the layer information of the engine cannot be read ({type(error).__name__}: {error}); "
            "expected a list 'Layers' of objects with Name, LayerType, Inputs and Outputs.",
            "build with --profilingVerbosity=detailed; otherwise the inspector lists names only.",
        ) from error


def _read_line(match: re.Match[str]) -> Kernel:
    """The kernel of a line of the log."""
    return Kernel(
        name=match["name"],
        layer_type=match["layer_type"],
        input_types=_find_types(match["inputs"]),
        constant_types=_find_types(match["constants"]),
        output_types=_find_types(match["outputs"]),
        onnx_nodes=_read_node_names(match["metadata"]),
        input_bytes=_count_bytes(_parse_tensors(match["inputs"])),
        output_bytes=_count_bytes(_parse_tensors(match["outputs"])),
    )


def _read_layer(layer: Mapping[str, Any]) -> Kernel:
    """The kernel of an object of the inspector's list."""
    inputs = _read_tensors(layer["Inputs"])
    constants = _read_tensors(layer.get("Constants", []))
    outputs = _read_tensors(layer["Outputs"])
    constant_types = _list_types(constants)
    if "Weights" in layer:
        constant_types = (_find_type(layer["Weights"]["Type"]), *constant_types)
    # Layers that the parser did not annotate have the nodes in their name.
    onnx_nodes = _read_node_names(layer.get("Metadata", "")) or tuple(layer["Name"].split(" + "))
    return Kernel(
        name=layer["Name"],
        layer_type=layer["LayerType"],
        input_types=_list_types(inputs),
        constant_types=constant_types,
        output_types=_list_types(outputs),
        onnx_nodes=onnx_nodes,
        input_bytes=_count_bytes(inputs),
        output_bytes=_count_bytes(outputs),
    )


def _parse_tensors(text: str) -> list[_Tensor]:
    """The tensors of a list in a line of the log."""
    tensors = []
    for match in _LINE_TENSOR.finditer(text):
        dimensions = _parse_dimensions(match["dimensions"])
        tensors.append(_Tensor(dimensions, _find_type(match["type"])))
    return tensors


def _find_types(text: str) -> tuple[str, ...]:
    """The types of the tensors of a list in a line of the log."""
    return tuple(map(_find_type, _LINE_TYPE.findall(text)))


def _parse_dimensions(text: str) -> list[int] | None:
    """Sizes separated by commas; None if one is open (-1)."""
    dimensions = []
    for part in text.split(","):
        size = part.strip()
        if not size:
            continue  # a scalar
        if not size.isdecimal():
            return None
        dimensions.append(int(size))
    return dimensions


def _read_tensors(tensors: Iterable[Mapping[str, Any]]) -> list[_Tensor]:
    """The tensors of a list in the inspector's JSON."""
    result = []
    for tensor in tensors:
        fields = {key.lower(): value for key, value in tensor.items()}
        text = fields["datatype"] if "datatype" in fields else fields["format/datatype"]
        result.append(_Tensor(tensor.get("Dimensions"), _find_type(text)))
    return result


def _list_types(tensors: Iterable[_Tensor]) -> tuple[str, ...]:
    return tuple(tensor.dtype for tensor in tensors)


def _count_bytes(tensors: Iterable[_Tensor]) -> int | None:
    """Total size of tensors; None if a dimension is open or a type is unknown."""
    total = 0
    for tensor in tensors:
        if tensor.dimensions is None or tensor.dtype not in _BITS:
            return None
        if not all(isinstance(size, int) and size >= 0 for size in tensor.dimensions):
            return None
        bits = math.prod(tensor.dimensions) * _BITS[tensor.dtype]
        total += -(-bits // 8)  # rounded up
    return total


def _find_type(text: str) -> str:
    """The type in a description of type and memory format; the description itself if it contains no known type."""
    for word in _WORD.findall(text.lower()):
        if word in _TYPES:
            return _TYPES[word]
    return text


def _read_node_names(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ONNX_NODE.findall(metadata)))
