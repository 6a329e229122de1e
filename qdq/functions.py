"""What each torch function does with its tensors: the one table from which every set of functions is derived.

A function is known by the name that `trace.name_function` gives it: that of the function, the method, the operator and
the method in place are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    "scaling",
    "identity",
    "copy",
    "concat",
    "add",
    "resize",
]


@dataclass(frozen=True)
class Function:
    """What a torch function does with its tensors.

    Args:
        kind: "linear" has a weight with the outputs first, "matrix product" any two factors; "identity" gives the same
            values in evaluation, "copy" moves or repeats them.
        factors: Positions among its tensors of those that it multiplies; () for all of them, or if it multiplies none.
        onnx: ONNX operators of which every call leaves exactly one node; () where it leaves several, or others.
        is_homogeneous: Whether f(s x) = s f(x) for every s > 0, channel by channel.
    """

    kind: Kind
    factors: tuple[int, ...] = ()
    onnx: tuple[str, ...] = ()
    is_homogeneous: bool = False


def _alike(function: Function, names: str) -> dict[str, Function]:
    return dict.fromkeys(names.split(), function)


FUNCTIONS: dict[str, Function] = {
    **_alike(Function("convolution", (0, 1), ("Conv",)), "conv1d conv2d conv3d"),
    **_alike(Function("convolution"), "convolution conv_tbc deform_conv2d"),
    **_alike(
        Function("transposed convolution", (0, 1), ("ConvTranspose",)),
        "conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_alike(Function("linear", (0, 1), ("Gemm", "MatMul")), "linear"),
    **_alike(Function("matrix product", (0, 1), ("MatMul",)), "matmul bmm"),
    **_alike(Function("matrix product", (0, 1), ("MatMul", "Gemm")), "mm"),
    **_alike(Function("matrix product", (1, 2), ("MatMul", "Gemm")), "addmm baddbmm"),
    **_alike(Function("matrix product", (0, 1)), "mv dot vdot inner linalg_vecdot tensordot"),
    **_alike(Function("matrix product", (1, 2)), "addmv addbmm"),
    **_alike(Function("matrix product", (), ("Einsum", "MatMul")), "einsum"),
    **_alike(Function("matrix product", (0, 1, 2)), "bilinear"),
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
    **_alike(Function("mean", onnx=("ReduceMean", "GlobalAveragePool")), "mean"),
    **_alike(
        Function("max pooling", is_homogeneous=True),
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices "
        "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
    ),
    **_alike(Function("activation", is_homogeneous=True), "relu leaky_relu rrelu prelu"),
    **_alike(
        Function("activation"),
        "relu6 hardtanh clamp clamp_min clamp_max threshold silu hardswish gelu mish elu celu selu sigmoid hardsigmoid "
        "log_sigmoid tanh tanhshrink softplus softsign softshrink hardshrink",
    ),
    **_alike(Function("scaling", onnx=("Mul",)), "mul"),
    **_alike(Function("scaling"), "batch_norm"),
    **_alike(
        Function("identity", is_homogeneous=True),
        "contiguous clone data detach dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout "
        "feature_alpha_dropout",
    ),
    **_alike(
        Function("copy"),
        "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze "
        "transpose t T mT H mH adjoint permute movedim moveaxis swapaxes swapdims "
        "expand expand_as broadcast_to repeat repeat_interleave tile roll flip fliplr flipud rot90 "
        "chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit dsplit unbind "
        "getitem narrow select diagonal index_select gather take_along_dim "
        "channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle",
    ),
    **_alike(Function("concat", onnx=("Concat",)), "cat"),
    **_alike(Function("concat"), "stack hstack vstack dstack row_stack column_stack"),
    **_alike(Function("add", onnx=("Add",)), "add"),
    **_alike(Function("resize", onnx=("Resize", "Upsample")), "interpolate"),
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


def names_of(*kinds: Kind) -> frozenset[str]:
    """The functions of some kinds."""
    return frozenset(name for name, function in FUNCTIONS.items() if function.kind in kinds)


LINEAR = names_of("linear")
CONVOLUTIONS = names_of("convolution", "transposed convolution")
MATRIX_PRODUCTS = names_of("matrix product")
ATTENTION = names_of("attention")
# What sums products: all that TensorRT could run in int8.
CONTRACTIONS = CONVOLUTIONS | MATRIX_PRODUCTS | ATTENTION | LINEAR | names_of("recurrent")
# What takes an input, a weight with the outputs first, and a bias.
WEIGHTED = frozenset(name for name in names_of("convolution", "linear") if FUNCTIONS[name].factors)

AVERAGE_POOLINGS = names_of("average pooling")
MAX_POOLINGS = names_of("max pooling")
AVERAGES = AVERAGE_POOLINGS | names_of("adaptive average pooling", "norm pooling", "mean")

ACTIVATIONS = names_of("activation")
IDENTITIES = names_of("identity")
COPIES = IDENTITIES | names_of("copy")
CONCATS = names_of("concat")
# What TensorRT fuses into the convolution before it.
SCALINGS = IDENTITIES | names_of("scaling")
HOMOGENEOUS = frozenset(name for name, function in FUNCTIONS.items() if function.is_homogeneous)

# ONNX operators that sum products, and the functions of which each call leaves exactly one of them.
PRODUCT_OPERATORS = frozenset(
    operator for name in CONTRACTIONS for operator in FUNCTIONS[name].onnx
)
SINGLE_PRODUCTS = frozenset(name for name in CONTRACTIONS if FUNCTIONS[name].onnx)
