"""Scales that should be one: QDQ113, QDQ114 and QDQ115."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, MOVING_OPS, GraphView, is_op, name_of


@register_rule(
    "QDQ113",
    "warning",
    "One tensor is quantized with different scales (R-FAN, R-SHAREDW).",
    "It is quantized and written once for each scale. A shared weight gets two sets of codes.",
    "[probe] two quantize outputs; [src] ModelOpt keeps one pair a tensor",
)
def _tensor_has_scales(view: GraphView) -> Iterator[Flaw]:
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in [
        *view.quantizers,
        *(n for n in view.dequantizers if not view.is_computed(n.inputs[0])),
    ]:
        if node.inputs[0] is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    for value, nodes in readers.items():
        if count := _count_scales(view, nodes):
            rule = "R-FAN" if view.is_computed(value) else "R-SHAREDW"
            message = f"{value.name} is quantized with {count} different scales, also by {name_of(nodes[-1])} ({rule})"
            yield Flaw(name_of(nodes[0]), message, "let all readers share one quantizer.")


def _count_scales(view: GraphView, nodes: Iterable[ir.Node]) -> int:
    """How many different scales the nodes have; 0 if it is one, or if one of them is not known."""
    scales = [view.scale(node) for node in nodes]
    if any(scale is None for scale in scales):
        return 0
    different = {tuple(scale.ravel().tolist()) for scale in scales if scale is not None}
    return len(different) if len(different) > 1 else 0


@register_rule(
    "QDQ114",
    "warning",
    "The inputs of a Concat and the quantizers of its output have different scales (R-CAT-1, R-CAT-2).",
    "TensorRT moves the output's Q into every branch and leaves a rescale kernel in each whose scale is another.",
    "[src] ModelOpt concat_elimination, cuDLA rules.py; [iss] 2527; yolov7 on Orin: 180 to 207 qps (R-CAT-4)",
)
def _concat_has_scales(view: GraphView) -> Iterator[Flaw]:
    for node in view.select("Concat"):
        inputs = [view.dequantizer(value) for value in node.inputs]
        outputs = _quantizers_behind(view, node.outputs[0])
        members = [n for n in inputs if n is not None]
        if members and outputs and (count := _count_scales(view, [*members, *outputs])):
            message = f"{len(members)} quantized inputs and the output have {count} different scales (R-CAT-1)"
            yield Flaw(
                name_of(node),
                message,
                "let the group share one quantizer, the one with the largest range.",
            )


@register_rule(
    "QDQ115",
    "warning",
    "The quantizers before and behind a MaxPool have different scales (R-MP).",
    "MaxPool runs in int8 with one scale. With two, a rescale kernel stands beside it.",
    "[src] cuDLA rules.py; [probe] maxpool(i8->i8)",
)
def _pool_has_scales(view: GraphView) -> Iterator[Flaw]:
    for node in view.select("MaxPool"):
        outputs = _quantizers_behind(view, node.outputs[0])
        before = view.dequantizer(node.inputs[0])
        beside = (
            [r for r in view.readers(node.inputs[0]) if is_op(r, "QuantizeLinear")]
            if node.inputs[0]
            else []
        )
        members = beside if before is None else [before]
        if members and outputs and (count := _count_scales(view, [*members, *outputs])):
            message = f"its input and its output have {count} different scales (R-MP)"
            yield Flaw(
                name_of(node), message, "let the pool's input and its readers share one quantizer."
            )


def _quantizers_behind(view: GraphView, value: ir.Value) -> list[ir.Node]:
    through = COMMUTING_OPS if any(is_op(r, "MaxPool") for r in view.readers(value)) else MOVING_OPS
    return [node for node in view.reached(value, through) if is_op(node, "QuantizeLinear")]
