"""Scales that should be equal: QDQ113, QDQ114 and QDQ115."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, MOVING_OPS, GraphView, is_op, name_of


@register_rule(
    "QDQ113",
    "warning",
    "One tensor is quantized with different scales (R-FAN, R-SHAREDW).",
    "It is quantized and written once for each scale. A shared weight gets two sets of codes.",
    "[probe] two quantize outputs; [src] ModelOpt keeps one pair per tensor",
)
def _tensor_has_scales(view: GraphView) -> Iterator[Flaw]:
    """Name the first Q of the tensor, or the first DQ of a stored weight."""
    readers: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in [*view.quantizers, *_list_stored_weights(view)]:
        if node.inputs[0] is not None:
            readers[node.inputs[0]].append(node)

    for value, nodes in readers.items():
        count = _count_scales(view, nodes)
        if count < 2:
            continue

        rule = "R-FAN" if view.is_computed(value) else "R-SHAREDW"
        yield Flaw(
            node=name_of(nodes[0]),
            message=f"{value.name} is quantized with {count} different scales, "
            f"also by {name_of(nodes[-1])} ({rule})",
            fix="let all readers share one quantizer.",
        )


def _list_stored_weights(view: GraphView) -> list[ir.Node]:
    """The DQ that read codes of the file."""
    return list(filter(view.is_weight, view.dequantizers))


def _count_scales(view: GraphView, nodes: Iterable[ir.Node]) -> int:
    """The number of different scales of nodes.

    Args:
        view: The graph.
        nodes: Q and DQ.

    Returns:
        The number; 0 if the scale of one node is not known.
    """
    scales = set()
    for node in nodes:
        scale = view.scale(node)
        if scale is None:
            return 0

        scales.add(tuple(scale.ravel().tolist()))
    return len(scales)


@register_rule(
    "QDQ114",
    "warning",
    "The inputs of a Concat and the quantizers of its output have different scales (R-CAT-1, R-CAT-2).",
    "TensorRT moves the output's Q into every branch and leaves a rescale kernel in every branch with a different "
    "scale.",
    "[src] ModelOpt concat_elimination, cuDLA rules.py; [iss] 2527; yolov7 on Orin: 180 to 207 qps (R-CAT-4)",
)
def _concat_has_scales(view: GraphView) -> Iterator[Flaw]:
    """Name the Concat, if an input and its output are quantized."""
    for node in view.select("Concat"):
        dequantizers = _list_dequantizers(view, node)
        count = _count_scales_around(view, node, dequantizers)
        if count > 1:
            yield Flaw(
                node=name_of(node),
                message=f"{len(dequantizers)} quantized inputs and the output "
                f"have {count} different scales (R-CAT-1)",
                fix="let the group share one quantizer, the one with the largest range.",
            )


def _list_dequantizers(view: GraphView, node: ir.Node) -> list[ir.Node]:
    """The DQ that the inputs of a node come from, one for each quantized input."""
    dequantizers = []
    for value in node.inputs:
        dequantizer = view.dequantizer(value)
        if dequantizer is not None:
            dequantizers.append(dequantizer)
    return dequantizers


@register_rule(
    "QDQ115",
    "warning",
    "The quantizers before and after a MaxPool have different scales (R-MP).",
    "MaxPool runs in int8 with one scale. With two, TensorRT adds a rescale kernel.",
    "[src] cuDLA rules.py; [probe] maxpool(i8->i8)",
)
def _pool_has_scales(view: GraphView) -> Iterator[Flaw]:
    """Name the MaxPool, if its input and its output are quantized."""
    for node in view.select("MaxPool"):
        count = _count_scales_around(view, node, _quantizers_of_input(view, node))
        if count > 1:
            yield Flaw(
                node=name_of(node),
                message=f"its input and its output have {count} different scales (R-MP)",
                fix="let the pool's input and its readers share one quantizer.",
            )


def _quantizers_of_input(view: GraphView, pool: ir.Node) -> list[ir.Node]:
    """The DQ that a pooling reads; without one, the Q that read the same value."""
    value = pool.inputs[0]
    dequantizer = view.dequantizer(value)
    if dequantizer is not None:
        return [dequantizer]
    if value is None:
        return []
    return _select_quantizers(view.readers(value))


def _count_scales_around(view: GraphView, node: ir.Node, members: list[ir.Node]) -> int:
    """The number of different scales before and after a node.

    Args:
        view: The graph.
        node: A Concat or MaxPool.
        members: The Q or DQ before it.

    Returns:
        The number; 0 if nothing is quantized on one side, or if a scale is not known.
    """
    quantizers = _quantizers_after(view, node.outputs[0])
    if not members or not quantizers:
        return 0
    return _count_scales(view, [*members, *quantizers])


def _quantizers_after(view: GraphView, value: ir.Value) -> list[ir.Node]:
    """The Q that a value reaches; also through a MaxPool, if one reads the value itself."""
    through = MOVING_OPS
    if any(is_op(reader, "MaxPool") for reader in view.readers(value)):
        through = COMMUTING_OPS
    return _select_quantizers(view.reached(value, through))


def _select_quantizers(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The Q among some nodes, in their order."""
    return [node for node in nodes if is_op(node, "QuantizeLinear")]
