"""Work of ONNX nodes: which operators sum products, and how many multiply-accumulate operations (MACs) a node has.

An operator counts if it sums products of its operands, as a convolution, a recurrent layer or an interpolation does.
Activations, normalisations, poolings and products element by element do not. The work of an operator that is not in the
table, such as one of another domain, is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import onnx_ir as ir

from qdq.graph.pairs import ONNX_DOMAINS, QDQ_OPS, constant_of, has_reference, input_of, is_op

# Operators that multiply by a weight, or by a second activation, and that TensorRT may run in int8.
WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# The same and Einsum, which TensorRT-RTX 1.7 runs in int8 with one scale or one for each output.
PRODUCT_OPS = WEIGHTED_OPS | {"Einsum"}


class _UnknownSizeError(Exception):
    """A shape, or a number that decides about the work, is not in the file."""


def has_work(node: ir.Node) -> bool:
    """Whether a node sums products, or may do so: a body that has such nodes, an operator that onnx does not know.

    A damaged node without operands or output is left out, because nothing is known about it.
    """
    if not node.inputs and not _list_bodies(node):
        return False
    if not node.outputs:
        return False
    if is_op(node, *PRODUCT_OPS):
        return len(node.inputs) >= 2
    if is_op(node, *_FORMULAS):
        return not _only_copies(node)
    if _list_bodies(node):
        return any(has_work(inner) for body in _list_bodies(node) for inner in body)
    return _is_foreign(node)


def explain_work(node: ir.Node) -> str:
    """Why a node that has work, and is not one of `PRODUCT_OPS`, runs in float."""
    if is_op(node, *_FORMULAS):
        return _REASONS.get(node.op_type, f"TensorRT has no int8 {node.op_type}")
    if _list_bodies(node):
        return "its body multiplies, and how often it runs is not known"
    return f"{_name_operator(node)} is no operator of ONNX: its work is not known"


def count_macs(node: ir.Node) -> int | None:
    """Multiply-accumulate operations of a node that has work.

    Args:
        node: A node of a graph with shapes.

    Returns:
        None if a shape or an attribute is not known, or the operator is not in the table.
    """
    formula = _FORMULAS.get(node.op_type)
    if formula is None or node.domain not in ONNX_DOMAINS or has_reference(node):
        return None
    try:
        return formula(node)
    except (_UnknownSizeError, IndexError, KeyError):  # a damaged file may lack dimensions
        return None


def _list_bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs in the attributes of an If, Loop or Scan."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
    return bodies


def _is_foreign(node: ir.Node) -> bool:
    """Whether onnx does not know an operator: of another domain, or a function of the file."""
    if node.op_type in QDQ_OPS:
        return False
    return not onnx.defs.has(node.op_type, "" if node.domain in ONNX_DOMAINS else node.domain)


def _name_operator(node: ir.Node) -> str:
    """The operator with its domain, if it has one."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _only_copies(node: ir.Node) -> bool:
    """Whether a node of the table moves values only: a nearest resize."""
    if node.op_type not in ("Resize", "Upsample", "GridSample"):
        return False
    default = "linear" if node.op_type == "GridSample" else "nearest"
    return node.attributes.get_string("mode", default) == "nearest"


def _sizes_of(node: ir.Node, position: int) -> list[int]:
    """The shape of an input of a node.

    Raises:
        _UnknownSizeError: A dimension is not a known number.
    """
    return _read_sizes(input_of(node, position))


def _output_sizes(node: ir.Node) -> list[int]:
    """The shape of the first output of a node that is not left out.

    Raises:
        _UnknownSizeError: A dimension is not a known number.
    """
    return _read_sizes(node.outputs[0])


def _read_sizes(value: ir.Value | None, first: int | None = None) -> list[int]:
    """The sizes of a value, or only the first ones."""
    if value is None or value.shape is None:
        raise _UnknownSizeError
    sizes = []
    for size in value.shape[:first]:
        if not isinstance(size, int):
            raise _UnknownSizeError
        sizes.append(size)
    return sizes


def _read_number(node: ir.Node, position: int) -> int:
    """A constant input with one element.

    Raises:
        _UnknownSizeError: It is computed in the graph.
    """
    constant = constant_of(input_of(node, position))
    if constant is None or constant.size != 1:
        raise _UnknownSizeError
    return int(constant.flat[0])


def _count_convolution(node: ir.Node, weight: int = 1) -> int:
    """Each output value sums one product for each weight of its output channel.

    Args:
        node: The node.
        weight: Position of the weight `[Cout, Cin / groups, kernel ...]`.
    """
    return math.prod(_output_sizes(node)) * math.prod(_sizes_of(node, weight)[1:])


def _count_transposed(node: ir.Node) -> int:
    """Each input value is multiplied by each weight of its input channel `[Cin, Cout / groups, kernel ...]`."""
    return math.prod(_sizes_of(node, 0)) * math.prod(_sizes_of(node, 1)[1:])


def _count_product(node: ir.Node) -> int:
    """Each output value sums one product for each value of the inner dimension."""
    is_transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    inner_axis = 0 if is_transposed else -1
    return math.prod(_output_sizes(node)) * _sizes_of(node, 0)[inner_axis]


def _count_recurrent(node: ir.Node) -> int:
    """Each step multiplies its input and the hidden state by the weights of all gates.

    Input `[T, N, I]` or `[N, T, I]`, weights `[directions, gates H, I]` and `[directions, gates H, H]`. I is read from
    the weights: the exporter of torch reshapes the input of all layers but the first by a computed shape.
    """
    steps = math.prod(_read_sizes(input_of(node, 0), first=2))
    return steps * (math.prod(_sizes_of(node, 1)) + math.prod(_sizes_of(node, 2)))


def _count_einsum(node: ir.Node) -> int:
    """Each output value sums one product for each value of the labels that it lacks; each operand multiplies once."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    operands, arrow, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for position, labels in enumerate(operands.split(",")):
        shape = _sizes_of(node, position)
        before, dots, after = labels.partition("...")
        sizes.update(zip(before, shape, strict=False))
        if dots:
            sizes.update(zip(reversed(after), reversed(shape), strict=False))
    if not arrow:  # the labels that appear once
        result = "".join(label for label in sizes if equation.count(label) == 1)
    summed = [size for label, size in sizes.items() if label not in result]
    return math.prod(_output_sizes(node)) * math.prod(summed) * (len(node.inputs) - 1)


def find_output_label(node: ir.Node) -> int | None:
    """The axis of the second operand of an Einsum that only the result has as well; None if it is not exactly one."""
    equation = node.attributes.get_string("equation", "").replace(" ", "").replace("...", "")
    operands, _, result = equation.partition("->")
    first, _, second = operands.partition(",")
    axes = [axis for axis, label in enumerate(second) if label in result and label not in first]
    return axes[0] if len(axes) == 1 else None


def _count_attention(node: ir.Node) -> int:
    """Scores of all queries and keys, then sums of values: `[N, L, H E]` or `[N, H, L, E]` as in ONNX."""
    query, key, result = _sizes_of(node, 0), _sizes_of(node, 1), _output_sizes(node)
    num_keys = key[-2]
    if input_of(node, 4) is not None:
        num_keys += _sizes_of(node, 4)[-2]
    return (math.prod(query) + math.prod(result)) * num_keys


def count_fourier(length: int, *, is_complex: bool) -> int:
    """Multiplications of a fast Fourier transform of one signal: n / 2 log2 n complex ones, half for real values.

    J. W. Cooley and J. W. Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965. A complex
    product has four real ones.

    Args:
        length: Number of samples n.
        is_complex: Whether the samples are complex numbers.
    """
    count = 2 * length * math.ceil(math.log2(max(length, 1)))
    return count if is_complex else count // 2


def _count_dft(node: ir.Node) -> int:
    """The transforms of all signals `[..., n, ..., 1 or 2]` along one axis."""
    sizes = _sizes_of(node, 0)
    axis = node.attributes.get_int("axis", 1)
    if input_of(node, 2) is not None:
        axis = _read_number(node, 2)
    length = sizes[axis]
    num_signals = math.prod(sizes[:-1]) // max(length, 1)
    if input_of(node, 1) is not None:
        length = _read_number(node, 1)
    return num_signals * count_fourier(length, is_complex=sizes[-1] == 2)


def _count_stft(node: ir.Node) -> int:
    """The transforms of all frames; output `[N, frames, bins, 2]`."""
    batch, frames = _output_sizes(node)[:2]
    has_window = input_of(node, 2) is not None
    length = _sizes_of(node, 2)[0] if has_window else _read_number(node, 3)
    sizes = _sizes_of(node, 0)
    is_complex = len(sizes) == 3 and sizes[-1] == 2
    return batch * frames * count_fourier(length, is_complex=is_complex)


def _count_resize(node: ir.Node) -> int:
    """Each output value sums its neighbours; those along a dimension whose size stays are not read."""
    before, after = _sizes_of(node, 0), _output_sizes(node)
    taps = _count_taps(node)
    is_smoothed = bool(node.attributes.get_int("antialias", 0))
    count = math.prod(after)
    for old, new in zip(before, after, strict=True):
        if old == new:
            continue
        widening = max(1.0, old / new) if is_smoothed else 1.0
        count *= math.ceil(taps * widening)
    return count


def _count_sampling(node: ir.Node) -> int:
    """Each output value sums its neighbours in all dimensions of the picture `[N, C, ...]`."""
    sizes = _output_sizes(node)
    return math.prod(sizes) * int(_count_taps(node) ** (len(sizes) - 2))


def _count_taps(node: ir.Node) -> int:
    """Pixels that an interpolation reads along each dimension."""
    return 4 if "cubic" in node.attributes.get_string("mode", "") else 2


def _count_roi_align(node: ir.Node) -> int:
    """Each bin sums `sampling_ratio` squared samples of four neighbours; a ratio of 0 depends on the boxes."""
    ratio = node.attributes.get_int("sampling_ratio", 0)
    if ratio == 0:
        raise _UnknownSizeError
    return math.prod(_output_sizes(node)) * 4 * ratio**2


def _count_affine_grid(node: ir.Node) -> int:
    """Each coordinate of the output `[N, ..., D]` sums D + 1 products."""
    sizes = _output_sizes(node)
    return math.prod(sizes) * (sizes[-1] + 1)


def _count_unknown(node: ir.Node) -> int:
    raise _UnknownSizeError


_FORMULAS: dict[str, Callable[[ir.Node], int]] = {
    "Conv": _count_convolution,
    "ConvTranspose": _count_transposed,
    "Gemm": _count_product,
    "MatMul": _count_product,
    "ConvInteger": _count_convolution,
    "MatMulInteger": _count_product,
    "QLinearConv": lambda node: _count_convolution(node, 3),
    "QLinearMatMul": _count_product,
    "DeformConv": _count_convolution,
    "CausalConvWithState": _count_convolution,
    "LSTM": _count_recurrent,
    "GRU": _count_recurrent,
    "RNN": _count_recurrent,
    "Einsum": _count_einsum,
    "Attention": _count_attention,
    "LinearAttention": _count_unknown,
    "Det": _count_unknown,
    "DFT": _count_dft,
    "STFT": _count_stft,
    "Resize": _count_resize,
    "Upsample": _count_resize,
    "GridSample": _count_sampling,
    "AffineGrid": _count_affine_grid,
    "RoiAlign": _count_roi_align,
}

_INTEGER = "TensorRT takes int8 as Q/DQ around a float operator only"
_RECURRENT = "recurrent: TensorRT has no int8 path for it (R-RNN)"
_INTERPOLATION = "interpolation: TensorRT computes it in float"
_REASONS = {
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"), _INTEGER),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
    **dict.fromkeys(("Resize", "Upsample", "GridSample", "AffineGrid", "RoiAlign"), _INTERPOLATION),
}
