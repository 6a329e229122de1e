"""The judgement of the census on kernels written by hand; real ones are judged in test_build.py."""

import pytest

from qdq.graph.coverage import WorkNode
from qdq.trt.census import take_census
from qdq.trt.kernels import Kernel


def _node(name="conv1", op_type="Conv", *, on_input=True, on_weight=True):
    return WorkNode(name, name.partition("/")[0], op_type, on_input, on_weight)


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
        (False, False, "no Q/DQ"),
        (True, False, "on its input only"),
        (False, True, "on its weight only"),
    ],
)
def test_why_left_in_float(on_input, on_weight, reason):
    node = _node(on_input=on_input, on_weight=on_weight)
    layer = _one(node, _kernel(["conv1"], ("Float",), ("Float",)))
    assert not layer.expected_int8
    assert "left in float" in layer.reason
    assert reason in layer.reason


def test_int8_that_nobody_expected_is_said():
    layer = _one(_node(on_input=False), _kernel(["conv1"]))
    assert layer.int8
    assert "TensorRT moved Q/DQ" in layer.reason


def test_deconvolution_has_its_own_reason():
    layer = _one(
        _node(op_type="ConvTranspose"), _kernel(["conv1"], ("Float", "Float"), layer_type="deconv")
    )
    assert "R-CT-3" in layer.reason
