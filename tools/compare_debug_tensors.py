"""Do debug tensors and network outputs leave the kernels of an engine as they were?

python tools/compare_debug_tensors.py runs/networks/*/model.onnx --json debug_tensors.json

Builds each file with TensorRT-RTX, which needs no GPU, five times: as it is, the same again, with the tensors that `qdq
diverge` dumps as debug tensors, with what Q reads as network outputs, and with what Q writes. Counts the kernels of the
first engine that the others have, too: same name, type, tensors and ONNX nodes. The builder numbers its names anew in
every build, so numbers in them do not count.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qdq.diverge.dumps import list_debug_tensors
from qdq.graph.pairs import is_op
from qdq.trt.backend import find_backend, find_compute_capability, make_logger
from qdq.trt.kernels import Kernel, parse_build_log
from qdq.trt.profiles import Profile, choose_profiles

SM = 89

Mark = Callable[[Any, Any], Any]
"""Network and tensor -> marks the tensor."""


def main() -> int:
    """Print a row for each file; the exit code is 1 if debug tensors changed a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.onnx:
        row = _compare(path)
        rows.append(row)
        print(_format(row), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    equal = sum(row["debug"] == row["kernels"] == row["debug_kernels"] for row in rows)
    print(f"debug tensors left every kernel as it was in {equal} of {len(rows)} networks")
    return 0 if equal == len(rows) else 1


def _compare(path: Path) -> dict[str, Any]:
    began = time.perf_counter()
    model = ir.load(path)
    tensors = list_debug_tensors(model)
    codes = {str(node.outputs[0].name) for node in model.graph if is_op(node, "QuantizeLinear")}
    inputs = set(tensors) - codes
    plain = _build(path, model)
    debug = _build(path, model, tensors, lambda network, tensor: network.mark_debug(tensor))
    builds = {
        "again": _build(path, model),
        "debug": debug,
        "outputs_read_by_q": _build(path, model, inputs, _mark_output),
        "outputs_of_q": _build(path, model, set(tensors) & codes, _mark_output),
    }
    row: dict[str, Any] = {"network": path.parent.name, "tensors": len(tensors)}
    row |= {"kernels": len(plain), "debug_kernels": len(debug)}
    for name, kernels in builds.items():
        row[name] = (Counter(plain) & Counter(kernels)).total()
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def _mark_output(network: Any, tensor: Any) -> None:
    if not tensor.is_network_output:
        network.mark_output(tensor)


def _format(row: dict[str, Any]) -> str:
    return (
        f"{row['network']:20} {row['tensors']:4} tensors, {row['kernels']:4} kernels; the same: "
        f"built again {row['again']}, debug tensors {row['debug']} of {row['debug_kernels']}, as outputs: "
        f"what Q reads {row['outputs_read_by_q']}, what Q writes {row['outputs_of_q']}"
    )


def _build(
    path: Path, model: ir.Model, tensors: Collection[str] = (), mark: Mark | None = None
) -> list[Kernel]:
    """The kernels of an engine.

    Args:
        path: The file.
        model: Its graph.
        tensors: Names of the tensors that are marked.
        mark: Marks one.
    """
    trt = find_backend("rtx").module
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise SystemExit(f"{path}: {parser.get_error(0).desc()}")
    if mark is not None:
        _mark_tensors(network, set(tensors), mark)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(find_compute_capability(trt, SM), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in _make_profiles(model).items():
        profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit(f"{path} cannot be built")
    kernels = parse_build_log(text for _, text in log.messages)
    return [replace(kernel, name=re.sub(r"\d+", "#", kernel.name)) for kernel in kernels]


def _mark_tensors(network: Any, names: set[str], mark: Mark) -> None:
    missing = set(names)
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        for position in range(layer.num_outputs):
            tensor = layer.get_output(position)
            if tensor.name in names:
                mark(network, tensor)
                missing.discard(tensor.name)
    if missing:
        print(f"not in the network: {sorted(missing)[:3]}", file=sys.stderr)


def _make_profiles(model: ir.Model) -> dict[str, Profile]:
    inputs = {}
    for value in model.graph.inputs:
        sizes = value.shape or ()
        inputs[str(value.name)] = tuple(size if isinstance(size, int) else None for size in sizes)
    return choose_profiles(inputs, {})


if __name__ == "__main__":
    sys.exit(main())
