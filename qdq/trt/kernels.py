"""Read which kernels an engine has, and on which types, from what the builder tells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdq.errors import BuildError

# One line of the VERBOSE log of TensorRT-RTX 1.7. The lists hold brackets of their own: their ends are found
# by the key that follows.
_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<layer_type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: "
    r".*Metadata: ?(?P<metadata>.*)"
)
_LINE_TYPE = re.compile(r"Datatype: (\w+), Format: ")
_LINE_TENSOR = re.compile(
    r"Dimensions: \[(?P<dimensions>.*?)\], .*?Datatype: (?P<type>\w+), Format: "
)
# Entries are set apart by the ASCII characters unit and record separator; a node's name may hold brackets.
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s]*(?:\[ONNX Layer: |$))")

# What the inspector calls a type, from "Half" to "Thirty-two wide channel vectorized row major Int8 format"
_TYPES = {
    "int4": "Int4",
    "int8": "Int8",
    "uint8": "UInt8",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Bool",
    "fp8": "FP8",
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
    "Half": 16,
    "BFloat16": 16,
    "Float": 32,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Args:
        name: TensorRT's name of it.
        layer_type: TensorRT's word: `correlation`, `gemm`, `kgen`, `CaskConvolution` ...
        input_types: Types of the tensors it reads (`Int8`, `Float`, `Half` ...), activation first.
        constant_types: Types of its constants, weights first.
        output_types: Types of what it writes.
        onnx_nodes: Names of the ONNX nodes it was made from.
        input_bytes: Bytes of the tensors it reads, without constants and without what a memory format pads; None where
            a dimension is open, a size is not told, or a type is not known.
        output_bytes: Likewise of what it writes.
    """

    name: str
    layer_type: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    output_types: tuple[str, ...]
    onnx_nodes: tuple[str, ...]
    input_bytes: int | None = None
    output_bytes: int | None = None


def parse_build_log(messages: Iterable[str]) -> list[Kernel]:
    """Kernels from the VERBOSE messages of TensorRT-RTX, in order of execution.

    Without a GPU this is the only list of them: the message that begins with `Layers:`. Lines that
    only synchronize streams are kernels without inputs.

    Raises:
        BuildError: There is no such line: this version writes its log differently.
    """
    kernels = []
    for message in messages:
        for line in message.split(
            "\n"
        ):  # not splitlines(): the separators of the metadata end lines for it
            if (match := _LINE.match(line)) is None:
                continue
            kernels.append(
                Kernel(
                    name=match["name"],
                    layer_type=match["layer_type"],
                    input_types=tuple(_LINE_TYPE.findall(match["inputs"])),
                    constant_types=tuple(_LINE_TYPE.findall(match["constants"])),
                    output_types=tuple(_LINE_TYPE.findall(match["outputs"])),
                    onnx_nodes=_onnx_nodes(match["metadata"]),
                    input_bytes=_count_bytes(_tensors_of_line(match["inputs"])),
                    output_bytes=_count_bytes(_tensors_of_line(match["outputs"])),
                )
            )
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
        BuildError: Not such JSON, or one without details.
    """
    try:
        layers = json.loads(text)["Layers"]
        return [_kernel_of_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"the layer information of the engine cannot be read ({type(error).__name__}: {error}); "
            "expected a list 'Layers' of objects with Name, LayerType, Inputs and Outputs.",
            "build with --profilingVerbosity=detailed; else the inspector tells only names.",
        ) from error


def _kernel_of_layer(layer: Mapping[str, Any]) -> Kernel:
    weights = [_type_of(layer["Weights"]["Type"])] if "Weights" in layer else []
    return Kernel(
        name=layer["Name"],
        layer_type=layer["LayerType"],
        input_types=tuple(map(_tensor_type, layer["Inputs"])),
        constant_types=(*weights, *map(_tensor_type, layer.get("Constants", []))),
        output_types=tuple(map(_tensor_type, layer["Outputs"])),
        # layers that the parser did not annotate carry the nodes in their name
        onnx_nodes=_onnx_nodes(layer.get("Metadata", "")) or tuple(layer["Name"].split(" + ")),
        input_bytes=_count_bytes(_tensors_of_json(layer["Inputs"])),
        output_bytes=_count_bytes(_tensors_of_json(layer["Outputs"])),
    )


_Tensor = tuple[Sequence[int] | None, str]  # dimensions, type


def _tensors_of_line(text: str) -> Iterator[_Tensor]:
    for tensor in _LINE_TENSOR.finditer(text):
        sizes = [size.strip() for size in tensor["dimensions"].split(",") if size.strip()]
        is_known = all(size.isdecimal() for size in sizes)  # -1: open
        yield [int(size) for size in sizes] if is_known else None, tensor["type"]


def _tensors_of_json(tensors: Iterable[Mapping[str, Any]]) -> Iterator[_Tensor]:
    for tensor in tensors:
        yield tensor.get("Dimensions"), _tensor_type(tensor)


def _count_bytes(tensors: Iterable[_Tensor]) -> int | None:
    """What tensors of these dimensions and types take together; None if that cannot be said."""
    total = 0
    for dimensions, dtype in tensors:
        if dimensions is None or dtype not in _BITS:
            return None
        if not all(isinstance(size, int) and size >= 0 for size in dimensions):
            return None
        total += -(-math.prod(dimensions) * _BITS[dtype] // 8)
    return total


def _tensor_type(tensor: Mapping[str, Any]) -> str:
    fields = {key.lower(): value for key, value in tensor.items()}
    return _type_of(fields["datatype"] if "datatype" in fields else fields["format/datatype"])


def _type_of(text: str) -> str:
    """The type named in a description of type and memory format; the description itself if none is known."""
    return next((_TYPES[word] for word in _WORD.findall(text.lower()) if word in _TYPES), text)


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ONNX_NODE.findall(metadata)))
