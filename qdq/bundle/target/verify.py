"""Checks what trtexec wrote to results/ against expected.json: numbers, types of layers, times of layers.

python3 verify.py ENGINE

verify.sh runs it in the folder of the bundle with the name of the engine, such as int8. It needs Python 3.8 or later
and numpy, and nothing of qdq. It prints a line for each check: status, name, text and figures as JSON, separated by
tabs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Dict, Tuple

import numpy as np

Record = Tuple[str, str, str, Dict[str, Any]]
"""Status, name, text and figures of a check."""

Layer = Dict[str, Any]
Arrays = Tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]

RESULTS = "results"
SHOWN = 5
NUMBER_WORDS = re.compile(r"(?<=[\s,\[:])([+-]?)(nan|inf)(?=[\s,\]}])", re.IGNORECASE)
ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s]*(?:\[ONNX Layer: |$))")
PRODUCT = re.compile(
    r"correlation|conv(?!ert)|gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE
)
FUSED_PREFIX = "__myl_"
FUSED_ATTENTION = "_gemm_mha"
LOW_TYPES = {"Int8": "int8", "FP8": "FP8", "MXFP8": "MXFP8", "FP4": "FP4"}
TYPE_WORDS = {
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


class ResultError(Exception):
    """Something that trtexec should have written is missing or wrong."""


def main(engine: str) -> None:
    """Run all checks of an engine and print a line for each."""
    expected = read_json("expected.json")
    records = check_numbers(expected)
    layers: list[Layer] = []
    try:
        layers = read_layers(os.path.join(RESULTS, engine + ".layers.json"))
        records.append(check_census(expected["products"], layers))
    except ResultError as problem:
        records.append(("failed", "census", str(problem), {}))
    records.append(check_profile(engine, layers))
    for status, name, text, figures in records:
        fields = [status, name, text, json.dumps(to_plain(figures))]
        print("\t".join(" ".join(field.split()) for field in fields))


def read_json(path: str) -> Any:
    """The content of a JSON file; trtexec writes nan and inf as C++ does."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise ResultError(f"trtexec wrote no {path}")
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        return json.loads(NUMBER_WORDS.sub(spell_number, text))
    except ValueError as error:
        raise ResultError(f"{path} is damaged or cut off: {error}") from error


def spell_number(match: re.Match[str]) -> str:
    """A number word as Python's JSON reads it."""
    word = "NaN" if match.group(2).lower() == "nan" else "Infinity"
    return "-" + word if match.group(1) == "-" and word == "Infinity" else word


def to_plain(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without NaN and infinity, for which JSON has no word."""
    plain = {}
    for name, value in figures.items():
        is_strange = isinstance(value, float) and not np.isfinite(value)
        plain[name] = None if is_strange else value
    return plain


# --- numbers ---------------------------------------------------------------------------------------------------------


def check_numbers(expected: dict[str, Any]) -> list[Record]:
    """A record for each output: its distance from the references over all pairs."""
    records = []
    collected: dict[str, list[Arrays | ResultError]] = {}
    for output in expected["outputs"]:
        collected[output["name"]] = []
    for number, pair in enumerate(expected["pairs"]):
        try:
            arrays = read_outputs(number)
        except ResultError as problem:
            for name in collected:
                collected[name].append(problem)
            continue
        for output in expected["outputs"]:
            name = output["name"]
            reference = np.load(pair["references"][name][: -len("bin")] + "npy")
            collected[name].append(fit(arrays, name, reference, number))
    for output in expected["outputs"]:
        records.append(judge_output(output, collected[output["name"]]))
    return records


def read_outputs(number: int) -> dict[str, Any]:
    """The outputs of a pair by name: shape and values."""
    arrays = {}
    path = os.path.join(RESULTS, f"outputs.{number}.json")
    content = read_json(path)
    if not isinstance(content, list):
        raise ResultError(f"{path} holds no list of outputs")
    for entry in content:
        dimensions = str(entry.get("dimensions", ""))
        shape = [int(size) for size in dimensions.split("x") if size]
        arrays[entry.get("name")] = (shape, np.array(entry.get("values", []), np.float64))
    return arrays


def fit(
    arrays: dict[str, Any], name: str, reference: np.ndarray[Any, Any], number: int
) -> Arrays | ResultError:
    """The reference and the output of one pair as vectors, or a ResultError."""
    if name not in arrays:
        names = ", ".join(map(str, arrays)) or "nothing"
        return ResultError(f"pair {number} has no output {name}, but {names}")
    shape, values = arrays[name]
    wanted = list(reference.shape)
    if shape != wanted:
        return ResultError(f"pair {number} has shape {shape}, expected {wanted}")
    if values.size != reference.size:
        text = f"pair {number} has {values.size} values, expected {reference.size}"
        return ResultError(f"{text}: the output is cut off")
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad and np.all(np.isfinite(reference)):
        return ResultError(f"pair {number} has {bad} values that are NaN or infinite")
    return reference.astype(np.float64).ravel(), values.ravel()


def judge_output(output: dict[str, Any], pairs: list[Arrays | ResultError]) -> Record:
    """The record of one output."""
    title = f"numbers {output['name']}"
    references = []
    outputs = []
    for pair in pairs:
        if isinstance(pair, ResultError):
            return ("failed", title, str(pair), {})
        references.append(pair[0])
        outputs.append(pair[1])
    mean_squares = []
    agreements = []
    for one, other in zip(references, outputs):
        mean_squares.append(float(np.mean((one - other) ** 2)))
        agreements.append(float(np.argmax(one) == np.argmax(other)))
    reference = np.concatenate(references)
    values = np.concatenate(outputs)
    figures = {
        "sqnr_db": measure_sqnr(reference, values),
        "min_sqnr_db": output["min_sqnr_db"],
        "cosine": measure_cosine(reference, values),
        "min_cosine": output["min_cosine"],
        "max_mean_square": max(mean_squares),
        "pairs": len(pairs),
    }
    if output["has_classes"]:
        figures["agreement"] = sum(agreements) / len(agreements)
    text = describe_figures(figures)
    if is_close(output, figures):
        return ("passed", title, text, figures)
    worst = int(np.argmax(mean_squares))
    return ("failed", title, f"{text}; the worst is pair {worst}", figures)


def is_close(output: dict[str, Any], figures: dict[str, Any]) -> bool:
    """Whether an output is as close to its references as rounding allows."""
    if output["min_sqnr_db"] is None:
        return bool(figures["max_mean_square"] <= output["max_mean_square"])
    is_similar = figures["cosine"] >= output["min_cosine"]
    return bool(is_similar and figures["sqnr_db"] >= output["min_sqnr_db"])


def describe_figures(figures: dict[str, Any]) -> str:
    """SQNR, cosine and agreement in words."""
    text = f"SQNR {figures['sqnr_db']:.2f} dB"
    if figures["min_sqnr_db"] is not None:
        text += f" (at least {figures['min_sqnr_db']:.2f})"
    text += f", cosine {figures['cosine']:.6f} (at least {figures['min_cosine']:.6f})"
    if "agreement" in figures:
        percent = 100 * figures["agreement"]
        text += f", same class on {percent:.0f} % of {figures['pairs']} pairs"
    return text


def measure_sqnr(reference: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> float:
    """10 log10(sum ref^2 / sum (ref - out)^2) in dB."""
    noise = float(np.sum((reference - values) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


def measure_cosine(reference: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> float:
    """Cosine of the angle between two vectors; 1 for two zero vectors, 0 if only one is."""
    norms = float(np.linalg.norm(reference) * np.linalg.norm(values))
    if norms == 0:
        return float(np.array_equal(reference, values))
    return float(np.vdot(reference, values) / norms)


# --- layers ----------------------------------------------------------------------------------------------------------


def read_layers(path: str) -> list[Layer]:
    """The layers of --exportLayerInfo, as TensorRT 8.6 and 10 or as 11 writes them."""
    content = read_json(path)
    layers = content.get("Layers") if isinstance(content, dict) else None
    if not layers:
        raise ResultError(f"{path} lists no layers")
    if not isinstance(layers[0], dict):
        raise ResultError(f"{path} has names only: it was not written with detailed verbosity")
    return [read_layer(layer) for layer in layers]


def read_layer(layer: dict[str, Any]) -> Layer:
    """Name, type, types of inputs and constants, and ONNX nodes of a layer."""
    constants = [type_of(tensor) for tensor in layer.get("Constants", [])]
    if "Weights" in layer:
        constants.insert(0, find_type(str(layer["Weights"].get("Type", ""))))
    name = str(layer.get("Name", ""))
    nodes = ONNX_NODE.findall(str(layer.get("Metadata", ""))) or name.split(" + ")
    return {
        "name": name,
        "type": str(layer.get("LayerType", "")),
        "inputs": [type_of(tensor) for tensor in layer.get("Inputs", [])],
        "constants": constants,
        "outputs": [type_of(tensor) for tensor in layer.get("Outputs", [])],
        "nodes": nodes,
    }


def type_of(tensor: dict[str, Any]) -> str:
    """The type of a tensor: in one field with the format before TensorRT 11, then in a field of its own."""
    fields = {key.lower(): str(value) for key, value in tensor.items()}
    return find_type(fields.get("datatype", fields.get("format/datatype", "")))


def find_type(text: str) -> str:
    """The type in a description of type and memory format."""
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        if word in TYPE_WORDS:
            return TYPE_WORDS[word]
    return text


def check_census(products: list[dict[str, Any]], layers: list[Layer]) -> Record:
    """The record of the products that are expected below 16 bit, by the names of their ONNX nodes."""
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer["nodes"]:
            by_node.setdefault(node, []).append(layer)
    figures: dict[str, Any] = {}
    counts = []
    others: list[str] = []
    unknown: list[str] = []
    for low_type, word in LOW_TYPES.items():
        expected = [product for product in products if product["type"] == low_type]
        if not expected:
            continue
        computing = {
            product["node"]: select_products(by_node.get(product["node"], []))
            for product in expected
        }
        wrong = list_other_types(computing, low_type)
        absent = [node for node in computing if not computing[node]]
        others += wrong
        unknown += absent
        reached = len(expected) - len(wrong) - len(absent)
        counts.append(f"{reached} of {len(expected)} products in {word}")
        figures["expected_" + word.lower()] = len(expected)
        figures[word.lower()] = reached
    expected = [product for product in products if product["type"] in LOW_TYPES]
    figures["macs_expected"] = sum_macs(expected)
    figures["macs_all"] = sum_macs(products)
    if not counts:
        return ("not checked", "census", "no product has Q/DQ on both operands", figures)
    text = ", ".join(counts)
    if others:
        text += "; in another type than that of their Q/DQ: " + list_names(others)
        return ("failed", "census", text, figures)
    if unknown:
        text += "; in no layer by their names: " + list_names(unknown)
        return ("not checked", "census", text, figures)
    return ("passed", "census", text, figures)


def list_other_types(computing: dict[str, list[Layer]], low_type: str) -> list[str]:
    """The nodes with a layer that multiplies in another type than the expected one, and its types."""
    others = []
    for node, layers in computing.items():
        for layer in layers:
            if find_low_type(layer) != low_type:
                types = " x ".join(layer["inputs"][:2] + layer["constants"][:1])
                others.append(f"{node} ({types})")
                break
    return others


def sum_macs(products: list[dict[str, Any]]) -> int:
    """The known multiplications."""
    return sum(product["macs"] or 0 for product in products)


def list_names(names: list[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        text += f" and {len(names) - SHOWN} more"
    return text


def list_operations(layer: Layer) -> str:
    """The operations of a fused kernel, such as CastMulCastFcAdd; empty for other kernels."""
    name = str(layer["name"])
    if not name.startswith(FUSED_PREFIX):
        return ""
    return name[len(FUSED_PREFIX) :].partition("_")[0]


def select_products(layers: list[Layer]) -> list[Layer]:
    """The layers of a node that multiply, or all if none does by its type."""
    products = []
    for layer in layers:
        if PRODUCT.search(layer["type"]) or "Fc" in list_operations(layer):
            products.append(layer)
    return products or layers


def find_low_type(layer: Layer) -> str:
    """The type below 16 bit of both operands of a layer that multiplies without a cast before; empty if it has none.

    Weights are a constant, or the second input. A fused attention has three such inputs: query, key and value.
    """
    types = layer["inputs"]
    first = types[0] if types else ""
    if first not in LOW_TYPES or first not in types[1:] + layer["constants"]:
        return ""
    if layer["name"].startswith(FUSED_ATTENTION):
        return str(first) if types.count(first) >= 3 else ""
    prologue, product, _ = list_operations(layer).partition("Fc")
    if not PRODUCT.search(layer["type"]) and (not product or "Cast" in prologue):
        return ""
    return "MXFP8" if first == "FP8" and "E8M0" in types else str(first)


# --- times of layers -------------------------------------------------------------------------------------------------


def check_profile(engine: str, layers: list[Layer]) -> Record:
    """The record of the slowest layers. Those in float go to results/costs.txt, which verify.sh reads."""
    try:
        times = read_times(os.path.join(RESULTS, engine + ".profile.json"))
    except ResultError as problem:
        return ("not checked", "profile", str(problem), {})
    total = sum(times.values())
    types = {}
    for layer in layers:
        low_type = find_low_type(layer)
        types[layer["name"]] = LOW_TYPES[low_type] if low_type else describe_layer(layer)
    slowest = sorted(times, key=lambda name: -times[name])
    others = [name for name in slowest if types.get(name) not in LOW_TYPES.values()]
    costs = [describe_cost(name, times[name], total, types) for name in others]
    with open(os.path.join(RESULTS, "costs.txt"), "w", encoding="utf-8") as file:
        file.write(f"not in {engine} and slowest: " + (list_names(costs) or "none"))
    shown = [describe_cost(name, times[name], total, types) for name in slowest]
    figures = {
        "layers": len(times),
        "total_ms": total,
        "slowest": {name: times[name] for name in slowest[:SHOWN]},
    }
    return ("passed", "profile", "slowest layers: " + list_names(shown), figures)


def read_times(path: str) -> dict[str, float]:
    """Layer -> average time in ms, of --exportProfile."""
    times: dict[str, float] = {}
    for entry in read_json(path):
        if isinstance(entry, dict) and "name" in entry:
            time = float(entry.get("averageMs") or entry.get("timeMs") or 0)
            times[entry["name"]] = times.get(entry["name"], 0.0) + time
    if not times:
        raise ResultError(f"{path} lists no layers")
    return times


def describe_layer(layer: Layer) -> str:
    """Type and first types of a layer that multiplies in float, or not at all."""
    return " ".join([layer["type"], *layer["inputs"][:1]])


def describe_cost(name: str, time: float, total: float, types: dict[str, str]) -> str:
    """A layer with its time, its fraction of all, and its type."""
    share = 100 * time / total if total else 0.0
    return f"{name} {time:.3g} ms, {share:.0f} % ({types.get(name, 'unknown')})"


if __name__ == "__main__":
    main(sys.argv[1])
