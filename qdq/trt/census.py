"""Which layers of an engine run in int8, against what the Q/DQ nodes of the graph promise (L27)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qdq.trt.kernels import Kernel

# Kernels that do nothing but convolve or multiply matrices, in the words of RTX and of TensorRT
_PRODUCT = re.compile(
    r"correlation|conv(?!ert)|gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE
)
_FUSED_NAME = (
    "__myl_"  # of a fused kernel: followed by its operations, as in __myl_CastMulCastFcAdd_myl0_1
)


class QuantizableNode(Protocol):
    """What the census asks of a node; `graph.coverage.WeightedNode` is one."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def op_type(self) -> str: ...
    @property
    def input_quantized(self) -> bool: ...
    @property
    def weight_quantized(self) -> bool: ...
    @property
    def expects_int8(self) -> bool: ...


@dataclass(frozen=True)
class LayerCensus:
    """One weighted layer: expected against built.

    Args:
        module: Dotted name of the torch module.
        node: Name of the ONNX node.
        op_type: The ONNX operator.
        expected_int8: Both of its operands have Q/DQ.
        int8: Every kernel that computes it takes Int8 activations and Int8 weights.
        kernel: TensorRT's name of the kernel; empty when none is known.
        reason: Why it is not in int8, or not as expected; empty when it is both.
    """

    module: str
    node: str
    op_type: str
    expected_int8: bool
    int8: bool
    kernel: str
    reason: str


def take_census(nodes: Sequence[QuantizableNode], kernels: Sequence[Kernel]) -> list[LayerCensus]:
    """Find for every weighted node the kernel that computes it, and its types.

    Args:
        nodes: The weighted nodes of the ONNX graph.
        kernels: The kernels of the engine built from it.

    Returns:
        One entry a node, in the order of `nodes`.
    """
    by_node: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.onnx_nodes:
            by_node.setdefault(name, []).append(kernel)
    namesakes = Counter(node.name for node in nodes)
    return [
        _judge(node, _products(by_node.get(node.name, [])), namesakes[node.name]) for node in nodes
    ]


def _products(kernels: list[Kernel]) -> list[Kernel]:
    """Those kernels of a node that multiply.

    A kernel that quantizes, pads or rescales for a convolution carries the convolution's name as well.
    Where no kernel is a product by its type, all are returned: a fused one among them computes the node.
    """
    products = [k for k in kernels if _PRODUCT.search(k.layer_type) or "Fc" in _operations(k)]
    return products or kernels


def _operations(kernel: Kernel) -> str:
    """`CastMulCastFcAdd` of a fused kernel, nothing of others."""
    if not kernel.name.startswith(_FUSED_NAME):
        return ""
    return kernel.name.removeprefix(_FUSED_NAME).partition("_")[0]


def _is_int8(kernel: Kernel) -> bool:
    """Int8 activation times Int8 weights, and not widened before the product.

    Weights are a constant, or the second input where another kernel makes them or for two activations.
    """
    operands_int8 = kernel.input_types[:1] == ("Int8",) and "Int8" in (
        *kernel.input_types[1:],
        *kernel.constant_types,
    )
    if _PRODUCT.search(kernel.layer_type):
        return operands_int8
    before, product, _ = _operations(kernel).partition("Fc")
    return operands_int8 and bool(product) and "Cast" not in before


def _judge(node: QuantizableNode, kernels: list[Kernel], namesakes: int) -> LayerCensus:
    float_kernels = [kernel for kernel in kernels if not _is_int8(kernel)]
    int8 = bool(kernels) and not float_kernels
    if node.expects_int8:
        reason = "" if int8 else _why_missing(node, float_kernels, namesakes)
    elif int8:
        reason = "in int8 all the same: TensorRT moved Q/DQ from other nodes to its inputs."
    else:
        reason = _why_float(node)
    shown = (float_kernels or kernels)[:1]
    return LayerCensus(
        module=node.module,
        node=node.name,
        op_type=node.op_type,
        expected_int8=node.expects_int8,
        int8=int8,
        kernel=shown[0].name if shown else "",
        reason=reason,
    )


def _why_float(node: QuantizableNode) -> str:
    """Why nobody expected int8 of a node."""
    if node.input_quantized:
        return "left in float: Q/DQ on its input only; int8 needs it on the weight too (R-CONV-2)."
    if node.weight_quantized:
        return "left in float: Q/DQ on its weight only; int8 needs it on the input too (R-CONV-2)."
    return "left in float: no Q/DQ on its inputs."


def _why_missing(node: QuantizableNode, float_kernels: list[Kernel], namesakes: int) -> str:
    """Why a quantized node did not become an int8 kernel."""
    if not float_kernels:
        return (
            f"no kernel names this node ({node.name!r}): TensorRT removed it because nothing uses its "
            "result, or computed it while building."
        )
    kernel = float_kernels[0]
    weights = kernel.input_types[1:] or kernel.constant_types[:1]
    operands = " x ".join((*kernel.input_types[:1], *weights))
    found = f"kernel {kernel.name!r} ({kernel.layer_type}) takes {operands}"
    if namesakes > 1:
        return f"{found}, and {namesakes} nodes are named {node.name!r}: give each a name to tell them apart."
    if kernel.input_types[:1] == ("Int8",) and "Int8" in weights:
        return f"{found} but casts before it multiplies: the product is not in int8."
    if node.op_type == "ConvTranspose":
        return f"{found}: TensorRT-RTX has no int8 kernel for ConvTranspose (R-CT-3); leave it in float."
    return (
        f"{found}: its Q/DQ became kernels of their own. Usual causes: a scale of shape [1] instead of a "
        "scalar (R-SHAPE), weight scales along the wrong axis (R-AXIS), a GPU without the kernel (SM 75: no "
        "int8 convolution); `qdq check` finds the first two. A product whose result is cut into q, k and v may go "
        "into a float kernel with what follows it; nothing in the file changes that."
    )
