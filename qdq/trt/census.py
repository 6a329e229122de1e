"""The layers of an engine that run in int8, compared with the Q/DQ nodes of the graph (L27)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qdq.trt.kernels import Kernel

# Types of kernels that only convolve or multiply matrices, in TensorRT-RTX and in TensorRT
_PRODUCT = re.compile(
    r"correlation|conv(?!ert)|gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE
)
# Prefix of the name of a fused kernel; its operations follow, as in __myl_CastMulCastFcAdd_myl0_1.
_FUSED_PREFIX = "__myl_"


class QuantizableNode(Protocol):
    """The properties of a node that the census reads, as in `graph.coverage.WorkNode`."""

    @property
    def name(self) -> str:
        """Name of the ONNX node."""

    @property
    def module(self) -> str:
        """Dotted name of the torch module."""

    @property
    def op_type(self) -> str:
        """The ONNX operator."""

    @property
    def input_quantized(self) -> bool:
        """Whether the input has Q/DQ."""

    @property
    def weight_quantized(self) -> bool:
        """Whether the weight has Q/DQ."""

    @property
    def reason(self) -> str:
        """Why no Q/DQ would bring its operator into int8; "" for a convolution or matrix product."""

    @property
    def expects_int8(self) -> bool:
        """Whether both operands have Q/DQ."""


@dataclass(frozen=True)
class LayerCensus:
    """The expected and the built precision of one node that multiplies.

    Args:
        module: Dotted name of the torch module.
        node: Name of the ONNX node.
        op_type: The ONNX operator.
        expected_int8: Whether both of its operands have Q/DQ.
        int8: Whether every kernel that computes it takes Int8 activations and Int8 weights.
        kernel: TensorRT's name of the kernel; empty if it is not known.
        reason: Why it is not in int8, or not as expected; empty if it is in int8 as expected.
    """

    module: str
    node: str
    op_type: str
    expected_int8: bool
    int8: bool
    kernel: str
    reason: str


def take_census(nodes: Sequence[QuantizableNode], kernels: Sequence[Kernel]) -> list[LayerCensus]:
    """Find the kernel that computes each node that multiplies, and its types.

    Args:
        nodes: These nodes of the ONNX graph.
        kernels: The kernels of the engine built from it.

    Returns:
        One entry per node, in the order of `nodes`.
    """
    kernels_by_node: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.onnx_nodes:
            kernels_by_node.setdefault(name, []).append(kernel)

    name_counts = Counter(node.name for node in nodes)
    census = []
    for node in nodes:
        products = _select_products(kernels_by_node.get(node.name, []))
        census.append(_compare(node, products, name_counts[node.name]))
    return census


def _select_products(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels of a node that multiply.

    A kernel that quantizes, pads or rescales for a convolution has the convolution's name as well. If no kernel is a
    product by its type, all are returned, because a fused kernel among them computes the node.
    """
    products = []
    for kernel in kernels:
        if _PRODUCT.search(kernel.layer_type) or "Fc" in _list_operations(kernel):
            products.append(kernel)
    return products or kernels


def _list_operations(kernel: Kernel) -> str:
    """The operations of a fused kernel, such as `CastMulCastFcAdd`; empty for other kernels."""
    if not kernel.name.startswith(_FUSED_PREFIX):
        return ""
    return kernel.name.removeprefix(_FUSED_PREFIX).partition("_")[0]


def _is_int8(kernel: Kernel) -> bool:
    """Whether it multiplies an Int8 activation by Int8 weights, without a cast before the product.

    Weights are a constant. They are the second input if another kernel computes them, and in a product of two
    activations.
    """
    weight_types = (*kernel.input_types[1:], *kernel.constant_types)
    if kernel.input_types[:1] != ("Int8",) or "Int8" not in weight_types:
        return False
    if _PRODUCT.search(kernel.layer_type):
        return True
    prologue, product, _ = _list_operations(kernel).partition("Fc")
    return bool(product) and "Cast" not in prologue


def _compare(node: QuantizableNode, kernels: list[Kernel], namesakes: int) -> LayerCensus:
    """The entry of a node.

    Args:
        node: The node.
        kernels: The kernels that compute it.
        namesakes: Number of nodes with its name.
    """
    float_kernels = [kernel for kernel in kernels if not _is_int8(kernel)]
    # A kernel may contain an operator without int8 besides a product in int8.
    is_int8 = bool(kernels) and not float_kernels and not node.reason
    reason = ""
    if node.expects_int8 and not is_int8:
        reason = _explain_missing(node, float_kernels, namesakes)
    elif is_int8 and not node.expects_int8:
        reason = "runs in int8 although this was not expected: TensorRT moved Q/DQ from other nodes to its inputs."
    elif not is_int8:
        reason = _explain_float(node)

    relevant_kernels = float_kernels or kernels
    return LayerCensus(
        module=node.module,
        node=node.name,
        op_type=node.op_type,
        expected_int8=node.expects_int8,
        int8=is_int8,
        kernel=relevant_kernels[0].name if relevant_kernels else "",
        reason=reason,
    )


def _explain_float(node: QuantizableNode) -> str:
    """Why a node is not expected in int8."""
    if node.reason:
        return f"left in float: {node.reason}."
    if node.input_quantized:
        return "left in float: Q/DQ on its input only; int8 needs it on the weight too (R-CONV-2)."
    if node.weight_quantized:
        return "left in float: Q/DQ on its weight only; int8 needs it on the input too (R-CONV-2)."
    return "left in float: no Q/DQ on its inputs."


def _explain_missing(node: QuantizableNode, float_kernels: Sequence[Kernel], namesakes: int) -> str:
    """Why a quantized node did not become an int8 kernel.

    Args:
        node: A node with Q/DQ on both operands.
        float_kernels: The kernels of the node that are not int8; none if no kernel names the node.
        namesakes: Number of nodes with its name.
    """
    if not float_kernels:
        return (
            f"no kernel names this node ({node.name!r}): TensorRT removed it because nothing uses its "
            "result, or computed it while building."
        )
    kernel = float_kernels[0]
    weights = kernel.input_types[1:] or kernel.constant_types[:1]
    operands = " x ".join((*kernel.input_types[:1], *weights))
    fact = f"kernel {kernel.name!r} ({kernel.layer_type}) takes {operands}"
    if namesakes > 1:
        return f"{fact}, and {namesakes} nodes are named {node.name!r}: give each a name to tell them apart."
    if kernel.input_types[:1] == ("Int8",) and "Int8" in weights:
        return f"{fact} but casts before it multiplies: the product is not in int8."
    if node.op_type == "ConvTranspose":
        return f"{fact}: TensorRT-RTX has no int8 kernel for ConvTranspose (R-CT-3); leave it in float."
    return (
        f"{fact}: its Q/DQ became separate kernels. Usual causes: a scale of shape [1] instead of a "
        "scalar (R-SHAPE), weight scales along the wrong axis (R-AXIS), a GPU without the kernel (SM 75: no "
        "int8 convolution); `qdq check` finds the first two. A product whose result is cut into q, k and v may be "
        "fused with the next layers in a float kernel; nothing in the file changes that."
    )
