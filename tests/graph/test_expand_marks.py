import numpy as np
import onnx
import onnx_ir as ir
import torch
from graph_text import compute, ops

from qdq.graph.expand_marks import ExpandMarks

GRAPH = """
<ir_version: 9, opset_import: ["" : 19, "qdq" : 1]>
g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z, float[2, 3] w) {
  a = qdq.FakeQuantize <mark = 0.5, axis = 1, num_ranges = 0, code_type = 3> (x)
  y = Relu (a)
  z = qdq.FakeQuantize <mark = 0.25, axis = 1, num_ranges = 3, code_type = 3> (x)
  w = qdq.FakeQuantize <mark = 0.125, axis = 1, num_ranges = 0, code_type = 17> (x)
}
"""


def test_each_mark_becomes_a_pair():
    model = ir.from_proto(onnx.parser.parse_model(GRAPH))
    for node in model.graph:
        node.metadata_props["scope"] = "a.b"
    assert ExpandMarks()(model).modified
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert ops(model) == [*pair, "Relu", *pair, *pair]
    shapes = [
        node.inputs[1].const_value.numpy().shape for node in model.graph if len(node.inputs) == 3
    ]
    assert shapes == [(), (), (3,), (3,), (), ()]
    assert {node.metadata_props["scope"] for node in model.graph} == {"a.b"}
    assert "qdq" not in model.graph.opset_imports
    outputs = compute(model)
    x = 3 * np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_array_equal(outputs["y"], np.maximum(np.rint(x / 0.5) * 0.5, 0))
    np.testing.assert_array_equal(outputs["z"], np.rint(x / 0.25) * 0.25)
    codes = torch.from_numpy(x / 0.125).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(outputs["w"], codes.float().numpy() * 0.125)
    assert not ExpandMarks()(model).modified


def test_the_output_of_a_graph_keeps_its_name():
    model = ir.from_proto(onnx.parser.parse_model(GRAPH))
    ExpandMarks()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z", "w"]
