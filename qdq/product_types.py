"""The types in which TensorRT runs products, by its own names, and the words for them in texts. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

LOW_TYPES = {"Int8": "int8", "FP8": "FP8", "MXFP8": "MXFP8", "FP4": "FP4"}
"""The types below 16 bit in which TensorRT multiplies -> their words."""
FLOAT_TYPES = ("Half", "BFloat16", "Float")
WEIGHTS_ONLY = " weights"
"""End of the name of a type in which only weights are stored, such as "Int4 weights": the product is in float."""

_INT8_WEIGHTS = "Int8" + WEIGHTS_ONLY


def word_of(type_name: str) -> str:
    """The word for a type in texts.

    Args:
        type_name: TensorRT's name, such as "Int8", "Int4 weights" or "Half"; empty for one that is not known.

    Returns:
        Such as "int8", "FP8" or "int4 weights"; "float" for a float type and for one that is not known.
    """
    if not type_name or type_name in FLOAT_TYPES:
        return "float"
    if type_name.endswith(WEIGHTS_ONLY):
        return word_of(type_name.removesuffix(WEIGHTS_ONLY)) + WEIGHTS_ONLY
    return LOW_TYPES.get(type_name, type_name.lower())


def list_low_types(type_names: Iterable[str]) -> list[str]:
    """The quantized types among the types of layers, each once; int8 if there are none.

    Stored weights of int8 are not among them: they count as float.

    Args:
        type_names: TensorRT's names of the types.
    """
    names = set(type_names)
    multiplied = [name for name in LOW_TYPES if name in names]
    others = sorted(names.difference(LOW_TYPES, FLOAT_TYPES, {_INT8_WEIGHTS, ""}))
    return [*multiplied, *others] or ["Int8"]
