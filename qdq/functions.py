"""The table of torch functions and what they do with tensors. Every set of functions is derived from it.

A function is known by the name that `forward.name_function` gives it. The function, the method, the operator and the
in-place method have the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeVar

_Value = TypeVar("_Value")

Kind = Literal[
    "convolution",
    "transposed convolution",
    "linear",
    "matrix product",
    "attention",
    "recurrent",
    "average pooling",
    "adaptive average pooling",
    "norm pooling",
    "mean",
    "max pooling",
    "activation",
    "multiplication",
    "normalization",
    "sample normalization",
    "softmax",
    "identity",
    "reshape",
    "copy",
    "concat",
    "add",
    "resize",
]


@dataclass(frozen=True)
class Clamp:
    """The bounds of a function that clamps its input.

    Args:
        low: Lower bound; its default, if the function has a parameter for it.
        high: Upper bound, likewise.
        parameters: Names of the parameters that hold the bounds, the second and third of the function; () for a
            function whose bounds are constants.
    """

    low: float
    high: float
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """The properties of a torch function.

    Args:
        kind: "linear" has a weight with the outputs first, "matrix product" any factors; "identity" gives the same
            values in evaluation, "reshape" keeps them in their order, "copy" moves or repeats them; a "sample
            normalization" computes its statistics from its input.
        factors: Positions of the tensors that it multiplies, among all its tensors; () if it multiplies all or none.
        output_axis: Axis of the outputs in a weight that is its second factor; None if it has none, or if an equation
            says it.
        onnx: Each call is exported as exactly one node of one of these ONNX operators; () for functions that are
            exported in another way.
        is_homogeneous: Whether f(s x) = s f(x) for every s > 0, channel by channel.
        clamp: The bounds of a function that clamps; None for any other.
    """

    kind: Kind
    factors: tuple[int, ...] = ()
    output_axis: int | None = None
    onnx: tuple[str, ...] = ()
    is_homogeneous: bool = False
    clamp: Clamp | None = None


def _alike(value: _Value, names: str) -> dict[str, _Value]:
    """A part of a table in which several functions have the same value."""
    return dict.fromkeys(names.split(), value)


FUNCTIONS: dict[str, Function] = {
    **_alike(Function("convolution", (0, 1), 0, ("Conv",)), "conv1d conv2d conv3d"),
    **_alike(Function("convolution"), "convolution conv_tbc deform_conv2d"),
    **_alike(
        Function("transposed convolution", (0, 1), onnx=("ConvTranspose",)),
        "conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    "linear": Function("linear", (0, 1), 0, ("Gemm", "MatMul")),
    **_alike(Function("matrix product", (0, 1), 1, ("MatMul",)), "matmul bmm"),
    "mm": Function("matrix product", (0, 1), 1, ("MatMul", "Gemm")),
    **_alike(Function("matrix product", (1, 2), 1, ("MatMul", "Gemm")), "addmm baddbmm"),
    **_alike(Function("matrix product", (0, 1)), "mv dot vdot inner linalg_vecdot tensordot"),
    **_alike(Function("matrix product", (1, 2)), "addmv addbmm"),
    "einsum": Function("matrix product", onnx=("Einsum", "MatMul")),
    "bilinear": Function("matrix product", (0, 1, 2)),
    **_alike(Function("matrix product"), "chain_matmul linalg_multi_dot"),
    **_alike(Function("attention"), "scaled_dot_product_attention multi_head_attention_forward"),
    **_alike(
        Function("recurrent"),
        "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    ),
    **_alike(
        Function("average pooling", onnx=("AveragePool",), is_homogeneous=True),
        "avg_pool1d avg_pool2d avg_pool3d",
    ),
    **_alike(
        Function("adaptive average pooling", is_homogeneous=True),
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    ),
    **_alike(Function("norm pooling", is_homogeneous=True), "lp_pool1d lp_pool2d lp_pool3d"),
    "mean": Function("mean", onnx=("ReduceMean", "GlobalAveragePool")),
    **_alike(
        Function("max pooling", is_homogeneous=True),
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices "
        "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
    ),
    "relu": Function("activation", is_homogeneous=True, clamp=Clamp(0.0, inf)),
    "relu6": Function("activation", clamp=Clamp(0.0, 6.0)),
    "hardtanh": Function("activation", clamp=Clamp(-1.0, 1.0, ("min_val", "max_val"))),
    "clamp": Function("activation", clamp=Clamp(-inf, inf, ("min", "max"))),
    **_alike(Function("activation", is_homogeneous=True), "leaky_relu rrelu prelu"),
    **_alike(
        Function("activation"),
        "clamp_min clamp_max threshold silu hardswish gelu mish elu celu selu sigmoid hardsigmoid "
        "log_sigmoid tanh tanhshrink softplus softsign softshrink hardshrink",
    ),
    "mul": Function("multiplication", onnx=("Mul",)),
    "batch_norm": Function("normalization"),
    "softmax": Function("softmax"),
    **_alike(Function("sample normalization"), "layer_norm group_norm instance_norm rms_norm"),
    **_alike(
        Function("identity", is_homogeneous=True),
        "contiguous clone data detach dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout "
        "feature_alpha_dropout",
    ),
    **_alike(
        Function("reshape"),
        "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze",
    ),
    **_alike(
        Function("copy"),
        "transpose t T mT H mH adjoint permute movedim moveaxis swapaxes swapdims "
        "expand expand_as broadcast_to repeat repeat_interleave tile roll flip fliplr flipud rot90 "
        "chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit dsplit unbind "
        "getitem narrow select diagonal index_select gather take_along_dim "
        "channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle",
    ),
    "cat": Function("concat", onnx=("Concat",)),
    **_alike(Function("concat"), "stack hstack vstack dstack row_stack column_stack"),
    "add": Function("add", onnx=("Add",)),
    "interpolate": Function("resize", onnx=("Resize", "Upsample")),
}

# Names of operators and synonyms -> the name in the table.
ALIASES = {
    "iadd": "add",
    "radd": "add",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "rmatmul": "matmul",
    "linalg_matmul": "matmul",
    "spmm": "mm",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
}

# Function -> ONNX operators that a call may be exported as besides those in its `onnx`. A function that has neither an
# entry here nor an `onnx` may be exported as anything.
ONNX_BESIDES: dict[str, tuple[str, ...]] = {
    **_alike(
        (),
        "abs chunk clamp clone contiguous detach dropout exp float getitem hardtanh leaky_relu max_pool1d max_pool2d "
        "max_pool3d neg permute relu relu6 sigmoid softmax split sqrt squeeze tanh to transpose unsqueeze",
    ),
    **_alike(("Concat",), "flatten reshape view interpolate"),
    **_alike(("Mul",), "add sub isub rsub imul rmul"),
    **_alike(("Add", "Mul"), "linear addmm baddbmm"),
    "einsum": ("Concat", "Gemm", "Mul"),
}


def names_of(*kinds: Kind) -> frozenset[str]:
    """The functions of some kinds."""
    return frozenset(name for name, function in FUNCTIONS.items() if function.kind in kinds)


LINEAR = names_of("linear")
CONVOLUTIONS = names_of("convolution", "transposed convolution")
MATRIX_PRODUCTS = names_of("matrix product")
ATTENTION = names_of("attention")
RECURRENT = names_of("recurrent")
SOFTMAX = names_of("softmax")
# The functions that sum products: all that TensorRT could run in int8.
CONTRACTIONS = CONVOLUTIONS | MATRIX_PRODUCTS | ATTENTION | LINEAR | RECURRENT
# The functions of an input, a weight with the outputs first, and a bias.
WEIGHTED = frozenset(name for name in names_of("convolution", "linear") if FUNCTIONS[name].factors)

ADDITIONS = names_of("add")
MULTIPLICATIONS = names_of("multiplication")
RESIZES = names_of("resize")

AVERAGE_POOLINGS = names_of("average pooling")
ADAPTIVE_AVERAGE_POOLINGS = names_of("adaptive average pooling")
MAX_POOLINGS = names_of("max pooling")
MEANS = names_of("mean")
AVERAGES = AVERAGE_POOLINGS | MEANS | names_of("adaptive average pooling", "norm pooling")

ACTIVATIONS = names_of("activation")
IDENTITIES = names_of("identity")
RESHAPES = names_of("reshape")
COPIES = IDENTITIES | RESHAPES | names_of("copy")
# The functions whose result moves by as much as their input. Average pooling with padding does not.
SHIFT_KEEPERS = IDENTITIES | RESHAPES | MEANS | MAX_POOLINGS | ADAPTIVE_AVERAGE_POOLINGS
# They change the type of values; not to integers, which no product of a softmax reads.
CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "double"})
CONCATS = names_of("concat")
SHAPE_READERS = frozenset({"size", "shape", "dim", "ndim", "ndimension", "numel"})
# The functions that TensorRT fuses into the convolution before them.
SCALINGS = IDENTITIES | MULTIPLICATIONS | names_of("normalization")
# The functions between the sum that a residual stream carries and the next product.
STREAM = (
    ACTIVATIONS
    | SCALINGS
    | COPIES
    | CONCATS
    | MAX_POOLINGS
    | ADDITIONS
    | names_of("sample normalization")
)
HOMOGENEOUS = frozenset(name for name, function in FUNCTIONS.items() if function.is_homogeneous)

# ONNX operators that sum products, and the functions whose calls are each exported as exactly one of them.
PRODUCT_OPERATORS = frozenset(
    operator for name in CONTRACTIONS for operator in FUNCTIONS[name].onnx
)
SINGLE_PRODUCTS = frozenset(name for name in CONTRACTIONS if FUNCTIONS[name].onnx)
