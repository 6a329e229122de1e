"""`expected.json`: what the target must find. `verify.sh` and `verify.py` read it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import qdq
from qdq.bundle.floor import HALF_NUDGE, Floor
from qdq.bundle.folder import BUNDLE_FORMAT
from qdq.check.parity import TIE_MARGIN_DB
from qdq.files import to_jsonable
from qdq.graph.coverage import LayerCoverage
from qdq.metrics import Array, has_classes
from qdq.pairs import Pair
from qdq.product_types import LOW_TYPES
from qdq.trt.trtexec import Pair as PairFiles

_TOLERANCE = (
    f"tie floor of the file: in ONNX Runtime, the inputs of all quantizers and the outputs times 1 +- {HALF_NUDGE} "
    f"(float16 rounding), the worse of the two, less {TIE_MARGIN_DB:g} dB"
)


def describe_bundle(
    pairs: Sequence[Pair],
    files: Sequence[PairFiles],
    origin: str,
    floors: Mapping[str, Floor],
    layers: Sequence[LayerCoverage],
    notes: Sequence[str],
    digests: Mapping[str, str],
    model_sha256: str,
) -> dict[str, Any]:
    """The content of `expected.json`.

    Args:
        pairs: Inputs and references.
        files: Their files.
        origin: Where the references come from.
        floors: Output name -> the distance of a correct engine.
        layers: The products of the network.
        notes: What could not be made, and why.
        digests: File -> SHA-256. Each has a line of its own, which `verify.sh` reads.
        model_sha256: Digest of the ONNX file that the bundle is made from. The result has it as well, so that it is
            taken for no other run.
    """
    first = pairs[0]
    content: dict[str, Any] = to_jsonable(
        {
            "format": BUNDLE_FORMAT,
            "qdq": qdq.__version__,
            "model_sha256": model_sha256,
            "notes": notes,
            "references": origin,
            "tolerance": _TOLERANCE,
            "inputs": [_describe_tensor(name, array) for name, array in first.inputs.items()],
            "outputs": [
                _describe_output(name, array, floors[name])
                for name, array in first.quantized.items()
            ],
            "pairs": [_describe_pair(pair) for pair in files],
            "products": [_describe_product(layer) for layer in layers],
            "files": digests,
        }
    )
    return content


def _describe_tensor(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "type": str(array.dtype), "shape": array.shape}


def _describe_output(name: str, array: Array, floor: Floor) -> dict[str, Any]:
    """An output, and how far from its references it may be."""
    return {
        **_describe_tensor(name, array),
        "has_classes": has_classes(array),
        "tie_floor_db": floor.sqnr_db,
        "min_sqnr_db": floor.required_sqnr_db,
        "min_cosine": floor.required_cosine,
        "max_mean_square": floor.most_mean_square,
    }


def _describe_pair(pair: PairFiles) -> dict[str, Any]:
    return {
        "inputs": {name: path.as_posix() for name, path in pair.inputs.items()},
        "references": {name: path.as_posix() for name, path in pair.references.items()},
    }


def _describe_product(layer: LayerCoverage) -> dict[str, Any]:
    """A product and the type below 16 bit in which it is expected, by TensorRT's name; None if in float."""
    return {
        "node": layer.name,
        "module": layer.module,
        "op_type": layer.op_type,
        "type": layer.expected if layer.expected in LOW_TYPES else None,
        "macs": layer.macs,
    }
