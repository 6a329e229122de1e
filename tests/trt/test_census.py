"""The judgement of the census on kernels written by hand; real ones are judged in test_build.py."""

import dataclasses

import pytest

from qdq.graph.coverage import WorkNode
from qdq.trt.census import take_census
from qdq.trt.kernels import Kernel


def _node(name="conv1", op_type="Conv", *, on_input="Int8", on_weight="Int8", promised=None):
    if promised is None:
        promised = on_input if on_input == on_weight and on_input else "Float"
    return WorkNode(name, name.partition("/")[0], op_type, on_input, on_weight, promised)


def _kernel(
    nodes, inputs=("Int8",), constants=("Int8", "Float"), *, name="", layer_type="correlation"
):
    return Kernel(
        name or f"{nodes[0]}_myl0_1", layer_type, inputs, constants, ("Float",), tuple(nodes)
    )


def _one(node, *kernels):
    (layer,) = take_census([node], kernels)
    return layer


@pytest.mark.parametrize(
    "layer_type", ["correlation", "gemm", "CaskConvolution", "CaskGemmMatrixMultiply"]
)
def test_int8_activation_and_weights(layer_type):
    layer = _one(_node(), _kernel(["conv1"], layer_type=layer_type))
    assert (layer.int8, layer.expected_int8, layer.reason) == (True, True, "")
    assert layer.kernel == "conv1_myl0_1"


@pytest.mark.parametrize(
    ("inputs", "constants", "name", "built"),
    [
        (("FP8",), ("FP8", "Float", "Float"), "", "FP8"),
        (("FP8", "FP8", "FP8"), (), "_gemm_mha_v2_myl0_3", "FP8"),
        (("FP8", "FP8", "Half", "FP8"), (), "_gemm_mha_v2_myl0_3", "FP8"),  # with a mask
        (("Half", "Half", "FP8", "FP8", "FP8"), (), "_gemm_mha_v2_myl0_3", "FP8"),
        (("FP4", "FP8"), ("FP4", "Float", "FP8"), "", "FP4"),
        (("FP8", "E8M0"), ("FP8", "E8M0"), "", "MXFP8"),
        (("Half", "Half", "Half"), (), "_gemm_mha_v2_myl0_3", "Half"),
        (("FP8", "Half"), (), "__myl_CastMulFc_myl0_5", "Half"),
        (("FP8",), ("Half", "FP8"), "__myl_CastMulCastCastMulFc_myl0_1", "Half"),
        (("Half",), ("Int4", "Half"), "__myl_ReplCastMulCastFc_myl0_0", "Int4 weights"),
        (("Half",), ("FP8",), "__myl_CastMulFc_myl0_0", "FP8 weights"),
        (("Half", "Half"), ("Float", "Float"), "", "Half"),
        (("Float",), ("Float",), "", "Float"),
    ],
)
def test_the_built_type(inputs, constants, name, built):
    kind = "runtime_fusion" if name.startswith("__myl") else "kgen" if name else "gemm"
    kernel = _kernel(["m"], inputs, constants, name=name, layer_type=kind)
    output = "Float" if built == "Float" else "Half"
    kernel = dataclasses.replace(kernel, output_types=(output,))
    layer = _one(_node("m", "MatMul", on_input="", on_weight=""), kernel)
    assert layer.built == built
    assert not layer.int8


def test_a_missing_type_is_named():
    layer = _one(
        _node("m", "MatMul", on_input="FP8", on_weight="FP8"),
        _kernel(["m"], ("Half", "Half"), ("Float",), layer_type="gemm"),
    )
    assert (layer.promised, layer.built, layer.is_missing) == ("FP8", "Half", True)
    assert "takes Half x Half" in layer.reason
    assert "R-AXIS" in layer.reason
    assert "int8" not in layer.reason


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        (("Half",), "with int4 weights that its kernel dequantizes"),
        (("Half", "Half"), "another kernel dequantizes its int4 weights first"),
    ],
)
def test_stored_weights_are_named(built, reason):
    constants = ("Int4",) if len(built) == 1 else ()
    node = _node("m", "MatMul", on_input="", on_weight="Int4", promised="Int4 weights")
    layer = _one(node, _kernel(["m"], built, constants, layer_type="gemm"))
    assert reason in layer.reason
    assert not layer.is_missing


def test_two_int8_activations_are_int8():
    assert _one(
        _node(op_type="MatMul"), _kernel(["conv1"], ("Int8", "Int8"), ("Float",), layer_type="gemm")
    ).int8


@pytest.mark.parametrize(
    ("inputs", "constants"),
    [
        (("Float",), ("Int8", "Float")),  # weight only
        (("Int8",), ("Float", "Float")),  # activation only
        (("Half", "Half"), ("Float",)),  # weights made by another kernel
        (("Float", "Int8"), ("Float",)),
        ((), ()),
    ],
)
def test_half_quantized_kernels_are_not_int8(inputs, constants):
    layer = _one(_node(), _kernel(["conv1"], inputs, constants))
    assert not layer.int8
    assert "conv1_myl0_1" in layer.reason
    assert "R-SHAPE" in layer.reason


def test_prefixes_are_other_nodes():
    nodes = [_node("conv1"), _node("conv10"), _node("block/conv1")]
    kernels = [
        _kernel(["conv10"], ("Float",), ("Float",)),
        _kernel(["conv1"]),
        _kernel(["block/conv1"], ("Half",), ("Half",)),
    ]
    assert [layer.int8 for layer in take_census(nodes, kernels)] == [True, False, False]


def test_helper_kernels_do_not_decide():
    """RTX lists a convolution also under the kernels that quantize before and rescale after it."""
    quantize = _kernel(
        ["Q", "conv1"], ("Float",), ("Float",), name="__myl_MulRounCast_myl0_0", layer_type="kgen"
    )
    rescale = _kernel(
        ["conv1", "relu"], ("Float",), ("Float",), name="__myl_MulAdd_myl0_2", layer_type="kgen"
    )
    assert _one(_node(), quantize, _kernel(["conv1"]), rescale).int8
    reformat = _kernel(["conv1"], ("Float",), (), name="Reformat", layer_type="Convert")
    assert _one(_node(), reformat, _kernel(["conv1"])).int8


def test_one_kernel_for_three_nodes():
    nodes = [_node(name, "MatMul") for name in ("q/MatMul", "k/MatMul", "v/MatMul")]
    kernel = _kernel(["v/MatMul", "k/MatMul", "q/MatMul"], name="v/MatMul+k/MatMul+q/MatMul_myl0_2")
    assert all(layer.int8 for layer in take_census(nodes, [kernel]))


def test_all_kernels_of_a_node_must_be_int8():
    layer = _one(
        _node(), _kernel(["conv1"]), _kernel(["conv1"], ("Float",), ("Float",), name="second")
    )
    assert not layer.int8
    assert layer.kernel == "second"


@pytest.mark.parametrize(
    ("name", "int8"),
    [
        ("__myl_FcCastAdd_myl0_1", True),  # multiplies, then widens
        ("__myl_CastMulCastFc_myl0_1", False),  # widens first
        ("__myl_ReshMulSum_myl0_1", False),  # a product spelled out in float
    ],
)
def test_fused_kernels(name, int8):
    layer = _one(
        _node("fc/Gemm", "Gemm"), _kernel(["fc/Gemm"], name=name, layer_type="runtime_fusion")
    )
    assert layer.int8 is int8
    assert bool(layer.reason) is not int8


def test_a_removed_node_is_said():
    layer = _one(_node("dead"), _kernel(["conv1"]))
    assert not layer.int8
    assert layer.kernel == ""
    assert "no kernel names this node ('dead')" in layer.reason


def test_nodes_of_one_name_cannot_be_told_apart():
    layers = take_census(
        [_node(), _node()], [_kernel(["conv1"]), _kernel(["conv1"], ("Float",), ("Float",))]
    )
    assert not any(layer.int8 for layer in layers)
    assert "2 nodes are named 'conv1'" in layers[0].reason


@pytest.mark.parametrize(
    ("on_input", "on_weight", "reason"),
    [
        ("", "", "no Q/DQ"),
        ("Int8", "", "on its input only; int8 needs it"),
        ("", "Int8", "on its weight only; int8 needs it"),
        ("FP8", "", "on its input only; FP8 needs it"),
        ("", "FP8", "on its weight only; FP8 needs it"),
        ("Int8", "FP8", "its operands are int8 and FP8"),
    ],
)
def test_why_left_in_float(on_input, on_weight, reason):
    node = _node(on_input=on_input, on_weight=on_weight)
    layer = _one(node, _kernel(["conv1"], ("Float",), ("Float",)))
    assert not layer.expected_int8
    assert "left in float" in layer.reason
    assert reason in layer.reason


def test_int8_that_nobody_expected_is_said():
    layer = _one(_node(on_input=""), _kernel(["conv1"]))
    assert layer.int8
    assert "TensorRT moved Q/DQ" in layer.reason


def test_deconvolution_has_its_own_reason():
    layer = _one(
        _node(op_type="ConvTranspose"), _kernel(["conv1"], ("Float", "Float"), layer_type="deconv")
    )
    assert "R-CT-3" in layer.reason
