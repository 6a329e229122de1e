"""What onnx-ir would lose is told by comparing a file with what onnx-ir writes."""

import onnx
import onnx_ir as ir

from qdq.graph.carried import list_lost_fields

TEXT = """
<ir_version: 9, opset_import: ["" : 19]>
g (float[2] x) => (float[2] y)
<float[2] w = {1, 2}>
{ y = Add (x, w) }
"""


def lost_fields_of(proto):
    return list_lost_fields(proto, ir.from_proto(proto))


def test_a_plain_model_is_carried_whole():
    assert lost_fields_of(onnx.parser.parse_model(TEXT)) == []


def test_sparse_initializers_are_lost():
    proto = onnx.parser.parse_model(TEXT)
    values = onnx.helper.make_tensor("sparse", onnx.TensorProto.FLOAT, [1], [3.0])
    indices = onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [1], [0])
    sparse = onnx.helper.make_sparse_tensor(values, indices, [2])
    proto.graph.sparse_initializer.append(sparse)
    assert lost_fields_of(proto) == ["graph.sparse_initializer"]


def test_the_two_names_of_the_default_domain_are_equal():
    proto = onnx.parser.parse_model(TEXT)
    proto.opset_import[0].domain = "ai.onnx"
    assert lost_fields_of(proto) == []


def test_shapes_that_are_added_or_of_nothing_are_no_loss():
    """Shape inference writes those of results, onnx-ir those of constants as well. Quantizers leave some behind."""
    text = TEXT.replace("y = Add (x, w)", "t = Add (x, w) y = Relu (t)")
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    assert [value.name for value in proto.graph.value_info] == ["t"]
    assert lost_fields_of(proto) == []
    proto.graph.value_info.add(name="nowhere")
    assert lost_fields_of(proto) == []
