"""Each pass on a small graph, before and after."""

import numpy as np
import onnx_ir as ir
import pytest

from qdq import ExportError
from qdq.graph.coverage import count_qdq, list_work_nodes
from qdq.graph.names import NameNodes, scope_of
from qdq.graph.passes import run_passes
from qdq.graph.weights import QuantizeWeights

CONV = """
<ir_version: 9, opset_import: ["" : 19]>
conv (float[N,2,4,4] x) => (float[N,3,4,4] y)
<float xs = {0.5}, int8 xz = {0},
 float[3,2,1,1] w = {1, 2, 3, 4, 5, 6}, float[3] ws = {0.1, 0.2, 0.3}, int8[3] wz = {0, 0, 0}>
{
    xq = QuantizeLinear <axis = 1> (x, xs, xz)
    xd = DequantizeLinear <axis = 1> (xq, xs, xz)
    wq = QuantizeLinear <axis = 0> (w, ws, wz)
    wd = DequantizeLinear <axis = 0> (wq, ws, wz)
    y = Conv (xd, wd)
}
"""


def conv_model(scopes=True):
    model = ir.from_onnx_text(CONV)
    modules = ["c._input_quantizer"] * 2 + ["c._weight_quantizer"] * 2 + ["c"]
    for node, module in zip(model.graph, modules, strict=True):
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", "c", module, "op"])
    return model


def codes_of(values, scale, axis, code_type):
    assert (axis, code_type) == (0, ir.DataType.INT8)
    return np.clip(np.rint(values / scale.reshape(-1, 1, 1, 1)), -128, 127).astype(np.int8)


def quotients_of(values, scale, axis, code_type):
    return (values / scale).astype(code_type.numpy())


def test_names():
    model = run_passes(conv_model(), [NameNodes()])
    assert [node.name for node in model.graph] == [
        "c._input_quantizer/QuantizeLinear",
        "c._input_quantizer/DequantizeLinear",
        "c._weight_quantizer/QuantizeLinear",
        "c._weight_quantizer/DequantizeLinear",
        "c/Conv",
    ]
    names = set(model.graph.initializers)
    assert {
        "c._input_quantizer.scale",
        "c._input_quantizer.zero_point",
        "c._weight_quantizer.scale",
    } <= names
    assert "xs" not in names


def test_the_way_to_the_model_is_no_name():
    """In strict mode, torch writes how its tracer reached the model."""
    model = conv_model()
    way = "dict(type(L['self']).__dict__)['__call__'].__closure__[0].cell_contents._model"
    for node, scope in zip(model.graph, [way, f"{way}.c", f"{way}.c.head", "c", ""], strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", scope, "op"])
    modules = {"c", "c.head", "head"}
    assert [scope_of(node, modules) for node in model.graph] == ["", "c", "c.head", "c", ""]


def test_names_of_equal_nodes_differ():
    model = conv_model(scopes=False)
    run_passes(model, [NameNodes()])
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_weights_become_codes():
    model = conv_model()
    graph_pass = QuantizeWeights(codes_of)
    run_passes(model, [graph_pass])
    assert graph_pass.removed_q == 1
    assert [node.op_type for node in model.graph] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "Conv",
    ]
    weight = model.graph.initializers["w"].const_value
    assert weight.dtype == ir.DataType.INT8
    assert weight.numpy().ravel().tolist() == [10, 20, 15, 20, 17, 20]
    assert count_qdq(model) == (1, 2)


def test_fp8_weights_become_fp8_codes():
    model = ir.from_onnx_text("""
    <ir_version: 9, opset_import: ["" : 19]>
    g (float[2] x) => (float[2] y)
    <float[2] w = {1, 3}, float a = {0.5}>
    {
        z = Constant <value = float8e4m3fn {0}> ()
        c = QuantizeLinear (w, a, z)
        d = DequantizeLinear (c, a, z)
        y = Add (x, d)
    }
    """)
    run_passes(model, [QuantizeWeights(quotients_of)])
    (dequantize,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    codes = dequantize.inputs[0].const_value
    assert codes.dtype == ir.DataType.FLOAT8E4M3FN
    assert codes.numpy().astype(np.float32).tolist() == [2, 6]


def test_a_constant_with_several_scales_has_codes_for_each():
    model = ir.from_onnx_text("""
    <ir_version: 9, opset_import: ["" : 19]>
    sums (float[2] x) => (float[2] y)
    <float[2] w = {1, 2}, int8 z = {0}, float a = {1}, float b = {0.5}, float c = {0.25}>
    {
        wa = QuantizeLinear (w, a, z)
        wb = QuantizeLinear (w, b, z)
        wc = QuantizeLinear (w, c, z)
        da = DequantizeLinear (wa, a, z)
        db = DequantizeLinear (wb, b, z)
        dc = DequantizeLinear (wc, c, z)
        y = Sum (x, da, db, dc)
    }
    """)
    run_passes(model, [QuantizeWeights(quotients_of)])
    codes = [node.inputs[0].const_value.numpy().tolist() for node in list(model.graph)[:3]]
    assert codes == [[1, 2], [2, 4], [4, 8]]


def test_coverage_looks_through_what_moves_values():
    model = ir.from_onnx_text("""
    <ir_version: 9, opset_import: ["" : 19]>
    linear (float[2,4] x) => (float[2,3] y)
    <float s = {0.5}, int8 z = {0}, int8[3,4] w = {1,2,3,4,5,6,7,8,9,1,2,3}>
    {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        r = Relu (d)
        wd = DequantizeLinear (w, s, z)
        wt = Transpose <perm = [1, 0]> (wd)
        y = MatMul (d, wt)
        u = MatMul (r, wt)
    }
    """)
    first, second = list_work_nodes(model)
    assert first.is_quantized
    assert second.weight_codes
    assert not second.input_codes  # a Relu makes new values


def test_a_pass_that_loses_a_pair_is_refused():
    class Loses(ir.passes.InPlacePass):
        def call(self, model):
            node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
            node.outputs[0].replace_all_uses_with(model.graph.inputs[0])
            model.graph.remove(node, safe=True)
            return ir.passes.PassResult(model, modified=True)

    with pytest.raises(ExportError, match="Loses left 2 Q and 1 DQ nodes, expected 2 and 2"):
        run_passes(conv_model(), [Loses()])
