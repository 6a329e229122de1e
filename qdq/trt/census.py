"""The type in which each layer of an engine runs, compared with the Q/DQ nodes of the graph (L27)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qdq.product_types import FLOAT_TYPES, LOW_TYPES, WEIGHTS_ONLY, word_of
from qdq.trt.kernels import Kernel

# Types of kernels that only convolve or multiply matrices, in TensorRT-RTX and in TensorRT
_PRODUCT = re.compile(
    r"correlation|conv(?!ert)|gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE
)
# Prefix of the name of a fused kernel; its operations follow, as in __myl_CastMulCastFcAdd_myl0_1.
_FUSED_PREFIX = "__myl_"
# One kernel for a whole attention: both products and the softmax
_FUSED_ATTENTION = "_gemm_mha"
_STORED_TYPES = ("Int4", *LOW_TYPES)
_OWN_KERNELS = "its Q/DQ became separate kernels. Usual causes: "
_USUAL_CAUSES = {
    "Int8": f"{_OWN_KERNELS}a scale of shape [1] instead of a scalar (R-SHAPE), weight scales along the wrong axis "
    "(R-AXIS), a GPU without the kernel (SM 75: no int8 convolution); `qdq check` finds the first two. A product whose "
    "result is cut into q, k and v may be fused with the next layers in a float kernel; nothing in the file changes "
    "that.",
    "FP8": f"{_OWN_KERNELS}a convolution with more than 32 kernel positions (R-CONV-8) or with a scale of shape [1] "
    "(R-SHAPE), weight scales along the wrong axis (R-AXIS); `qdq check` finds all of them.",
    "MXFP8": "TensorRT-RTX 1.7 dequantizes the blocks of MXFP8 before it multiplies.",
    "FP4": f"{_OWN_KERNELS}blocks of another size than 16, or not along the sum of the product.",
}


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
    def input_codes(self) -> str:
        """The type of the Q/DQ of the input, such as "Int8"; empty without Q/DQ."""

    @property
    def weight_codes(self) -> str:
        """The type of the Q/DQ of the weight."""

    @property
    def reason(self) -> str:
        """Why no Q/DQ would bring its operator into int8; "" for a convolution or matrix product."""

    @property
    def promised(self) -> str:
        """The type in which the file says that it runs, such as "Int8", "FP8" or "Half"."""


@dataclass(frozen=True)
class LayerCensus:
    """The promised and the built type of one node that multiplies.

    Args:
        module: Dotted name of the torch module.
        node: Name of the ONNX node.
        op_type: The ONNX operator.
        expected_int8: Whether both of its operands have Q/DQ of int8.
        int8: Whether every kernel that computes it takes Int8 activations and Int8 weights.
        kernel: TensorRT's name of the kernel; empty if it is not known.
        reason: Why it is not in int8, FP8 or FP4, or not as promised; empty if it is in one of them as promised.
        promised: The type in which the file says that it runs (see `graph.coverage.LayerCoverage`).
        built: The type in which the engine multiplies, by TensorRT's names. `Int4 weights` and the like: float
            arithmetic with weights that the kernel itself dequantizes. Empty if no kernel names the node.
    """

    module: str
    node: str
    op_type: str
    expected_int8: bool
    int8: bool
    kernel: str
    reason: str
    promised: str
    built: str

    @property
    def is_missing(self) -> bool:
        """Whether both of its operands have Q/DQ, but the engine multiplies in another type than theirs."""
        return self.promised in LOW_TYPES and self.built != self.promised


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


def _find_built_type(kernel: Kernel) -> str:
    """The type in which a kernel multiplies, see `LayerCensus.built`."""
    low_type = _find_low_type(kernel)
    if low_type:
        return low_type
    float_type = _find_float_type(kernel)
    for stored_type in _STORED_TYPES:
        if kernel.input_types[:1] == (float_type,) and stored_type in kernel.constant_types:
            return stored_type + WEIGHTS_ONLY
    return float_type


def _find_low_type(kernel: Kernel) -> str:
    """The type below 16 bit of both operands of a kernel that multiplies without a cast before the product.

    Weights are a constant. They are the second input if another kernel computes them, and in a product of two
    activations.

    Returns:
        Empty if there is none: the kernel multiplies in float.
    """
    types = kernel.input_types
    if kernel.name.startswith(_FUSED_ATTENTION):
        # Query, key and value; masks and biases are float, and may be the first inputs.
        return next((name for name in LOW_TYPES if types.count(name) >= 3), "")
    first = types[0] if types else ""
    if first not in LOW_TYPES or first not in (*types[1:], *kernel.constant_types):
        return ""
    prologue, product, _ = _list_operations(kernel).partition("Fc")
    is_product = bool(_PRODUCT.search(kernel.layer_type))
    if not is_product and (not product or "Cast" in prologue):
        return ""
    return "MXFP8" if first == "FP8" and "E8M0" in types else first


def _find_float_type(kernel: Kernel) -> str:
    """The float type of a kernel: that of its inputs, else of its output, else of its constants."""
    for type_name in (*kernel.input_types, *kernel.output_types, *kernel.constant_types):
        if type_name in FLOAT_TYPES:
            return type_name
    return ""


def _compare(node: QuantizableNode, kernels: list[Kernel], namesakes: int) -> LayerCensus:
    """The entry of a node.

    Args:
        node: The node.
        kernels: The kernels that compute it.
        namesakes: Number of nodes with its name.
    """
    built_types = list(map(_find_built_type, kernels))
    if node.reason:  # a kernel may contain an operator without int8 besides a product in int8
        built_types = [type_name for type_name in built_types if type_name not in LOW_TYPES]
    other_kernels = [kernel for kernel in kernels if _find_built_type(kernel) != node.promised]
    built = _join_types(built_types, node.promised)

    reason = ""
    if node.promised in LOW_TYPES and built != node.promised:
        reason = _explain_missing(node, other_kernels, namesakes)
    elif built in LOW_TYPES and built != node.promised:
        reason = (
            f"runs in {LOW_TYPES[built]} although this was not expected: TensorRT moved Q/DQ from other nodes to its "
            "inputs."
        )
    elif built not in LOW_TYPES:
        reason = _explain_float(node, built)

    relevant_kernels = other_kernels or kernels
    return LayerCensus(
        module=node.module,
        node=node.name,
        op_type=node.op_type,
        expected_int8=node.promised == "Int8",
        int8=built == "Int8",
        kernel=relevant_kernels[0].name if relevant_kernels else "",
        reason=reason,
        promised=node.promised,
        built=built,
    )


def _join_types(types: Sequence[str], promised: str) -> str:
    """The type of several kernels of one node: the promised one only if all of them have it.

    Args:
        types: The type of each kernel.
        promised: The promised type of the node.

    Returns:
        The first other type, if there is one; empty without kernels.
    """
    others = [type_name for type_name in types if type_name != promised]
    if others:
        return others[0]
    return types[0] if types else ""


def _explain_float(node: QuantizableNode, built: str) -> str:
    """Why a node was not promised in int8, FP8 or FP4.

    Args:
        node: A node that does not run in one of them.
        built: The type in which it runs.
    """
    if node.reason:
        return f"left in float: {node.reason}."
    if node.input_codes and node.weight_codes:
        operands = f"{word_of(node.input_codes)} and {word_of(node.weight_codes)}"
        return f"left in float: its operands are {operands}; a product needs two of one type (R-CONV-2)."
    if node.input_codes:
        word = word_of(node.input_codes)
        return (
            f"left in float: Q/DQ on its input only; {word} needs it on the weight too (R-CONV-2)."
        )
    if not node.weight_codes:
        return "left in float: no Q/DQ on its inputs."

    word = word_of(node.weight_codes)
    is_stored = node.promised.endswith(WEIGHTS_ONLY)
    if node.weight_codes == "Int8" or not is_stored:
        return (
            f"left in float: Q/DQ on its weight only; {word} needs it on the input too (R-CONV-2)."
        )
    if built == node.promised:
        return f"left in float, with {word} weights that its kernel dequantizes (R-WSTORE)."
    return f"left in float: another kernel dequantizes its {word} weights first, so they save no bandwidth (R-WSTORE)."


def _explain_missing(node: QuantizableNode, other_kernels: Sequence[Kernel], namesakes: int) -> str:
    """Why a quantized node did not become a kernel of the promised type.

    Args:
        node: A node with Q/DQ of one type on both operands.
        other_kernels: The kernels of the node of another type; none if no kernel names the node.
        namesakes: Number of nodes with its name.
    """
    if not other_kernels:
        return (
            f"no kernel names this node ({node.name!r}): TensorRT removed it because nothing uses its "
            "result, or computed it while building."
        )
    kernel = other_kernels[0]
    word = LOW_TYPES[node.promised]
    weights = kernel.input_types[1:] or kernel.constant_types[:1]
    operands = " x ".join((*kernel.input_types[:1], *weights))
    fact = f"kernel {kernel.name!r} ({kernel.layer_type}) takes {operands}"
    if namesakes > 1:
        return f"{fact}, and {namesakes} nodes are named {node.name!r}: give each a name to tell them apart."
    if kernel.input_types[:1] == (node.promised,) and node.promised in weights:
        return f"{fact} but casts before it multiplies: the product is not in {word}."
    if node.op_type == "ConvTranspose":
        return f"{fact}: TensorRT-RTX has no {word} kernel for ConvTranspose (R-CT-3); leave it in float."
    return f"{fact}: {_USUAL_CAUSES[node.promised]}"
